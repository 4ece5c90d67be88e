"""The typed configuration of a run: one declaration for each option, read from YAML and `--set key=value`.

The docstring of a field is its documentation: docs/configuration.md and the flags of `merge-export` are generated from
it. Relative paths are relative to the configuration file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar

from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from edgetune.errors import ConfigError
from edgetune.methods import NAMES_OF_OPTIONS, NOT_TRAINED, AdapterConfig, Lora
from edgetune.methods.base import Surroundings
from edgetune.objectives import OTHER_NAMES, Batching, ObjectiveConfig, Sft
from edgetune.section import (
    Contradictions,
    Ratio,
    Section,
    absolute_name,
    apply_override,
    describe_all,
    override_of,
    read_yaml,
)
from edgetune_converters.names import AUTO, NF4, ORIGINAL, CombineName, FormatName, MergeBaseOption

Parsed = TypeVar("Parsed", bound=BaseModel)
_OTHER_KINDS = {"adapter": {**NOT_TRAINED, **NAMES_OF_OPTIONS}, "objective": OTHER_NAMES}


class ColumnsConfig(Section):
    """Keys of rows by hand, where docs/data.md does not list them. They come before the usual names."""

    messages: str | None = None
    """The list of messages of a row."""
    role: str | None = None
    """The role of a message."""
    content: str | None = None
    """The text of a message."""
    user: str | None = None
    """The question, in rows without a list of messages."""
    input: str | None = None
    """A text that follows the question after a line break."""
    assistant: str | None = None
    """The answer, in rows without a list of messages."""
    system: str | None = None
    """The system prompt of a row."""
    tools: str | None = None
    """The tools of a row."""
    chosen: str | None = None
    """The better answer of a preference pair."""
    rejected: str | None = None
    """The worse answer of a preference pair."""
    label: str | None = None
    """Whether an answer is desirable (KTO)."""
    text: str | None = None
    """The text of a row for continued pretraining."""
    task: str | None = None
    """The task of a row, one of `adapter.tasks` of multitask prompt tuning."""


class DataConfig(Section):
    """The rows that are trained on, held out and scored."""

    train: str | list[str]
    """Training rows: a file, a folder, a pattern (`rows/*.jsonl`), a dataset of the Hugging Face hub or of ModelScope
    (`ms::name`), or a list of these. `name:subset@split#500`: 500 rows of a split of a subset.
    `dataset_info.json#name`: a dataset that LLaMA-Factory's file describes."""
    validation: str | None = None
    """Held-out rows for the evaluation loss and the reference. Default: `validation_fraction` of the training rows."""
    validation_fraction: Ratio = 0.05
    """Share of the training rows that is held out if `validation` is not given (1 to 500 rows)."""
    test: str | None = None
    """Rows with a checkable answer: greedy answers are compared with the last assistant turn."""
    answer: Literal["exact", "json", "number", "regex", "choice"] = "exact"
    """How answers are compared: as strings, as JSON values, by their last number, or with a regular expression;
    `choice`: the answer is the most likely of `choices`."""
    choices: list[str] = []
    """The possible answers if `answer` is `choice`, such as [A, B, C, D]."""
    format: Literal[
        "auto", "messages", "sharegpt", "alpaca", "prompt-completion", "preference", "ranked", "prompt", "text"
    ] = "auto"
    """Format of the rows; `auto` recognizes it by their keys."""
    sample_by: Literal["line", "paragraph", "document"] = "paragraph"
    """What of a .txt file is a row of continued pretraining: a line, a paragraph between blank lines, or the file."""
    columns: ColumnsConfig = ColumnsConfig()
    """Keys of rows by hand, such as {user: question, assistant: reply}."""
    roles: dict[str, Literal["system", "user", "assistant", "tool"]] = {}
    """Roles by hand, such as {caller: user, clerk: assistant}."""
    on_bad_row: Literal["stop", "skip"] = "stop"
    """`skip`: leave out rows that cannot be trained on, count them, and list them in the run."""
    chat_template: str | None = None
    """A .jinja file, a built-in name (chatml, alpaca, plain) or the name of one of the base's templates, in place
    of its default template and of `tool_use`."""
    split: str = "train"
    """The split of a Hugging Face dataset."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use only the first N training rows."""

    @model_validator(mode="after")
    def _choices_are_there(self) -> Self:
        if self.answer == "choice" and len(set(self.choices)) < 2:
            raise ValueError("data.answer is choice, but data.choices names fewer than two answers")
        return self

    @model_validator(mode="after")
    def _columns_differ(self) -> Self:
        named = {meaning: key for meaning, key in self.columns.model_dump().items() if key is not None}
        for group in (named.keys() - {"role", "content"}, named.keys() & {"role", "content"}):
            keys = [named[meaning] for meaning in named if meaning in group]
            twice = next((key for key in keys if keys.count(key) > 1), None)
            if twice is not None:
                meanings = [meaning for meaning in named if meaning in group and named[meaning] == twice]
                raise ValueError(f"data.columns names the key {twice!r} twice, as {' and as '.join(meanings)}")
        return self


class TemplateConfig(Section):
    """How the chat template renders; training, exported files and their validation render alike."""

    options: dict[str, Any] = {}
    """Variables that the template reads, such as {enable_thinking: false}; transformers calls them
    `chat_template_kwargs`. A row's own `chat_template_kwargs` take precedence."""

    @field_validator("options")
    @classmethod
    def _are_plain_values(cls, value: dict[str, Any]) -> dict[str, Any]:
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError("a value has no equal in JSON; put texts that look like dates in quotes") from None
        return value


class QuantizationConfig(Section):
    """The precision of the frozen base during training (QLoRA, arXiv:2305.14314)."""

    bits: Literal[4, 8, 16] = 4
    """4: bitsandbytes 4-bit; 8: LLM.int8 of bitsandbytes; 16: the unquantized base."""
    type: Literal["nf4", "fp4"] = "nf4"
    """The 4-bit data type."""
    double_quant: bool = True
    """Also quantize the block scales."""
    compute_dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Data type of matrix products. CPUs without bfloat16 instructions take float32 instead of bfloat16."""
    resident: bool | Literal["auto"] = "auto"
    """Keep the dequantized weights in memory instead of computing them at each use, with the same results to the bit;
    `auto`: if there is memory for them."""

    @model_validator(mode="after")
    def _there_are_weights_to_keep(self) -> Self:
        if self.resident is True and self.bits == 16:
            raise ValueError(
                "quantization.resident is true, but quantization.bits: 16 has no quantized weights; leave it out"
            )
        return self


class TrainingConfig(Section):
    """The optimization."""

    epochs: Annotated[float, Field(gt=0)] = 1.0
    """Passes over the training rows."""
    max_steps: Annotated[int, Field(ge=1)] | None = None
    """Stop after N optimizer steps; overrides `epochs`."""
    batch_size: Annotated[int, Field(ge=1)] = 8
    """Rows per forward pass."""
    gradient_accumulation: Annotated[int, Field(ge=1)] = 1
    """Forward passes per optimizer step."""
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Peak learning rate."""
    scheduler: Literal["cosine", "linear", "constant", "constant_with_warmup"] = "cosine"
    """Schedule of the learning rate after the warm-up."""
    warmup_ratio: Ratio = 0.03
    """Share of the steps in which the learning rate rises from 0; a training of one step has no warm-up."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Decoupled weight decay on the adapter."""
    max_grad_norm: Annotated[float, Field(gt=0)] = 1.0
    """Clip gradients to this norm."""
    optimizer: Literal[
        "paged_adamw_8bit", "paged_adamw_32bit", "adamw_torch", "adamw_8bit", "adafactor", "lion_32bit",
        "paged_lion_8bit", "ademamix", "sgd", "galore_adamw", "galore_adafactor", "apollo_adamw",
    ] = "paged_adamw_8bit"  # fmt: skip
    """Paged AdamW of bitsandbytes (its state moves to host memory if the GPU is full), AdamW of torch, or another
    optimizer of transformers. GaLore (arXiv:2403.03507) and APOLLO (arXiv:2412.05270) need `pip install
    'edgetune[optimizers]'`, and a method that trains whole matrices."""
    optimizer_options: dict[str, str | int | float] = {}
    """Options of GaLore and APOLLO, such as {rank: 128, update_proj_gap: 200, scale: 0.25}."""
    optimizer_modules: str | list[str] = "all-linear"
    """Layers whose gradients GaLore and APOLLO project: `all-linear`, names such as [mlp], or a regular expression."""
    gradient_checkpointing: bool | Literal["auto"] = "auto"
    """Recompute activations in the backward pass instead of storing them; `auto`: if there is no memory for them."""
    max_length: Annotated[int, Field(ge=8)] = 1024
    """Cut rows at N tokens; the number of cut rows is reported."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    """Random seed of initialization, row order and dropout."""
    eval_steps: Annotated[int, Field(ge=1)] = 100
    """Evaluate on the held-out rows every N steps and at the end."""
    save_steps: Annotated[int, Field(ge=1)] = 100
    """Write a checkpoint every N steps and at the end."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Number of checkpoints to keep."""
    logging_steps: Annotated[int, Field(ge=1)] = 5
    """Write metrics every N steps."""

    @property
    def batching(self) -> Batching:
        """The rows of an optimizer step."""
        return Batching(self.batch_size, self.gradient_accumulation)


class ReferenceConfig(Section):
    """The stored outputs of base and trained model, against which exported files are validated."""

    rows: Annotated[int, Field(ge=1)] = 64
    """Number of held-out rows whose log-probabilities are stored."""
    full_vocabulary_limit: Annotated[int, Field(ge=0)] = 8192
    """Largest vocabulary that is stored in full; of a larger one, `top_k` entries and the rest as one bucket."""
    top_k: Annotated[int, Field(ge=1)] = 1024
    """Number of log-probabilities stored per position of a larger vocabulary."""
    task_rows: Annotated[int, Field(ge=0)] = 200
    """Number of rows of `data.test` that base and trained model answer."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Largest number of tokens of a generated answer."""
    long: bool = False
    """Add rows as long as the original context and, if the model allows, longer: they show errors of RoPE scaling."""


RENAMED_EXPORT_KEYS = {"tune": "search_types"}
"""Keys of older configurations and runs -> their present names. They are still read."""


class ExportConfig(Section):
    """Defaults of `edgetune merge-export`."""

    formats: list[FormatName] = ["gguf"]
    """Formats to write in one pass: gguf, safetensors (merged model directory), gguf-lora (adapter only), onnx.
    []: nothing is exported."""
    types: list[str] = ["q4_k_m"]
    """Storage types: gguf q4_k_m, q8_0, f16 ...; safetensors, gguf-lora f32, f16, bf16; onnx int4, int8, f16, f32."""
    tensor_types: list[str] = []
    """Storage type of tensors whose name matches, such as `attn_v=q8_0`; the first match applies."""
    output_tensor_type: str | None = None
    """Storage type of the output matrix, or of the embedding if that is also the output."""
    token_embedding_type: str | None = None
    """Storage type of the token embedding."""
    imatrix: str | None = None
    """Importance matrix of llama-imatrix (GGUF or .dat), which weights the quantization error of each column; `auto`
    computes one from the run's training rows."""
    imatrix_tokens: Annotated[int, Field(ge=256, le=65_536)] = 16384
    """Tokens of training rows that are evaluated for an importance matrix of `auto`."""
    split_max_size: str | None = None
    """Split GGUF into files of at most this size, such as 2G."""
    max_shard_size: str = "5GB"
    """Largest file of a safetensors directory."""
    modelfile: bool = False
    """Write an Ollama Modelfile beside each GGUF file."""
    card: bool = False
    """Write a Hugging Face model card, README.md, beside the files or into the model directory."""
    no_ngrams: bool = False
    """Write no FILE.ngrams beside GGUF files: n-grams of the training answers, from which tokens are guessed ahead."""
    survival: bool = False
    """Measure the share of the adapter's change that survives quantization, per tensor (quantizes twice)."""
    allow_fallback: bool = False
    """Accept another storage type for tensors whose row length is not a multiple of the block size."""
    block_size: Literal[32, 64, 128] | None = None
    """Block size of int4 and int8 in ONNX; overrides the default mix; smaller blocks: more bits, smaller error."""
    symmetric: bool = False
    """Symmetric int4 in ONNX (no zero points); saves 0.125 bit per weight at block size 32."""
    search_types: bool = False
    """Choose the storage type of each int4 matrix of ONNX by errors measured on the run's held-out rows; takes some
    minutes."""
    portable: bool = False
    """Write ONNX with standard operators only, for other runtimes; larger, and slower in ONNX Runtime."""
    merge_base: MergeBaseOption = ORIGINAL
    """Base into which the adapter is merged: the original one, or the NF4 base of the training; `auto` measures both on
    held-out rows."""
    lora_rank: Annotated[int, Field(gt=0)] | None = None
    """Rank of the pairs of a gguf-lora that approximate other changes (DoRA, LoHa, ...), by singular values."""
    lora_max_error: Annotated[float, Field(gt=0)] = 0.1
    """Largest relative error of the changes that `lora_rank` approximates; beyond it the export is refused."""
    adapter_weights: list[float] = []
    """Weight of an adapter, once for each `--adapter`, in the same order."""
    combine: CombineName = "linear"
    """How several adapters become one, as in PEFT: `linear` adds their changes, of any kind, `cat` those of LoRA;
    `ties`, `dare-linear`, `dare-ties` and `magnitude-prune` combine A and B of LoRA; `svd` lowers the rank of the sum,
    and `ties-svd`, `dare-linear-svd`, `dare-ties-svd` and `magnitude-prune-svd` combine the products of B and A."""
    density: Annotated[float, Field(gt=0, le=1)] | None = None
    """Share of the values that `combine` keeps; not for `linear`, `cat` and `svd`."""
    combine_seed: Annotated[int, Field(ge=0)] | None = None
    """Seed of what `dare-linear`, `dare-ties` and their `-svd` keep; 0 by default."""
    combine_rank: Annotated[int, Field(ge=1)] | None = None
    """Rank of the pairs that `svd` and `...-svd` make; the largest rank of the combined adapters by default."""
    prompt_task: Annotated[int | str, Field(union_mode="left_to_right")] | None = None
    """Task whose prompt is measured and exported: its name in `adapter.tasks`, or its number from 0 on; the first."""

    @model_validator(mode="before")
    @classmethod
    def _read_renamed_keys(cls, section: Any) -> Any:
        if not isinstance(section, dict):
            return section
        for old, new in RENAMED_EXPORT_KEYS.items():
            if old in section and new in section:
                raise ValueError(f"export.{old} is the former name of export.{new}; give export.{new} alone")
        return {RENAMED_EXPORT_KEYS.get(key, key): value for key, value in section.items()}

    @field_validator("types")
    @classmethod
    def _in_lower_case(cls, types: list[str]) -> list[str]:
        return [type_.lower() for type_ in types]


class GateConfig(Section):
    """Thresholds of `edgetune validate`; a threshold that is not given is not checked."""

    mean_kld_max: Annotated[float, Field(ge=0)] | None = None
    """Largest mean KL divergence from the trained model, in nats per token."""
    same_top_min: Ratio | None = None
    """Smallest share of positions with the trained model's most likely token."""
    perplexity_ratio_max: Annotated[float, Field(gt=0)] | None = None
    """Largest perplexity of the artifact over that of the trained model."""
    recovery_min: Annotated[float, Field(le=2)] | None = None
    """Smallest recovery: the share of the training gain in cross-entropy that survives export (0.95 is 95 %). It can be
    slightly above 1."""
    task_drop_max: Ratio | None = None
    """Largest drop of the task score below the trained model, as a share of the rows."""
    agreement_min: Ratio | None = None
    """Smallest share of the trained model's greedy answers that the artifact repeats exactly, from the start."""
    long_kld_max: Annotated[float, Field(ge=0)] | None = None
    """Largest mean KL divergence on rows as long as the original context or longer. Default: `mean_kld_max`."""
    score_difference_max: Annotated[float, Field(ge=0)] | None = None
    """Of a reward model: largest mean absolute difference of a score from the trained model's, on held-out pairs."""
    pair_flips_max: Ratio | None = None
    """Of a reward model: largest share of the held-out pairs that it ranks in another order than the trained model."""


class Config(Section):
    """The configuration of a run: base, data, template, adapter, training, reference, export and gate."""

    name: str = "run"
    """Name of the run. Its directory is runs/NAME unless `-o` is given."""
    base: str
    """The model to fine-tune: a Hugging Face directory, a GGUF file, or a name on the hub."""
    revision: str | None = None
    """Branch, tag or commit of a base from the hub; the resolved commit is recorded in run.json."""
    tokenizer: str | None = None
    """A directory whose tokenizer files and chat template take the place of the base's. Files that it lacks are the
    base's."""
    trust_remote_code: bool = False
    """Run Python code that comes with the base. Use it only for a base whose code you have read."""
    data: DataConfig
    template: TemplateConfig = TemplateConfig()
    adapter: AdapterConfig = Lora()
    """The PEFT method, `kind`, and its options."""
    objective: ObjectiveConfig = Sft()
    """The objective, `kind`, and its options."""
    quantization: QuantizationConfig = QuantizationConfig()
    training: TrainingConfig = TrainingConfig()
    reference: ReferenceConfig = ReferenceConfig()
    export: ExportConfig = ExportConfig()
    gate: GateConfig = GateConfig()

    @model_validator(mode="before")
    @classmethod
    def _base_is_named(cls, value: Any) -> Any:
        if isinstance(value, dict) and isinstance(value.get("base"), str) and not value["base"].strip():
            raise ValueError("base is empty; name a Hugging Face directory or a model on the hub")
        return value

    @field_validator("name")
    @classmethod
    def _name_stays_in_its_folder(cls, name: str) -> str:
        if not name.strip() or ".." in re.split(r"[/\\]", name) or name.startswith(("/", "~")):
            raise ValueError("it names the directory runs/NAME and the files in it, so it cannot lead out of them")
        return name

    @model_validator(mode="after")
    def _sections_fit(self) -> Self:
        if found := [*self._contradictions_of_method(), *self._contradictions_of_objective()]:
            raise Contradictions(found)
        return self

    def _contradictions_of_method(self) -> Iterator[str]:
        export, training = self.export, self.training
        if export.merge_base == NF4 and self.quantization.bits != 4:
            yield (
                f"export.merge_base is nf4, but quantization.bits: {self.quantization.bits} trains no 4-bit base to "
                "merge into"
            )
        around = Surroundings(
            self.quantization.bits, tuple(export.formats), export.merge_base,
            training.gradient_checkpointing is True, self.objective.kind, export.lora_rank,
        )  # fmt: skip
        yield from self.adapter.conflicts(around)

    def _contradictions_of_objective(self) -> Iterator[str]:
        kind = self.objective.kind
        yield from self.objective.contradictions(self.training.batching)
        if self.objective.facts.is_scorer and "gguf-lora" in self.export.formats:
            yield (
                "export.formats: gguf-lora has no place for the score head of a reward model; choose gguf, onnx or "
                "safetensors"
            )
        if self.objective.facts.is_scorer and self.adapter.kind == "full":
            yield (
                "objective.kind: reward stores its score head beside the adapter, and adapter.kind: full has none; "
                "choose another adapter.kind"
            )
        generates = self.objective.facts.generates and self.objective.compares_with_base
        if generates and self.adapter.facts.peft_type is None:
            yield (
                f"objective.kind: {kind} computes its KL divergence from the base with adapters of PEFT alone, which "
                f"adapter.kind: {self.adapter.kind} is not; set objective.beta: 0"
            )
        if self.objective.compares_with_base and isinstance(self.adapter, Lora) and self.adapter.moves_base:
            yield (
                f"objective.kind: {kind} compares the model with the base, and adapter.init: "
                f"{self.adapter.init} takes values out of the base; choose another adapter.init"
            )


def load_config(path: Path, overrides: Sequence[str] = ()) -> Config:
    """Read a YAML configuration, apply `key=value` overrides (dotted keys, YAML values), check and resolve it.

    Paths that exist relative to the file's folder become absolute. All problems are reported in one ConfigError.
    """
    raw = read_yaml(path)
    for override in overrides:
        apply_override(raw, override)
    _warn_of_renamed_keys(raw.get("export"), str(path))
    return resolve_paths(parse_section(Config, raw, str(path), overrides), path.resolve().parent)


def parse_config(raw: Mapping[str, Any], source: str = "the configuration") -> Config:
    """Validate a mapping as a Config; a ConfigError lists every problem, unknown keys with their nearest match."""
    return parse_section(Config, raw, source)


def parse_section(model: type[Parsed], raw: Mapping[str, Any], source: str, overrides: Sequence[str] = ()) -> Parsed:
    """Validate a mapping as a section of its own; errors as in `parse_config`.

    A problem of an option that `overrides` (`key=value`) set names the `--set` option instead of `source`.
    """
    try:
        return model.model_validate(dict(raw))
    except ValidationError as error:
        problems = [
            (text, override_of(problem, text, overrides, Config))
            for problem in error.errors()
            for text in describe_all(problem, Config, _OTHER_KINDS)
        ]
        problems = list(dict.fromkeys(problems))
        blamed = [f"--set {override}: {text}" if override else text for text, override in problems]
        if len(problems) == 1 and not problems[0][1]:
            blamed = [f"{source}: {blamed[0]}"]
        where = source if not all(override for _, override in problems) else "the options of --set"
        raise ConfigError.of_many(
            f"problems in {where}", blamed, "docs/configuration.md lists every key and its default"
        ) from None


def _warn_of_renamed_keys(export: Any, source: str) -> None:
    from edgetune import console

    for old, new in RENAMED_EXPORT_KEYS.items():
        if isinstance(export, dict) and old in export:
            console.warn(f"{source}: export.{old} is now called export.{new}")


def resolve_paths(config: Config, folder: Path) -> Config:
    """Make local paths absolute, so that the run directory's copy of the configuration means the same anywhere."""

    def local(value: str) -> str:
        return absolute_name(value, folder)

    def resolve(value: Any) -> Any:
        return [local(item) for item in value] if isinstance(value, list) else local(value) if value else value

    data = config.data.model_copy(
        update={key: resolve(getattr(config.data, key)) for key in ("train", "validation", "test", "chat_template")}
    )
    imatrix = config.export.imatrix
    export = config.export.model_copy(update={"imatrix": imatrix if imatrix == AUTO else resolve(imatrix)})
    objective = config.objective.with_paths(local)
    return config.model_copy(
        update={
            "base": local(config.base),
            "tokenizer": resolve(config.tokenizer),
            "data": data,
            "export": export,
            "objective": objective,
        }
    )
