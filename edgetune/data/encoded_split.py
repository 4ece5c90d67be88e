"""The encoded rows of a split, and what was counted while they were encoded."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.fitting import KeyUsage
from edgetune.data.masks import EncodedRow
from edgetune.data.objective_rows import LabelledRows, PairRows, PromptRows
from edgetune.data.row_store import RowStore
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.data.trailing import TrailingTurns
from edgetune.data.written_tokens import WrittenTokens


@dataclass
class EncodedSplit:
    """The encoded rows of a split, and counts from the encoding.

    `rows` and `chats` hold good answers whatever the objective, so that reference, golden conversations and ladder are
    the same for all: of pairs the chosen answers, of labelled answers the desirable ones, of prompts the answers that
    their columns state, of plain text the blocks.
    """

    rows: EncodedRows = field(default_factory=EncodedRows)
    chats: RowStore = field(default_factory=RowStore)
    """The rows without a problem, as the template renders them."""
    tasks: list[str] = field(default_factory=list)
    """The task of each row; empty where `data.columns.task` names no key."""
    pairs: PairRows = field(default_factory=PairRows)
    """Preference pairs; empty for other objectives."""
    labelled: LabelledRows = field(default_factory=LabelledRows)
    """Labelled answers; empty for other objectives."""
    prompts: PromptRows = field(default_factory=PromptRows)
    """Prompts that are answered during training; empty for other objectives."""
    usage: KeyUsage = field(default_factory=KeyUsage)
    untrained_turns: int = 0
    """Assistant turns that flags of the rows exclude from the loss."""
    truncated: int = 0
    longest_uncut: int = 0
    dropped: int = 0
    """Rows without a supervised token after the cut."""
    split: int = 0
    """Conversations that became one row per assistant turn."""
    completed: int = 0
    """Answers whose prompt opens a thought that the template leaves out of the answer, and that is ended there."""
    blank: int = 0
    """Answers that are white space only, and are not tool calls or reasoning."""
    blank_example: str = ""
    """The place of the first of them."""
    split_reason: str | None = None
    """Why the first of them did, in words."""
    trailing: TrailingTurns = field(default_factory=TrailingTurns)
    written: WrittenTokens = field(default_factory=WrittenTokens)
    """Special tokens that messages hold as text."""
    dropped_example: str | None = None
    texts: int = 0
    """Documents of plain text that were packed into the rows."""
    pending_text: list[int] = field(default_factory=list)
    """Tokens of plain text that fill no block yet."""
    turn_ends: set[int] = field(default_factory=set)
    """Tokens that end the assistant's turns and are trained on."""

    @property
    def items(self) -> int:
        """Number of pairs, labelled answers, prompts, documents or conversations."""
        kinds = (len(self.pairs), len(self.labelled), len(self.prompts), self.texts)
        return next((count for count in kinds if count), len(self.chats))

    @property
    def examples(self) -> int:
        """Number of what an epoch passes over: pairs, labelled answers, prompts or rows."""
        return len(self.pairs) or len(self.labelled) or len(self.prompts) or len(self.rows)

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return self.rows.tokens

    @property
    def supervised(self) -> int:
        """Number of tokens that are trained on."""
        return self.rows.trained

    @property
    def longest(self) -> int:
        """Length of the longest row, of a rejected or undesirable answer too."""
        return max(rows.longest for rows in self.trained_rows)

    @property
    def trained_rows(self) -> list[EncodedRows]:
        """All rows that the model reads in training: of pairs those of both answers, of labels good and bad ones."""
        if self.labelled:
            return [self.labelled.answers.rows]
        return [self.rows, self.pairs.rejected.rows]

    @property
    def sha256(self) -> str:
        """Hash of everything that training sees: the token ids of each row, and which of them are trained on."""
        digest = hashlib.sha256()
        for row in (*self.rows, *self.pairs.rejected.rows, *self.labelled.answers.rows):
            digest.update(array("q", [len(row.input_ids), *row.input_ids]).tobytes() + bytes(row.supervised))
        digest.update("\0".join(self.tasks).encode())
        for labelled in self.labelled:
            digest.update(bytes([labelled.label]))
        for prompt in self.prompts:
            digest.update(array("q", prompt.prompt_ids).tobytes() + repr(prompt.columns).encode())
        return digest.hexdigest()

    def summary(self) -> dict[str, int]:
        """Return the counts for the manifest."""
        return {
            "rows": len(self.rows), "tokens": self.tokens, "supervised_tokens": self.supervised,
            "longest": self.longest, "truncated": self.truncated, "dropped": self.dropped, "split": self.split,
            **self._counts_of_objective(),
        }  # fmt: skip

    def _counts_of_objective(self) -> dict[str, int]:
        if self.pairs:
            return {"pairs": len(self.pairs)}
        if self.labelled:
            return {"labelled": len(self.labelled), "desirable": self.labelled.desirable}
        counts = {"prompts": len(self.prompts), "documents": self.texts}
        return {name: count for name, count in counts.items() if count}

    def add_row(self, row: EncodedRow, max_length: int, tokenizer: TextTokenizer) -> None:
        """Cut a row at `max_length` tokens and add it; count it as dropped if nothing that is trained on is left."""
        cut = row.cut(max_length)
        self.count_length(len(row.input_ids), max_length)
        if True in cut.supervised:
            self.rows.append(cut)
            self.turn_ends |= cut.endings & tokenizer.ending_ids
        else:
            self.drop(cut, tokenizer)

    def count_length(self, length: int, max_length: int) -> None:
        """Count a row that is cut, and the longest one before the cut."""
        self.truncated += length > max_length
        self.longest_uncut = max(self.longest_uncut, length)

    def drop(self, row: EncodedRow, tokenizer: TextTokenizer) -> None:
        """Count a row that is left out for want of a token that is trained on."""
        self.dropped += 1
        self.dropped_example = self.dropped_example or tokenizer.decode(row.input_ids)[:200]
