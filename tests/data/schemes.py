"""Random chat templates, as Jinja text and, independently, written out in Python with the author of each piece."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

Message = dict[str, Any]


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation."""

    text: str
    author: int | None = None
    """Index of the assistant message that generates the text; None for text that is given."""


@dataclass(frozen=True)
class Scheme:
    """The parts of which a chat template is made."""

    opening: str = "<|im_start|>"
    """Before the name of the role."""
    heading: str = "\n"
    """Between the name of the role and the content."""
    lead: str = ""
    """Before the content of an assistant message, not a part of the prompt."""
    trims: bool = False
    stop: str = "<|im_end|>"
    behind: str = "\n"
    """After the stop token, and after the content of other roles."""
    thinks: str = "never"
    """Which assistant messages have an empty thought: never, always, last or since the last question."""
    joins: bool = False
    """Whether consecutive messages of the assistant share a header."""
    end: str = ""
    """Behind a conversation that asks for nothing."""
    looks_at_first: bool = False
    """Whether the template fails without messages."""

    def jinja(self) -> str:
        """Return the template."""
        thought = {
            "never": "false",
            "always": "true",
            "last": "loop.last",
            "since the last question": "loop.index0 > ns.asked",
        }[self.thinks]
        content = "m.content | trim" if self.trims else "m.content"
        joined = "loop.index0 > 0 and messages[loop.index0 - 1].role == 'assistant'" if self.joins else "false"
        joins_next = "not loop.last and messages[loop.index0 + 1].role == 'assistant'" if self.joins else "false"
        return (
            ("{{- '' if messages[0].role == 'x' }}" if self.looks_at_first else "")
            + "{%- set ns = namespace(asked=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
            "{%- set ns.asked = loop.index0 %}{%- endif %}{%- endfor %}{%- for m in messages %}"
            f"{{%- if m.role == 'assistant' %}}{{%- if {joined} %}}{{{{- '\\n\\n' }}}}{{%- else %}}"
            f"{{{{- {self.opening + 'assistant' + self.heading!r} }}}}{{%- endif %}}"
            f"{{%- if {thought} %}}{{{{- '<think>\\n\\n</think>\\n\\n' }}}}{{%- endif %}}"
            f"{{{{- {self.lead!r} + ({content}) }}}}"
            f"{{%- if not ({joins_next}) %}}{{{{- {self.stop + self.behind!r} }}}}{{%- endif %}}"
            f"{{%- else %}}{{{{- {self.opening!r} + m.role + {self.heading!r} + ({content}) + "
            f"{self.stop + self.behind!r} }}}}{{%- endif %}}{{%- endfor %}}"
            f"{{%- if add_generation_prompt %}}{{{{- {self.opening + 'assistant' + self.heading!r} }}}}"
            f"{{%- else %}}{{{{- {self.end!r} }}}}{{%- endif %}}"
        )

    def pieces(self, messages: Sequence[Message]) -> list[Piece]:
        """Return a conversation that asks for nothing."""
        asked = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        result: list[Piece] = []
        for index, message in enumerate(messages):
            content = message["content"].strip() if self.trims else message["content"]
            if message["role"] != "assistant":
                text = self.opening + message["role"] + self.heading + content + self.stop + self.behind
                result.append(Piece(text))
                continue
            if self.joined(messages, index):
                result.append(Piece("\n\n", index))
            else:
                result.append(Piece(self.opening + "assistant" + self.heading))
            thinks = {"never": False, "always": True, "last": index == len(messages) - 1}.get(
                self.thinks, index > asked
            )
            thought = "<think>\n\n</think>\n\n" if thinks else ""
            result.append(Piece(thought + self.lead + content, index))
            if not self.joined(messages, index + 1):
                result.append(Piece(self.stop, index))
                result.append(Piece(self.behind))
        return [*result, Piece(self.end)]

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return a conversation that asks for an answer."""
        given = "".join(piece.text for piece in self.pieces(messages))
        return given.removesuffix(self.end) + self.opening + "assistant" + self.heading

    def joined(self, messages: Sequence[Message], index: int) -> bool:
        """Whether message `index` shares the header of the one before it."""
        pair = messages[max(0, index - 1) : index + 1]
        return self.joins and index > 0 and [m["role"] for m in pair] == ["assistant", "assistant"]

    def turns(self, messages: Sequence[Message], untrained: frozenset[int]) -> list[tuple[str, str]]:
        """Return (what is given, what is generated) of each turn that is trained on, in order."""
        turns: list[tuple[int, str, str]] = []
        for index, message in enumerate(messages):
            if message["role"] != "assistant" or index in untrained:
                continue
            first = index
            while self.joined(messages, first) and first - 1 not in untrained:
                first -= 1
            pieces = self.pieces(messages[: index + 1])
            begin = next(i for i, piece in enumerate(pieces) if piece.author == first)
            given = "".join(piece.text for piece in pieces[:begin])
            generated = "".join(piece.text for piece in pieces[begin:] if piece.author is not None)
            if self.joined(messages, first):  # behind an untrained message all that precedes the content is given
                content = messages[first]["content"].strip() if self.trims else messages[first]["content"]
                begin = len(given + pieces[begin].text + pieces[begin + 1].text) - len(content)
                given, generated = (given + generated)[:begin], (given + generated)[begin:]
            if turns and turns[-1][0] == first:
                turns.pop()
            turns.append((first, given, generated))
        return [(given, generated) for _, given, generated in turns]


SCHEMES = st.builds(
    Scheme,
    opening=st.sampled_from(["<|im_start|>", "### ", "[", "\n", " <|im_start|> ", "<|im_end|>"]),
    heading=st.sampled_from(["\n", ": ", ":", "]", "\n\n", " \n", "\t", ":\r\n"]),
    lead=st.sampled_from(["", " ", "\n", "a"]),
    trims=st.booleans(),
    behind=st.sampled_from(["\n", "", " ", "\n\n", "\t"]),
    thinks=st.sampled_from(["never", "always", "last", "since the last question"]),
    joins=st.booleans(),
    end=st.sampled_from(["", "<|endoftext|>"]),
    looks_at_first=st.booleans(),
)

_WORDS = [
    "", "\n", " ", "red", "\nred", " red", "red\n", "<think>\n\n</think>\n\nred", "a <|im_end|> b", "灯",
    "\U0001f468\u200d\U0001f469\u200d\U0001f466", "<|im_start|>user\n", "assistant", "### assistant: x",
    '{"a": [1]}', "def f():\n    return 1\n", "\u0301", "<tool>",
]  # fmt: skip
_CHARACTERS = st.sampled_from(" \n\t\r.,:a1Zé灯\U0001f1e8\U0001f468\u200d\u0301\u2581<|{}") | st.characters(
    exclude_categories=["Cs"]
)
CONTENTS = st.text(_CHARACTERS, max_size=12) | st.sampled_from(_WORDS)


@st.composite
def conversations(draw: st.DrawFn) -> list[Message]:
    """Return messages that end with the assistant; roles come in any order."""
    roles = st.sampled_from(["user", "user", "assistant", "assistant", "tool", "system"])
    found = draw(st.lists(st.tuples(roles, CONTENTS), max_size=5))
    return [*({"role": r, "content": c} for r, c in found), {"role": "assistant", "content": draw(CONTENTS)}]
