"""What an export of a base will refuse because of its options, asked before training: formats, types, sizes, files."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgetune import console
from edgetune.errors import ConfigError, EnvironmentProblem
from edgetune.storage_types import are_given, types_by_format
from edgetune_converters.names import AUTO

if TYPE_CHECKING:
    from edgetune.config import Config, ExportConfig
    from edgetune.planning.base_model import Base
    from edgetune_converters.merging.score_head import ScoreHead
    from edgetune_converters.onnx.plan import OnnxSettings
    from edgetune_converters.quantization.imatrix import ImportanceMatrix
    from edgetune_converters.quantization.recipes import StoragePlan
    from edgetune_converters.request import ExportRequest, Target

EXPORTER = "transformers/torch.onnx"
"""The name of the exporter that traces the graphs of families without one of edgetune's own."""
_NEEDED = ("torch", "transformers")
_INT4 = "int4"
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def check_exportable(base: Base, config: Config, chat_template: str) -> None:
    """Plan the export of the base before training, so that nobody trains what cannot be exported.

    Map every tensor, plan every format of `export:`, convert the tokenizer, and raise the errors that `edgetune
    merge-export` would raise after training. A storage type that does not fit the model's rows is a warning: another
    one can be chosen until then.
    """
    from edgetune_converters.planning import plan
    from edgetune_converters.quantization.recipes import MAX_FALLBACK

    options = config.export
    _check_soft_prompt(base, config)
    request = replace(_request(base, options), score_head=_score_head(base, config))
    check_search(options, request.targets)
    check_if_traced(request, options)
    importance = _read_importance(options)
    for target, planned in zip(request.targets, plan(request), strict=True):
        if planned.fallback_share > MAX_FALLBACK and not options.allow_fallback:
            console.warn(
                f"{planned.recipe.name} does not fit this base: {planned.fallback_share:.0%} of its bytes would need "
                "another type; set export.types (f16 and bf16 always fit), or export.allow_fallback: true"
            )
        if target.format == "gguf" and (importance is not None or options.imatrix is None):
            _check_importance(planned, importance)
    _check_tokenizer(base, request, chat_template)


def _check_soft_prompt(base: Base, config: Config) -> None:
    """Raise ConfigError for virtual tokens that could not become tokens of this base."""
    from edgetune_converters.adapters.soft_prompt import KINDS, PREFIX
    from edgetune_converters.architectures import completed_config
    from edgetune_converters.merging.prefix_state import why_not_beside
    from edgetune_converters.merging.soft_prompt_rows import why_not_placed
    from edgetune_converters.reading.gguf_base import is_gguf

    facts = config.adapter.facts
    if facts.peft_type == PREFIX:
        stated = completed_config(base.checkpoint.config)
        reasons = (why_not_beside(format_, base.layers.family, stated) for format_ in config.export.formats)
        if why := next((reason for reason in reasons if reason), None):
            raise ConfigError(
                f"adapter.kind: {config.adapter.kind} cannot be exported with the base {base.name}: {why}",
                "Set export.formats: [onnx], or [] to train without export",
            )
    if facts.peft_type not in KINDS:
        return
    formats, from_file = config.export.formats, is_gguf(base.path)
    why_not = {each: why_not_placed(base.layers.family, each, is_gguf=from_file) for each in formats}
    if why := next((reason for reason in why_not.values() if reason), None):
        others = "onnx and safetensors" if not from_file and base.layers.family.onnx else "safetensors"
        elsewhere = "" if from_file else f", another of its formats ({others})"
        raise ConfigError(
            f"adapter.kind: {config.adapter.kind} cannot be exported with the base {base.name}: {why}",
            f"Set export.formats: [] to train without export{elsewhere}, or another adapter.kind",
        )


def _score_head(base: Base, config: Config) -> ScoreHead | None:
    """Return a score head of the right size for a reward model, None for another objective."""
    if not config.objective.facts.is_scorer:
        return None
    import numpy as np

    from edgetune_converters.architectures import completed_config
    from edgetune_converters.merging.score_head import ScoreHead

    return ScoreHead(np.zeros(completed_config(base.checkpoint.config).hidden, np.float32))


def _request(base: Base, options: ExportConfig) -> ExportRequest:
    """Return the request that merge-export would make, without the adapter: the tensors are those of the base."""
    from edgetune_converters.formats import FORMATS
    from edgetune_converters.quantization.overrides import overrides_of
    from edgetune_converters.request import ExportRequest, Target

    nowhere = base.path / "export"  # nothing is written
    found = [
        Target(format_, type_, nowhere / f"{format_}-{type_}")
        for format_, types in types_by_format(options, are_given(options)).items()
        if format_ != "gguf-lora"  # which holds tensors of the adapter alone
        for type_ in types or [FORMATS[format_].default_type]
    ]
    return ExportRequest(
        base.path,
        tuple(found or [Target("gguf", "f16", nowhere)]),  # f16 serves to map the tensors: it fits every row
        overrides=overrides_of(options.tensor_types, options.output_tensor_type, options.token_embedding_type),
        imatrix=None if options.imatrix is None else Path(options.imatrix),
        onnx_settings=_onnx_settings(options) if any(target.format == "onnx" for target in found) else None,
        split_max_size=_byte_count(options.split_max_size, "split_max_size"),
        max_shard_size=_byte_count(options.max_shard_size, "max_shard_size"),
    )


def _onnx_settings(options: ExportConfig) -> OnnxSettings:
    from edgetune_converters.onnx.plan import OnnxSettings

    return OnnxSettings(options.block_size, options.symmetric, options.portable)


def _byte_count(text: str | None, option: str) -> int | None:
    return None if text is None else byte_count(text, f"export.{option}:")


def _read_importance(options: ExportConfig) -> ImportanceMatrix | None:
    """Return the importance matrix. One that does not exist yet, as it is made of an exported file, is a warning."""
    from edgetune_converters.quantization.imatrix import read_imatrix

    if options.imatrix in (None, AUTO):
        return None
    path = Path(options.imatrix)
    if not path.exists():
        console.warn(f"export.imatrix: there is no file {path} yet; `edgetune merge-export` will need it")
        return None
    return read_imatrix(path)


def _check_importance(planned: StoragePlan, importance: ImportanceMatrix | None) -> None:
    from edgetune_converters.quantization.imatrix import check_needed

    if importance is None:
        check_needed((row.name, row.type) for row in planned.rows)
    else:
        importance.check((row.name, row.shape, row.type) for row in planned.rows)


def _check_tokenizer(base: Base, request: ExportRequest, chat_template: str) -> None:
    """Convert the tokenizer as a GGUF file and an ONNX folder need it. Raises TokenizerError."""
    from edgetune_converters.architectures import ModelConfig, completed_config
    from edgetune_converters.merging.resized_vocabulary import with_rows
    from edgetune_converters.tokenizers import convert
    from edgetune_converters.tokenizers.special import special_token_ids

    stated = completed_config(base.checkpoint.config)
    if base.added_tokens and base.rows:
        stated = ModelConfig(with_rows(stated.raw, base.rows))
    convert.convert_tokenizer(base.directory, stated.vocab_size, stated.raw, chat_template=chat_template)
    if request.paths("onnx"):
        special_token_ids(base.directory, stated.raw, chat_template, stated.vocab_size)


def byte_count(text: str, option: str) -> int:
    """Return the bytes of a size such as 2G, 500MB or 1000000. Raises ConfigError for another text."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([KMGT]?)B?\s*", text, re.IGNORECASE)
    size = int(float(match[1]) * _UNITS[match[2].upper()]) if match else 0
    if size <= 0:
        raise ConfigError(f"{option} {text!r} is not a size", "For instance 2G, 500M, or a number of bytes")
    return size


def check_search(config: ExportConfig, targets: Sequence[Target]) -> None:
    """Raise ConfigError for options that leave nothing to choose."""
    if not config.search_types:
        return
    if not any(target.format == "onnx" and target.type == _INT4 for target in targets):
        raise ConfigError(
            "--search-types chooses the blocks of int4 in ONNX, and none is exported", "Add --format onnx -q int4"
        )
    if config.block_size or config.symmetric or config.portable:
        raise ConfigError(
            "--search-types chooses the blocks itself, for ONNX Runtime's operators",
            "Leave out --block-size, --symmetric and --portable, or --search-types",
        )


def check_if_traced(request: ExportRequest, config: ExportConfig) -> str | None:
    """Return the name of the family if its ONNX graph has to be traced, and check that the options allow it.

    Raises:
        ConfigError: An option does not apply to a traced graph.
        EnvironmentProblem: torch or transformers is missing.
    """
    if not request.paths("onnx"):
        return None
    from edgetune_converters.architectures import ModelConfig, family_of
    from edgetune_converters.reading.gguf_base import open_base

    family = family_of(ModelConfig(open_base(request.base).config))
    if family.onnx:
        return None
    _check_traced(family.name, request, config)
    return family.name


def _check_traced(family: str, request: ExportRequest, config: ExportConfig) -> None:
    from edgetune_converters.outputs.onnx import check_replaceable
    from edgetune_converters.outputs.traced import CODES

    paths = request.paths("onnx")
    quantized = [type_ for type_ in paths if type_ in CODES]
    for path in paths.values():
        check_replaceable(path)
    if (config.block_size or config.symmetric) and not quantized:
        raise ConfigError(
            f"{family} is written as ONNX in {' and '.join(paths)}, which have no blocks",
            "Leave out --block-size and --symmetric, or add -q int4",
        )
    if config.portable and quantized:
        raise ConfigError(
            f"{family} is written as ONNX by {EXPORTER}, and {quantized[0]} of it with ONNX Runtime's operators",
            "Leave out --portable, or take -q f32 or -q f16, whose operators are the standard's",
        )
    if config.search_types:
        raise ConfigError(
            f"--search-types chooses for graphs of edgetune's own, and that of {family} is drawn by {EXPORTER}",
            "Leave out --search-types; --block-size sets the blocks of all matrices",
        )
    if config.imatrix and quantized:
        console.warn(f"--imatrix is not used for {quantized[0]} in ONNX, as {EXPORTER} draws the graph of {family}")
    missing = [name for name in _NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise EnvironmentProblem(
            f"{family} is written as ONNX by {EXPORTER}, and {' and '.join(missing)} cannot be found",
            "pip install 'edgetune[train]', or write GGUF, which needs no torch: --format gguf",
        )
