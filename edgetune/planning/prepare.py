"""The inputs of a training: read, checked and encoded before torch is imported."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from edgetune import console
from edgetune.config import Config
from edgetune.data.answer_frame import find_frame
from edgetune.data.chat import ChatTemplate
from edgetune.data.continuation import continue_ids
from edgetune.data.dataset import EncodedSplit, Splits, encode_all, read_splits
from edgetune.data.fitting import KeyUsage
from edgetune.data.masks import EncodedRow
from edgetune.data.preview import (
    format_blank,
    format_moment,
    format_skipped,
    format_split,
    format_totals,
    format_unused,
    one_sided_labels,
)
from edgetune.data.problems import RowProblems
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.data.trailing import TrailingTurns
from edgetune.data.written_tokens import WrittenTokens
from edgetune.errors import ConfigError, DataError
from edgetune.planning.base_model import Base, find_base
from edgetune.planning.context_checks import check_rows, fitting_prompts, fitting_tasks, without_virtual_tokens
from edgetune.planning.disk import dequantized_bytes
from edgetune.planning.export_checks import check_exportable
from edgetune.planning.golden_conversations import build_contract
from edgetune.planning.optimizers import check_optimizer
from edgetune.planning.rewards import check_generation, leftover_prompts
from edgetune.planning.row_tasks import check_task_options, keep_held_out_task
from edgetune.planning.task_rows import RenderedPrompt, TaskRow, greedy_prompts, prepare_task_rows
from edgetune.planning.tokenizer_files import template_files
from edgetune.validation.sample_size import caution
from edgetune_converters.files.companions import tokenizer_notes
from edgetune_converters.files.contents import sha256_of


@dataclass(frozen=True)
class PreparedRun:
    """The validated inputs of a training."""

    config: Config
    base: Base
    template: ChatTemplate
    tokenizer: TextTokenizer
    splits: Splits
    train: EncodedSplit
    validation: EncodedSplit
    pad_id: int
    pad_reason: str
    task: list[TaskRow] = field(default_factory=list)
    """The test rows that base and trained model answer."""
    greedy_prompts: list[RenderedPrompt] = field(default_factory=list)
    """Token ids of the held-out prompts that the trained model answers greedily."""
    problems: RowProblems = field(default_factory=RowProblems)
    """The rows that are left out (data.on_bad_row: skip)."""
    usage: KeyUsage = field(default_factory=KeyUsage)
    """Keys of all rows that are neither rendered nor used."""
    trailing: TrailingTurns = field(default_factory=TrailingTurns)
    """Rows of all splits that do not end with the assistant."""
    written: WrittenTokens = field(default_factory=WrittenTokens)
    """Special tokens that messages of all splits hold as text."""

    @cached_property
    def contract(self) -> list[dict[str, Any]]:
        """Golden conversations that exported files must render and tokenize in the same way."""
        return build_contract(self.template, self.tokenizer, self.splits.validation)

    @property
    def rendered_at(self) -> str | None:
        """The time that the template printed (ISO 8601, local); None for a template that does not ask for it."""
        is_read = self.template.clock.is_read or any("rendered_at" in entry for entry in self.contract)
        return str(self.template.clock) if is_read else None

    @property
    def stop_ids(self) -> frozenset[int]:
        """Tokens that end an answer: the stop tokens of the base, and the last tokens of the template's turns."""
        return self.tokenizer.stop_ids | self.train.turn_ends

    @cached_property
    def data_identity(self) -> dict[str, Any]:
        """The `data` entry of the manifest: the sources of each split, and the hashes of the encoded rows."""
        rows = {"train": self.train.sha256, "validation": self.validation.sha256}
        skipped = {"skipped": {"count": self.problems.count, "rows": self.problems.rows}} if self.problems.count else {}
        moment = {"rendered_at": self.rendered_at} if self.rendered_at else {}
        hashes = {file.name: sha256_of(file) for file in self.config.objective.files()}
        files = {"objective_files": hashes} if hashes else {}
        return {**self.splits.identity, "formats": self.splits.formats, "rows": rows, **skipped, **moment, **files}

    @property
    def reference_rows(self) -> list[EncodedRow]:
        """Held-out rows whose log-probabilities are stored."""
        return self.validation.rows[: self.config.reference.rows]

    @property
    def steps(self) -> int:
        """Number of optimizer steps, as the trainer counts them."""
        training = self.config.training
        if training.max_steps is not None:
            return training.max_steps
        epoch = self.config.objective.steps_per_epoch(self.train.examples, training.batching)
        return math.ceil(training.epochs * epoch)

    @property
    def duplicated_held_out(self) -> int:
        """Number of held-out rows whose tokens are also those of a training row."""
        trained = set(self.train.rows.digests())
        return sum(digest in trained for digest in self.validation.rows.digests())

    def tokens_before_answer(self, golden: Mapping[str, Any]) -> list[int]:
        """Return the tokens that the template writes between a golden prompt and the answer."""
        template = self.template.with_options(golden.get("options", {}))
        frame = find_frame(template, golden["messages"], golden.get("tools"))
        return continue_ids(
            lambda text: self.tokenizer.encode(text)[0], self.tokenizer.decode, golden["text"], golden["ids"],
            frame.given, self.tokenizer.stop_texts,
        )  # fmt: skip


def prepare_run(config: Config, rendered_at: str | None = None, *, trains: bool = True) -> PreparedRun:
    """Read and check base model, template, tokenizer and data, without torch.

    Args:
        config: The configuration.
        rendered_at: The time that the template is told (ISO 8601), of a run that exists. Default: now.
        trains: Whether a training follows, whose number of steps is checked.

    Raises:
        EdgetuneError: For anything in them that training, capture or export would reject later.
    """
    check_optimizer(config)
    if unused := list(_unused_options(config)):
        raise ConfigError.of_many("options have no effect", unused, "docs/configuration.md says what reads an option")
    check_task_options(config)
    base = find_base(config)
    template = ChatTemplate.from_directory(base.directory, config.data.chat_template, config.template.options)
    template = template.at(rendered_at or datetime.now().replace(microsecond=0))
    check_exportable(base, config, template.source)
    template_files(base.directory, template)
    tokenizer = TextTokenizer.from_directory(base.directory, base.rows)
    problems = RowProblems(skip=config.data.on_bad_row == "skip")
    splits = keep_held_out_task(config, read_splits(config.data, config.training.seed, problems, config.objective.kind))
    length = config.training.max_length
    train = encode_all(template, tokenizer, splits.train, length, problems)
    validation = encode_all(template, tokenizer, splits.validation, length, problems)
    test = prepare_task_rows(template, tokenizer, splits.test, config.data, config.reference.task_rows, problems)
    greedy = greedy_prompts(template, tokenizer, validation.chats, problems)
    context = base.context
    if context:
        context = without_virtual_tokens(config, context)
        test.used = fitting_tasks(config, context, test.used, problems)
        greedy = fitting_prompts(config, context, greedy)
    problems.raise_if_any()
    check_generation(config, context, train.prompts, validation.prompts)
    if config.reference.long and not context:
        raise ConfigError("reference.long: the base does not state its context length", "Set reference.long: false")
    if context:
        check_rows(config, context, train, validation)
    splits = replace(splits, train=train.chats, validation=validation.chats, test=test.chats)
    pad_id, pad_reason = tokenizer.choose_pad()
    usage = train.usage.merge([validation.usage, test.usage])
    prepared = PreparedRun(
        config, base, template, tokenizer, splits, train, validation, pad_id, pad_reason, test.used, greedy,
        problems, usage, train.trailing.merge([validation.trailing, test.trailing]),
        train.written.merge([validation.written, test.written]),
    )  # fmt: skip
    if trains and (why := config.adapter.why_not_steps(prepared.steps)):
        raise ConfigError(f"adapter.kind: {config.adapter.kind}: {why}", "Train longer, or lower these numbers")
    return prepared


def _unused_options(config: Config) -> Iterator[str]:
    """Yield the stated options that no part of a training or of its export would read, each a sentence."""
    yield from config.adapter.unused_options()
    quantization, export = config.quantization, config.export
    if quantization.bits != 4:
        for option in ("type", "double_quant"):
            value = getattr(quantization, option)
            if value != _default(quantization, option):
                yield (
                    f"quantization.{option} is {str(value).lower()}, and quantization.bits: 4 alone reads it; set "
                    f"that, or leave out quantization.{option}"
                )
    training = config.training
    if training.scheduler == "constant" and training.warmup_ratio not in (0, _default(training, "warmup_ratio")):
        yield (
            f"training.warmup_ratio is {training.warmup_ratio:g}, and training.scheduler: constant has no warm-up; set "
            "training.scheduler: constant_with_warmup, or leave out training.warmup_ratio"
        )
    for option in ("score_difference_max", "pair_flips_max"):
        if getattr(config.gate, option) is not None and not config.objective.facts.is_scorer:
            yield (
                f"gate.{option} limits the scores of a reward model, and objective.kind: {config.objective.kind} "
                "trains none, so that the gate could not be passed; leave it out"
            )
    if config.gate.task_drop_max is not None and not (config.data.test and config.reference.task_rows):
        missing = "there is no data.test" if config.reference.task_rows else "reference.task_rows is 0"
        yield (
            f"gate.task_drop_max limits the drop of the task score, and {missing}, so that the gate could not be "
            "passed; give test rows, or leave it out"
        )
    for option in ("adapter_weights", "combine", "density", "combine_seed", "combine_rank"):
        if getattr(export, option) != _default(export, option):
            yield (
                f"export.{option} is for several adapters, and a run has one; leave it out, and combine adapters with "
                "`edgetune merge-export --base DIR --adapter DIR --adapter DIR`"
            )


def _default(section: Any, option: str) -> Any:
    return type(section).model_fields[option].default


def print_overview(prepared: PreparedRun) -> None:
    """Print what will be trained on, and a warning for each doubtful property of the rows."""
    config = prepared.config
    console.note(
        f"base {prepared.base.name}; {', '.join(prepared.splits.formats)} rows; "
        f"{config.adapter.title}, {config.objective.facts.title}"
    )
    base = prepared.base
    of_base = [*base.notes, *base.layers.notes, *tokenizer_notes(base.directory, base.checkpoint.config)]
    for note in [*of_base, *prepared.splits.notes]:
        console.note(note)
    if size := dequantized_bytes(base.checkpoint):
        console.note(
            f"the base is a GGUF file: training starts from its dequantized weights, {size / 2**20:.0f} MiB on "
            "the disk of the run while they are loaded"
        )
    console.note(f"training: {format_totals(prepared.train)}")
    console.note(f"held out: {format_totals(prepared.validation)}")
    for line in (*prepared.trailing.describe(), *format_unused(prepared.usage)):
        console.note(line)
    if prepared.template.tool_use is not None:
        console.note(_describe_tool_use(prepared))
    if prepared.rendered_at:
        console.note(format_moment(prepared.rendered_at))
    for warning in _warnings(prepared):
        console.warn(warning)
    if left := leftover_prompts(config, len(prepared.train.prompts)):
        console.note(left)
    for line in format_split(prepared.train) or format_split(prepared.validation):
        console.note(line)


def _describe_tool_use(prepared: PreparedRun) -> str:
    if prepared.template.tool_use == prepared.template.source:
        return "data.chat_template also replaces the base's template tool_use, which is used for rows with tools"
    chats = (*prepared.splits.train, *prepared.splits.validation, *prepared.splits.test)
    count = sum(row.tools is not None for row in chats)
    return f"the base has a template tool_use, which is used for rows with tools ({count} rows), as in transformers"


def _warnings(prepared: PreparedRun) -> Iterator[str]:
    rows, held_out = prepared.train.rows, prepared.validation.rows
    if prepared.problems.count:
        yield "\n  - ".join(format_skipped(prepared.problems))
    empty = sum(len(row.scored) < 2 for row in rows)
    if empty > prepared.train.blank:
        yield (
            f"{empty} of {len(rows)} training rows have an empty answer, or one cut to a single token; "
            "`edgetune preview --rows N` shows the first N"
        )
    if prepared.duplicated_held_out:
        yield (
            f"{prepared.duplicated_held_out} of {len(held_out)} held-out rows are trained on too: evaluation loss and "
            "gates look better than they are; give data.validation other rows, or remove the duplicates from data.train"
        )
    yield from (*format_blank(prepared.train), *prepared.written.describe(), *one_sided_labels(prepared.train))
    yield from warnings_of_held_out(prepared)


def warnings_of_held_out(prepared: PreparedRun) -> Iterator[str]:
    """Yield a warning for each doubtful property of the held-out rows and of the template."""
    if prepared.validation.labelled and not prepared.validation.labelled.desirable:
        yield (
            "no held-out answer is desirable, so reference and ladder measure undesirable ones, which training should "
            "make less likely; give data.validation rows with desirable answers, or raise data.validation_fraction"
        )
    doubt = caution(len(prepared.reference_rows), sum(len(row.scored) for row in prepared.reference_rows))
    if doubt:
        yield f"{doubt}; give data.validation more rows, or raise data.validation_fraction or reference.rows"
    if header := _header_left_to_model(prepared):
        yield (
            f"the chat template writes no generation prompt, so the model has to begin each answer with {header!r}, "
            "which is trained on: a template that reads add_generation_prompt would give it"
        )
    undeclared = prepared.train.turn_ends - prepared.tokenizer.stop_ids
    if undeclared:
        names = ", ".join(prepared.tokenizer.text_of(id_) for id_ in sorted(undeclared))
        yield f"the template ends turns with {names}, which the base does not declare as a stop token"


def _header_left_to_model(prepared: PreparedRun) -> str:
    """Return the text before an answer that no prompt holds, if the template ignores add_generation_prompt."""
    row = next((row for row in prepared.splits.train if row.answers), None)
    if row is None:
        return ""
    template = prepared.template.with_options(row.options)
    before = row.messages[: row.answers[0]]
    try:
        is_ignored = template.render(before, tools=row.tools, add_generation_prompt=True) == template.render(
            before, tools=row.tools
        )
        return find_frame(template, before, row.tools).prefix.strip() if is_ignored and before else ""
    except DataError:  # the template renders no conversation that ends with the user
        return ""
