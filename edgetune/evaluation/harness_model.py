"""A model as lm-evaluation-harness calls it: log-likelihoods of continuations and texts, and greedy answers.

The steps from a request to token ids are those of the harness's own class for transformers models (HFLM), so that
scores can be compared with published ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from numpy.typing import NDArray

from edgetune.console import Progress
from edgetune.data.chat import ChatTemplate
from edgetune.errors import ConfigError, DataError
from edgetune.evaluation.models import EvaluatedModel, PromptToAnswer
from edgetune.validation.choices import log_likelihoods

_MAX_TOKENS = 256  # of an answer, where the task states none; as in HFLM
Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""((context, continuation), their token ids), as the harness passes them."""


@dataclass(frozen=True)
class PromptSettings:
    """What all models of an evaluation share, so that their prompts are the same."""

    context: int
    """Tokens that a prompt and its answer may have together."""
    prefix_token: int
    """The token before a text without context."""
    chat_template: ChatTemplate | None
    """Renders the prompts, if a chat template is applied."""


class HarnessModel(TemplateLM):  # type: ignore[misc]  # lm_eval is not typed
    """A model of edgetune in the harness.

    Attributes:
        prompt_digests: A digest of the token ids of each request, in the order of the calls.
        truncated: Requests that were cut on the left.
    """

    backend = "causal"

    def __init__(self, model: EvaluatedModel, settings: PromptSettings, progress: Progress) -> None:
        """Let the harness call `model`; `progress` is called with (evaluated, all) requests of each kind."""
        super().__init__()
        self._model, self._settings, self._progress = model, settings, progress
        self.prompt_digests: list[bytes] = []
        self.truncated = 0

    @property
    def eot_token_id(self) -> int:
        """The token before a text without context; HFLM too uses EOS only where there is no BOS."""
        return self._settings.prefix_token

    @property
    def max_length(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._settings.context

    @property
    def tokenizer_name(self) -> str:
        """A name for the harness's request caches, which edgetune does not use."""
        return self._model.name

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Return token ids, with BOS if the model wants it and `add_special_tokens` is not False."""
        ids = self._model.tokenize(string)
        if add_special_tokens is False and self._added_prefix and ids[: len(self._added_prefix)] == self._added_prefix:
            return ids[len(self._added_prefix) :]
        return ids

    @property
    def _added_prefix(self) -> list[int]:
        """The tokens before every text: BOS or nothing."""
        return self._model.tokenize("")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return the conversation up to where the answer begins; without generation prompt, inside its last turn."""
        template = self._settings.chat_template
        assert template is not None
        if add_generation_prompt:
            return template.render(chat_history, add_generation_prompt=True)
        begun = template.render(chat_history[:-1], add_generation_prompt=True)
        return begun + chat_history[-1]["content"]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Return the Jinja text of the template that is applied."""
        template = self._settings.chat_template
        return template.source if template is not None and chat_template else None

    # -- log-likelihoods -----------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Return (log-likelihood of the continuation, whether greedy decoding gives it) of each request."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each whole text; a long one is divided into windows, each token scored once."""
        windows: list[Scored] = []
        counts = []
        for request in requests:
            rolled = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]), prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length, context_len=1,
            )  # fmt: skip
            own: list[Scored] = [(None, *make_disjoint_window(pair)) for pair in rolled]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        return [sum(next(scores)[0] for _ in range(count)) for count in counts]

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """Score continuations. Requests that differ in the last token alone share one evaluation."""
        shared: dict[tuple[tuple[int, ...], int], list[tuple[int, list[int]]]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            self._note(context + continuation)
            seen = self._fitting(context, continuation)
            shared.setdefault((tuple(seen), len(continuation)), []).append((index, continuation))
        results = [(0.0, True)] * len(requests)
        groups = [(list(seen), count, members) for (seen, count), members in shared.items() if count]
        texts = [
            (np.asarray([*seen, members[0][1][-1]], np.int32), np.arange(len(seen) + 1 - count, len(seen) + 1))
            for seen, count, members in groups
        ]
        done = 0
        for index, scores in self._score(texts, [[ids for _, ids in members] for *_, members in groups]):
            members = groups[index][2]
            for (request, _), score in zip(members, scores, strict=True):
                results[request] = score
            done += len(members)
            self._progress(done, len(requests))
        return results

    def _fitting(self, context: list[int], continuation: list[int]) -> list[int]:
        """Return all tokens but the last, cut on the left where they do not fit."""
        if len(continuation) > self.max_length:
            raise DataError(
                f"a task has a continuation of {len(continuation)} tokens, but the context is {self.max_length}",
                "Ask for more with --context",
            )
        whole = context + continuation
        self.truncated += len(whole) > self.max_length + 1
        return whole[-(self.max_length + 1) :][:-1]

    def _score(
        self, texts: list[tuple[NDArray[np.int32], NDArray[np.int64]]], targets: list[list[list[int]]]
    ) -> Iterator[tuple[int, list[tuple[float, bool]]]]:
        """Yield (index of the text, scores of its continuations), in any order."""
        sums = [[0.0] * len(each) for each in targets]
        greedy = [[True] * len(each) for each in targets]
        positions = [0] * len(texts)
        for index, logits in self._model.score_batch(texts):
            start, stop = positions[index], positions[index] + len(logits)
            positions[index] = stop
            best = logits.argmax(axis=1)
            for number, continuation in enumerate(targets[index]):
                wanted = np.asarray(continuation[start:stop])
                sums[index][number] += float(log_likelihoods(logits, wanted).sum())
                greedy[index][number] &= bool((best == wanted).all())
            if stop == len(texts[index][1]):
                yield index, list(zip(sums[index], greedy[index], strict=True))

    # -- answers -------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return the greedy answer to each request."""
        prompts = [self._prompt(request) for request in requests]
        order = sorted(range(len(prompts)), key=lambda index: -len(prompts[index].ids))
        answers = [""] * len(prompts)
        generated = self._model.answer([prompts[index] for index in order])
        for done, (index, text) in enumerate(zip(order, generated, strict=True), 1):
            answers[index] = text
            self._progress(done, len(prompts))
        return answers

    def _prompt(self, request: Any) -> PromptToAnswer:
        text, stated = request.args
        options = normalize_gen_kwargs(stated, _MAX_TOKENS)
        if options["do_sample"]:
            raise ConfigError(
                f"the task {request.task_name} samples its answers (temperature {options.get('temperature')}), and "
                "samples of two models cannot be compared",
                "Copy its YAML with `do_sample: false` into a folder, and give that with --include-path",
            )
        room = self.max_length - options["max_gen_toks"]
        if room <= 0:
            raise ConfigError(
                f"the task {request.task_name} generates up to {options['max_gen_toks']} tokens, but the context is "
                f"{self.max_length}",
                "Ask for more with --context",
            )
        ids = self.tok_encode(text)
        self._note(ids)
        self.truncated += len(ids) > room
        until = options.get("until") or []
        return PromptToAnswer(ids[-room:], tuple([until] if isinstance(until, str) else until), options["max_gen_toks"])

    def _note(self, ids: list[int]) -> None:
        self.prompt_digests.append(hashlib.sha256(np.asarray(ids, np.int32).tobytes()).digest()[:8])
