"""The inputs of an adoption: adapter, arguments, base and rows, read and checked before torch is imported."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from edgetune.adoption.arguments import Precision, TrainerArguments, read_arguments
from edgetune.adoption.base_check import check_base
from edgetune.adoption.method import method_of
from edgetune.adoption.peft_form import PeftForm, peft_form
from edgetune.adoption.request import AdoptionRequest
from edgetune.adoption.training_log import TrainingLog, read_log
from edgetune.config import Config, parse_config, resolve_paths
from edgetune.data.chat import named_templates
from edgetune.errors import ConfigError, DataError
from edgetune.planning.base_model import Base, find_base
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.runs.directory import RunDirectory
from edgetune.section import apply_override
from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.directory import AdapterPlace, find_adapter
from edgetune_converters.adapters.kinds import THROUGH_PEFT
from edgetune_converters.adapters.peft_config import CONFIG_FILE, FULL_CONFIG_FILE, PeftConfig
from edgetune_converters.errors import AdapterError, CheckpointError, OnlyPeftError
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.names import NF4, ORIGINAL
from edgetune_converters.tokenizers.beside_adapter import TokenizerDirectory

_NAME = re.compile(r"[^\w.+-]+")
_INNER = re.compile(r"(checkpoint-\w+|epoch_\d+|step_\d+|iter_\d+|default|adapter|final)")
_KEPT_TRAINING = ("max_length",)


@dataclass(frozen=True)
class Reasons:
    """Why the run has its precision, merge base and tokenizer: a clause each."""

    precision: str
    merge_base: str
    tokenizer: str


@dataclass(frozen=True)
class PreparedAdoption:
    """The validated inputs of an adoption."""

    place: AdapterPlace
    arguments: TrainerArguments
    prepared: PreparedRun
    form: PeftForm
    log: TrainingLog
    reasons: Reasons
    has_training_rows: bool
    """Whether `data.train` was given: the rows are those of the training."""
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def config(self) -> Config:
        """The configuration of the run."""
        return self.prepared.config

    @property
    def stored_config(self) -> dict[str, Any]:
        """The configuration for run.json: of the training, only the options that are known."""
        config = self.config.model_dump(mode="json")
        known = (*self.arguments.training, *_KEPT_TRAINING)
        return config | {"training": {name: config["training"][name] for name in config["training"] if name in known}}

    @property
    def data_identity(self) -> dict[str, Any]:
        """The `data` entry of the manifest, without training rows where they are not known."""
        identity = dict(self.prepared.data_identity)
        if self.has_training_rows:
            return identity
        return {**identity, "train": [], "rows": {"validation": identity["rows"]["validation"]}}


def prepare_adoption(request: AdoptionRequest) -> PreparedAdoption:
    """Read and check everything that the capture and an export need, without torch.

    Raises:
        EdgetuneError: Adapter, base, rows or options cannot be used, or do not belong together.
    """
    place, config = _open(request.adapter)
    arguments = read_arguments(place.path, config, request.arguments)
    if arguments.is_scorer:
        assert arguments.stage is not None
        raise DataError(
            f"{place.path} is the adapter of a reward model ({arguments.stage.source} is {arguments.stage.value})",
            "Give an adapter of a language model; edgetune trains reward models itself (objective.kind: reward)",
        )
    raw, has_training_rows = _configuration(request, place, arguments)
    base = find_base(_parsed(raw))
    notes, warnings = check_base(base, arguments)
    adapter = _match(base, place, notes)
    modules = adapter.matched_tensors.modules if adapter is not None else {}
    raw["adapter"] = method_of(config, list(modules), _token_texts(config, base)).model_dump(mode="json")
    precision = _set_precision(raw, base, arguments)
    merge_reason = _set_merge_base(raw, precision, config)
    prepared = prepare_run(_parsed(raw), trains=False)
    warnings += [*_doubts(arguments, precision, prepared), *_doubts_of_rows(arguments, prepared)]
    return PreparedAdoption(
        place, arguments, prepared, peft_form(place, config, adapter), read_log(place.path),
        Reasons(precision.reason, merge_reason, _tokenizer_reason(prepared, place)), has_training_rows,
        notes, warnings,
    )  # fmt: skip


def _open(path: Path) -> tuple[AdapterPlace, PeftConfig]:
    """Find the adapter. Raises AdapterError, or ConfigError for one that edgetune trained."""
    try:
        place = find_adapter(path)
        if place.config == FULL_CONFIG_FILE:
            raise _own(path)
        config = PeftConfig(place.path / place.config)
    except CheckpointError as error:
        raise AdapterError(error.message, error.hint) from error
    if config.raw.get("edgetune_method") or RunDirectory(place.path.resolve().parent).is_finished:
        raise _own(path)
    if place.initial:
        raise AdapterError(
            f"{place.path} keeps the values before training beside the adapter, as its start moved the base",
            "Convert it with PEFT: save_pretrained(DIR, path_initial_model_for_weight_conversion=...), and give that",
        )
    return place, config


def _own(path: Path) -> ConfigError:
    return ConfigError(
        f"edgetune trained the adapter {path}: its run has a reference already, or cannot be rebuilt from here",
        "Give the run directory to `edgetune merge-export` and `edgetune validate`",
    )


# -- the configuration -------------------------------------------------------------------------------------------------


def _configuration(
    request: AdoptionRequest, place: AdapterPlace, arguments: TrainerArguments
) -> tuple[dict[str, Any], bool]:
    """Return the configuration without the adapter, and whether it names training rows."""
    raw: dict[str, Any] = {
        "name": _name(place),
        "base": request.base,
        "data": {"validation": request.data, **({"test": request.test} if request.test else {})},
        "training": dict(arguments.training),
        "quantization": {},
        "export": {},
    }
    if not TokenizerDirectory(place.path).is_empty:
        raw["tokenizer"] = str(place.path)
    for override in request.overrides:
        if re.match(r"(adapter|objective)\b", override):
            raise ConfigError(
                f"--set {override}: the method of an adapter is read from its {CONFIG_FILE}, and nothing is trained",
                "Leave it out",
            )
        apply_override(raw, override)
    has_training_rows = "train" in raw["data"]
    raw["data"].setdefault("train", raw["data"]["validation"])  # nothing is trained on them
    return raw, has_training_rows


def _parsed(raw: Mapping[str, Any]) -> Config:
    return resolve_paths(parse_config(raw, "the configuration of the adapter"), Path.cwd())


def _name(place: AdapterPlace) -> str:
    path = place.path.resolve()
    parts = [path.parent.name, path.name] if _INNER.fullmatch(path.name) else [path.name]
    return _NAME.sub("-", "-".join(part for part in parts if part)).strip("-.") or "adopted"


def _match(base: Base, place: AdapterPlace, notes: list[str]) -> Adapter | None:
    """Match the adapter with the base; None for one without changes of tensors, or that PEFT alone merges.

    Raises AdapterError for an adapter of another base.
    """
    try:
        model = open_model(base.path, place.path, merge_base_named(ORIGINAL))
    except OnlyPeftError as error:
        notes.append(f"{error.message}; an export merges it with PEFT")
        return None
    if model.resized is not None:
        raise AdapterError(
            f"{place.path} has {model.resized.rows} rows of embeddings and the base {base.rows}: the vocabulary was "
            "resized in training, which a run of an adapter cannot state",
            f"Export it without a run: edgetune merge-export --base {base.path} --adapter {place.path}",
        )
    assert model.adapter is not None
    notes += model.adapter.notes
    return model.adapter if isinstance(model.adapter, Adapter) else None


def _token_texts(config: PeftConfig, base: Base) -> list[str]:
    """Return the texts of the trained tokens of an adapter that trains nothing else."""
    if config.peft_type != "TRAINABLE_TOKENS":
        return []
    tokenizer = Tokenizer.from_file(str(base.directory / "tokenizer.json"))
    return [tokenizer.id_to_token(number) or str(number) for number in config.raw.get(config.token_field) or []]


def _set_precision(raw: dict[str, Any], base: Base, arguments: TrainerArguments) -> Precision:
    """State the precision of the base in the configuration, unless it is stated there."""
    stated = raw["quantization"]
    if "bits" in stated:
        return Precision(stated["bits"], f"--set quantization.bits={stated['bits']}")
    found = arguments.precision
    if base.checkpoint.is_packed:
        found = Precision(16, "the base is stored in few bits, and its dequantized values are those of the training")
    stated["bits"] = found.bits or 16
    if found.bits == 4:
        raw["quantization"] = {"type": found.type, "double_quant": found.double_quant, **stated}
    return found


def _set_merge_base(raw: dict[str, Any], precision: Precision, config: PeftConfig) -> str:
    """State the merge base in the configuration, unless it is stated there; return why it is this one."""
    export = raw["export"]
    if "merge_base" in export:
        return f"--set export.merge_base={export['merge_base']}"
    bits = raw["quantization"]["bits"]
    if bits == 4 and config.peft_type in THROUGH_PEFT:
        export["merge_base"] = ORIGINAL
        return f"PEFT alone merges {config.peft_type}, into the base as it is stored"
    export["merge_base"] = NF4 if bits == 4 else ORIGINAL
    if bits == 4:
        return f"the adapter was trained on the base in 4 bits: {precision.reason}"
    if precision.bits is None:
        return "nothing states that the base was quantized in training"
    return f"the base was not in 4 bits of bitsandbytes in training: {precision.reason}"


def _tokenizer_reason(prepared: PreparedRun, place: AdapterPlace) -> str:
    """Return whose tokenizer and chat template the run has."""
    config = prepared.config
    if config.data.chat_template:
        template = "the chat template is that of data.chat_template"
    elif config.tokenizer and named_templates(Path(config.tokenizer)):
        template = f"the chat template is that in {config.tokenizer}"
    else:
        template = "the chat template is the base's"
    if not config.tokenizer:
        beside = TokenizerDirectory(place.path)
        return f"the tokenizer is the base's{', as --set says' if not beside.is_empty else ''}; {template}"
    has_vocabulary = TokenizerDirectory(Path(config.tokenizer)).has_vocabulary
    parts = (
        "vocabulary and special tokens are" if has_vocabulary else "the vocabulary is the base's, special tokens are"
    )
    return f"{parts} those in {config.tokenizer}; {template}"


# -- doubts ------------------------------------------------------------------------------------------------------------


def _doubts(arguments: TrainerArguments, precision: Precision, prepared: PreparedRun) -> Iterator[str]:
    """Yield what may make the trained model another one than base and adapter give here."""
    for difference in arguments.differences:
        yield f"{difference}; the reference is that of the base with the adapter alone"
    if precision.other:
        yield (
            f"the base was {precision.other} in training ({precision.reason}), whose numbers are not computed here: "
            "the reference is that of the adapter on the base as it is stored"
        )
    if precision.bits is None:
        yield (
            f"{precision.reason}, and the base as it is stored is taken; if it was QLoRA, give "
            "--set quantization.bits=4, or its arguments with --arguments FILE"
        )
    dynamic = next((each.value for each in arguments.bases if "unsloth-bnb-4bit" in str(each.value).lower()), None)
    if dynamic and prepared.config.quantization.bits == 4:
        yield (
            f"{dynamic} leaves some layers in 16 bits, and here all linear layers are rounded to 4: dequantize that "
            "base with `edgetune merge-export --format safetensors`, and give the result with --base and "
            "--set quantization.bits=16 for the numbers of the training"
        )
    if prepared.config.quantization.bits == 8:
        yield "the base was in 8 bits in training, and an export merges into the original weights"
    template = arguments.template
    if template is not None and not prepared.config.tokenizer and not prepared.config.data.chat_template:
        yield (
            f"the training rendered rows with the template {template.value} ({template.source}), no tokenizer lies "
            "beside the adapter, and the base's template is used; give another one with --set data.chat_template=FILE"
        )


def _doubts_of_rows(arguments: TrainerArguments, prepared: PreparedRun) -> Iterator[str]:
    system = arguments.system
    rows = prepared.splits.validation
    bare = sum(not any(message.get("role") == "system" for message in row.messages) for row in rows)
    if system is not None and bare:
        yield (
            f"the training put a system prompt before conversations without one ({system.source}), and {bare} of "
            f"{len(rows)} held-out rows have none: write it into the rows"
        )
    given = prepared.config.data.validation or ""
    for name in arguments.data:
        if name == given or (Path(name).exists() and Path(given).exists() and Path(name).samefile(given)):
            yield (
                f"the held-out rows {name} are those of the training, as its arguments say: all figures look better "
                "than they are; give rows that were not trained on"
            )
