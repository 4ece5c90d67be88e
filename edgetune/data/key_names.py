"""The names of roles and keys in rows of fine-tuning data, as other tools write them.

Names are compared without case, spaces, hyphens and underscores: `Function-Call` is `function_call`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache

_SEPARATORS = re.compile(r"[\s_-]+")


@lru_cache(10_000)
def fold(name: str) -> str:
    """Return a name without case, spaces, hyphens and underscores."""
    return _SEPARATORS.sub("", name.casefold())


ROLES: Mapping[str, tuple[str, ...]] = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": (
        "assistant", "gpt", "chatgpt", "gpt3.5", "gpt4", "ai", "bot", "chatbot", "model", "llm", "claude", "bard",
        "bing",
    ),
    "tool": (
        "tool", "function", "observation", "tool_response", "tool_result", "function_response", "function_result",
        "ipython",
    ),
}  # fmt: skip
"""The names of each role. data.roles adds others."""
CALL_ROLES = ("function_call", "tool_call", "tool_calls")
"""Names of the assistant's role in a message whose content is a tool call as JSON text (sharegpt of LLaMA-Factory)."""

ROLE_KEYS = ("role", "from", "speaker", "author", "sender", "actor", "type")
CONTENT_KEYS = ("content", "value", "text", "message", "utterance", "parts", "msg", "body")

MESSAGES_KEYS = (
    "messages", "conversations", "conversation", "dialog", "dialogue", "dialogs", "dialogues", "turns", "chat", "chats",
    "convo", "thread", "contents", "items", "message_list",
)  # fmt: skip
SHAREGPT_KEYS = ("conversations", "conversation")
SYSTEM_KEYS = ("system", "system_prompt", "system_message", "system_instruction")
TOOLS_KEYS = ("tools", "functions", "tool_definitions", "available_tools")
HISTORY_KEYS = ("history",)
INSTRUCTION_KEYS = ("instruction", "instructions")
INPUT_KEYS = ("input", "context")
OUTPUT_KEYS = ("output", "response", "completion", "answer", "solution", "target", "assistant", "reply")
PROMPT_KEYS = (
    "prompt", "question", "query", "problem", "user", "human", "input", "inputs", "request", "user_prompt",
    "user_message",
)  # fmt: skip
COMPLETION_KEYS = (
    "completion", "response", "answer", "solution", "output", "outputs", "assistant", "target", "targets", "reply",
    "gpt", "bot", "ai", "answers", "assistant_response", "model_response",
)  # fmt: skip
PAIRS = (
    ("prompt", "completion"), ("prompt", "response"), ("question", "answer"), ("query", "response"),
    ("problem", "solution"), ("user", "assistant"), ("human", "assistant"), ("input", "output"),
)  # fmt: skip
"""Pairs that are tried first where a row has several prompts or completions."""

FLAG_KEYS = ("weight", "train", "training", "loss", "trainable", "loss_weight", "output_with_loss")
"""Keys of a message that say whether it is trained on: 1 or true (the default), 0 or false."""
ROW_WEIGHT_KEYS = ("weight", "sample_weight", "loss_weight")
"""Keys of a row that say whether it is trained on, as a number."""
ROW_FLAG_KEYS = ("train", "training", "loss", "trainable")
"""The same as a truth value; a number under these keys is no flag."""
MASK_KEYS = ("mask", "loss_mask", "masked", "train_detail", "mask_history")
"""Keys that say what is trained on in a way that edgetune does not follow."""
MEDIA_KEYS = ("images", "image", "videos", "video", "audios", "audio")
CHOSEN_KEYS = ("chosen", "chosen_response", "chosen_messages", "preferred_output", "chosen_output")
REJECTED_KEYS = (
    "rejected", "rejected_response", "rejected_responses", "rejected_messages", "non_preferred_output",
    "rejected_output",
)  # fmt: skip
PREFERENCE_KEYS = (*CHOSEN_KEYS, *REJECTED_KEYS)
MARGIN_KEYS = ("margin",)
RANKED_KEYS = ("responses", "completions", "candidates", "generations", "ranked_responses", "answers")
"""Keys of several answers to one prompt: the best one first, or with scores."""
SCORES_KEYS = ("scores", "ratings", "rewards", "rating", "ranks", "rankings", "rank")
"""Keys of a list with a number for each of several answers."""
SCORE_KEYS = ("score", "overall_score", "rating", "reward", "pm_score", "fine_grained_score", "rank")
"""Keys of the number of one answer."""
RANKS = ("rank", "ranks", "rankings")
"""Those of them whose lowest number is the best."""
LABEL_KEYS = (
    "label", "kto_tag", "thumbs_up", "thumbs_down", "thumbs", "thumb", "preference", "desirable", "is_desirable",
    "liked", "feedback",
)  # fmt: skip
"""Keys that say whether an answer is desirable (KTO)."""
NEGATIVE_LABEL_KEYS = ("thumbs_down",)
"""Those of them that are true for an answer that is not desirable."""
RATING_KEYS = ("label", "kto_tag")
"""Those of them that make a row one of KTO, whatever the objective."""
TEXT_KEYS = ("text", "raw_text", "document")
"""Keys of rows for pretraining, or of conversations that are rendered already."""


class KeyFinder:
    """Finds the keys of a row or message by the names of a table."""

    def __init__(self, keys: Iterable[str], mapped: Mapping[str, str] | None = None) -> None:
        """Find keys by their names; those of data.columns (meaning -> key) by their meaning too."""
        self._mapped = mapped or {}
        self._by_name: dict[str, str] = {}
        for key in keys:
            self._by_name.setdefault(fold(key), key)

    def first(self, names: Sequence[str]) -> str | None:
        """Return the key of the first name that there is, in the order of the names."""
        return next((self._by_name[name] for name in map(fold, names) if name in self._by_name), None)

    def find(self, meaning: str, names: Sequence[str]) -> str | None:
        """Return the key that data.columns gives a meaning, else that of the first name that there is."""
        return self._mapped.get(meaning) or self.first(names)

    def all(self, names: Sequence[str]) -> list[str]:
        """Return the keys of all names, in the order of the names."""
        return [self._by_name[name] for name in map(fold, names) if name in self._by_name]
