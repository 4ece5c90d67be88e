"""Everything about a run that is known, and checked, before torch is imported."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from edgetune import console
from edgetune.config import Config
from edgetune.data.chat import ChatTemplate
from edgetune.data.dataset import EncodedSplit, Splits, encode_all, read_splits
from edgetune.data.formats import Conversation
from edgetune.data.masks import EncodedRow
from edgetune.data.preview import format_totals
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import DataError
from edgetune.planning.base_model import Base, check_exportable, find_base
from edgetune.validation.answers import CHOICE, answer_matches
from edgetune.validation.sample_size import caution


@dataclass(frozen=True)
class PreparedRun:
    """Everything that is known before the first step."""

    config: Config
    base: Base
    template: ChatTemplate
    tokenizer: TextTokenizer
    splits: Splits
    train: EncodedSplit
    validation: EncodedSplit
    pad_id: int
    pad_reason: str

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the base's stop tokens and those with which the template ends its turns."""
        return self.tokenizer.stop_ids | self.train.turn_ends

    @property
    def data_identity(self) -> dict[str, Any]:
        """The manifest's `data`: what identifies the sources of each split, and the rows that came of them."""
        rows = {"train": self.train.sha256, "validation": self.validation.sha256}
        return {**self.splits.identity, "formats": self.splits.formats, "rows": rows}

    @property
    def reference_rows(self) -> list[EncodedRow]:
        """Held-out rows whose log-probabilities are stored."""
        return self.validation.rows[: self.config.reference.rows]

    @property
    def trained_held_out(self) -> int:
        """Held-out rows that are, token by token, training rows as well."""
        trained = {tuple(row.input_ids) for row in self.train.rows}
        return sum(tuple(row.input_ids) in trained for row in self.validation.rows)

    @property
    def task_rows(self) -> list[Conversation]:
        """Test rows up to the last assistant turn, which is the expected answer."""
        found = []
        for conversation in self.splits.test:
            last = max(i for i, message in enumerate(conversation) if message["role"] == "assistant")
            found.append(conversation[: last + 1])
        return found[: self.config.reference.task_rows]


def prepare_run(config: Config) -> PreparedRun:
    """Read and check base, template, tokenizer and data. Imports no torch; any of edgetune's errors may be raised."""
    base = find_base(config)
    template = ChatTemplate.from_directory(base.path, config.data.chat_template)
    check_exportable(base, config, template.source)
    tokenizer = TextTokenizer.from_directory(base.path)
    splits = read_splits(config.data, config.training.seed)
    train = encode_all(template, tokenizer, splits.train, config.training.max_length)
    validation = encode_all(template, tokenizer, splits.validation, config.training.max_length)
    pad_id, pad_reason = tokenizer.choose_pad()
    plan = PreparedRun(config, base, template, tokenizer, splits, train, validation, pad_id, pad_reason)
    _check_choices(config, plan)
    for row in plan.task_rows:  # an expected answer that cannot be compared is found now, not after training
        answer_matches(config.data.answer, row[-1]["content"], "")
    return plan


def _check_choices(config: Config, plan: PreparedRun) -> None:
    """DataError when a right answer is none of the choices."""
    if config.data.answer != CHOICE:
        return
    wrong = next((row[-1]["content"] for row in plan.task_rows if row[-1]["content"] not in config.data.choices), None)
    if wrong is not None:
        raise DataError(
            f"the expected answer {wrong[:60]!r} is none of data.choices", f"They are {', '.join(config.data.choices)}."
        )


def print_overview(plan: PreparedRun) -> None:
    """Say what will be trained on."""
    console.note(f"base {plan.base.name}; {', '.join(plan.splits.formats)} rows")
    console.note(f"training: {format_totals(plan.train)}")
    console.note(f"held out: {format_totals(plan.validation)}")
    silent = sum(len(row.scored) < 2 for row in plan.train.rows)
    if silent:
        console.warn(
            f"{silent} of {len(plan.train.rows)} training rows have an empty answer, or one cut to a single token; "
            "`edgetune preview --rows N` shows the first N"
        )
    seen = plan.trained_held_out
    if seen:
        console.warn(
            f"{seen} of {len(plan.validation.rows)} held-out rows are trained on too: evaluation loss and gates look "
            "better than they are; give data.validation other rows, or leave duplicates out of data.train"
        )
    doubt = caution(len(plan.reference_rows), sum(len(row.scored) for row in plan.reference_rows))
    if doubt:
        console.warn(f"{doubt}; give data.validation more rows, or raise data.validation_fraction or reference.rows")
    for encoding in (plan.train, plan.validation):
        if encoding.rewritten:
            console.note(f"each assistant turn became a row of its own, since {encoding.rewritten}")
            break
    unknown = plan.train.turn_ends - plan.tokenizer.stop_ids
    if unknown:
        names = ", ".join(plan.tokenizer.text_of(id_) for id_ in sorted(unknown))
        console.warn(f"the template ends turns with {names}, which the base does not declare as a stop token")
