"""The methods of quantized checkpoints: which are read, and the decoder of each stored weight."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgetune_converters.errors import CheckpointError
from edgetune_converters.files.contents import read_json
from edgetune_converters.reading.prequantized import awq, gptq
from edgetune_converters.reading.prequantized.bitsandbytes import FourBitWeight, Int8Weight, state_names
from edgetune_converters.reading.prequantized.compressed_tensors import packed_weight
from edgetune_converters.reading.prequantized.decoder import (
    FLOATS,
    ConfigJson,
    MakeDecoder,
    ViewTensor,
    WeightDecoder,
    WeightError,
)
from edgetune_converters.reading.prequantized.float4 import BLOCKS, Mxfp4Weight, modelopt_weight, scales_of
from edgetune_converters.reading.prequantized.scaled import ScaledWeight, scale_of
from edgetune_converters.tensors import FLOAT8, PACKED, TensorInfo


@dataclass(frozen=True)
class QuantizationMethod:
    """A quant_method of config.json.

    Attributes:
        keys: Further keys of `quantization_config`; the first that is there decides. Empty: all checkpoints are read.
        values: Their values that are read, in lower case; None: the key may be absent.
        packed: The decoders of weights that are stored under another name, by the end of that name.
    """

    keys: tuple[str, ...] = ()
    values: tuple[str | None, ...] = ()
    packed: Mapping[str, MakeDecoder] = field(default_factory=dict)

    def unread(self, stated: ConfigJson) -> str | None:
        """Return the key and value that are not read, None where all are."""
        for key in self.keys:
            value = stated.get(key)
            if value is not None or (key == self.keys[-1] and None not in self.values):
                known = (value.lower() if isinstance(value, str) else value) in self.values
                return None if known else f"{key} {value!r}"
        return None


_GPTQ = QuantizationMethod(
    ("checkpoint_format", "format"), ("gptq", "gptq_v2", "gptq_p", None), {".qweight": gptq.GptqWeight}
)
_AWQ = QuantizationMethod(
    ("version", "format", "checkpoint_format"), (*awq.LAYOUTS, None), {".qweight": awq.awq_weight}
)
_COMPRESSED = (
    *("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense"),
    *("nvfp4-pack-quantized", "mxfp4-pack-quantized", "mxfp8-quantized", None),
)
# quant_method of config.json -> how it is read
_METHODS: Mapping[str, QuantizationMethod] = {
    "bitsandbytes": QuantizationMethod(),
    "fp8": QuantizationMethod(),
    "fbgemm_fp8": QuantizationMethod(),
    "gptq": _GPTQ,
    "awq": _AWQ,
    "compressed-tensors": QuantizationMethod(("format",), _COMPRESSED, {".weight_packed": packed_weight}),
    "modelopt": QuantizationMethod(("quant_algo",), ("fp8", "nvfp4")),
    "mxfp4": QuantizationMethod(),
}
# AutoRound's `packing_format`, without "auto_round:" -> the method whose files it writes
_PACKINGS = {"auto_gptq": _GPTQ, "gptq": _GPTQ, "auto_awq": _AWQ, "awq": _AWQ}
_AUTO_ROUND = ("auto-round", "intel/auto-round")
# methods whose quantized weights are recognized by their tensors; "none": old entries name none
_STORED_METHODS = (*_METHODS, *_AUTO_ROUND, "aqlm", "eetq", "hqq", "none")
# what tells that weights are stored quantized: integers and small floats, and the names of codes and scales
_PACKED_DTYPES = ("U8", "I8", "I16", "I32", "U16", "U32", *FLOAT8)
_PACKED_PARTS = frozenset(
    {
        *("qweight", "qzeros", "scales", "g_idx", "SCB", "weight_format", "absmax", "quant_map"),
        *("weight_packed", "weight_scale", "weight_scale_inv", "weight_scale_2", "weight_global_scale"),
        *("weight_zero_point", "weight_shape", "codes", "codebooks", "Qidxs", "trellis"),
    }
)
_PACKED_ENDS = ("_blocks", "_scales", "_scale", "_scale_inv")
_PACKED_ENDINGS = (".qweight", ".weight_packed")
_OF_CACHE = re.compile(r".*\.[qkv]_(scale|zero_point)")
# where quantizers of old wrote what config.json says now -> the method
_ENTRY_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}
_OF_ACTIVATIONS = re.compile(r".*\.(input|output|activation)_(global_)?(scale|zero_point)")
_HINT = "Give the original 16-bit or 32-bit model that it was made from, or fetch this one again"


def with_entry(path: Path, config: dict[str, Any], tensors: Mapping[str, TensorInfo]) -> dict[str, Any]:
    """Return config.json with `quantization_config`, which old GPTQ and AWQ checkpoints have in a file of its own."""
    if config.get("quantization_config") or not any(name.endswith(".qweight") for name in tensors):
        return config
    for name, method in _ENTRY_FILES.items():
        if (path / name).is_file():
            return {**config, "quantization_config": {"quant_method": method, **read_json(path / name)}}
    raise CheckpointError(
        f"{path} holds packed weights (qweight), but neither config.json nor {' nor '.join(_ENTRY_FILES)} says how",
        "Fetch the model again, with all its files",
    )


def named_weights(path: Path) -> Path | None:
    """Return the weights file of an old GPTQ checkpoint, named in quantize_config.json; None where there is none."""
    for name in _ENTRY_FILES:
        if (path / name).is_file():
            stem = read_json(path / name).get("model_file_base_name")
            file = path / f"{stem}.safetensors"
            if isinstance(stem, str) and file.parent == path and file.is_file():
                return file
    return None


def is_outdated_entry(config: ConfigJson, tensors: Mapping[str, TensorInfo]) -> bool:
    """Whether config.json declares a quantization that the tensors do not have: all are floats, none is a scale.

    Merged models often keep the entry of the quantized model that they were trained on. An entry that says how plain
    weights are computed with (bitnet, transforms) is not outdated.
    """
    entry = config.get("quantization_config")
    stated = entry if isinstance(entry, dict) else {}
    if not entry or stated.get("quant_method", "none") not in _STORED_METHODS or stated.get("transform_config"):
        return False
    return not any(
        info.dtype in _PACKED_DTYPES or name.rpartition(".")[2] in _PACKED_PARTS or name.endswith(_PACKED_ENDS)
        for name, info in tensors.items()
    )


def check_method(path: object, config: ConfigJson) -> None:
    """Raise CheckpointError when config.json declares a quantization method that is not supported."""
    quantization = config.get("quantization_config")
    if not quantization:
        return
    stated = quantization if isinstance(quantization, dict) else {}
    if reason := _unread(stated):
        raise CheckpointError(
            f"the checkpoint {path} is already quantized ({reason}), in a way that is not read",
            "Give the original 16-bit or 32-bit model that it was made from",
        )


def _unread(stated: ConfigJson) -> str | None:
    """The method, with the setting of it that is not read; None for a method that is read."""
    name = stated.get("quant_method", "unknown")
    method = method_of(stated)
    if method is None:
        packing = stated.get("packing_format")
        return f"{name}, packing_format {packing!r}" if name in _AUTO_ROUND else str(name)
    sparsity = stated.get("sparsity_config")
    sparse = sparsity.get("format") if isinstance(sparsity, dict) else None
    found = [method.unread(stated)]
    found += [f"sparsity_config {sparse!r}"] if sparse not in (None, "dense") else []
    found += ["transform_config"] if stated.get("transform_config") else []
    found += [f"group {name}, {text}" for name, group in _groups(stated) if (text := method.unread(group))]
    problems = [text for text in found if text]
    return f"{name}, {problems[0]}" if problems else None


def _groups(stated: ConfigJson) -> Iterator[tuple[str, ConfigJson]]:
    """The groups of compressed-tensors that state a format of their own."""
    groups = stated.get("config_groups")
    for name, group in groups.items() if isinstance(groups, dict) else ():
        if isinstance(group, dict) and "format" in group:
            yield name, group


def method_of(stated: ConfigJson) -> QuantizationMethod | None:
    """Return the method of a `quantization_config`, None for one that is not read."""
    name = stated.get("quant_method")
    if name in _AUTO_ROUND:
        return _PACKINGS.get(str(stated.get("packing_format")).removeprefix("auto_round:"))
    return _METHODS.get(name) if isinstance(name, str) else None


def decoders(tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor) -> dict[str, WeightDecoder]:
    """Return the quantized weights of a checkpoint by name; `view` returns the elements of a tensor without a copy.

    Raises CheckpointError with every weight of which a part is missing or does not fit.
    """
    found: dict[str, WeightDecoder] = {}
    problems: list[str] = []
    quantization = config.get("quantization_config")
    stated = quantization if isinstance(quantization, dict) else {}
    method = method_of(stated) or QuantizationMethod()
    for name, info in tensors.items():
        kind = _kind(name, info, tensors, method, bool(quantization))
        if kind is None:
            continue
        try:
            decoder = kind(name, tensors, stated, view)
            if decoder.info.name != name and decoder.info.name in tensors:
                raise WeightError(f"{decoder.info.name} is there twice, plain and quantized ({name})")
            found[decoder.info.name] = decoder
        except WeightError as misfit:
            problems.append(str(misfit))
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError, IndexError) as error:
            problems.append(f"{name} cannot be decoded: {error.args[0] if error.args else error!r}")
    if problems:
        raise CheckpointError.of_many("quantized weights that cannot be read", problems, _HINT)
    return found


def fold_parts(tensors: Mapping[str, TensorInfo], found: Mapping[str, WeightDecoder]) -> dict[str, TensorInfo]:
    """Return the tensors of a checkpoint with each quantized weight as one tensor of its original shape.

    Scales of the key-value cache and of activations are dropped: they concern runtimes with 8-bit products.
    """
    by_part = {part: decoder for decoder in found.values() for part in decoder.parts}
    folded: dict[str, TensorInfo] = {}
    for name, info in tensors.items():
        decoder = by_part.get(name)
        if decoder is not None:
            folded.setdefault(decoder.info.name, decoder.info)
        elif not (found and (_OF_CACHE.fullmatch(name) or _OF_ACTIVATIONS.fullmatch(name))):
            folded[name] = info
    return folded


def zero_biases(tensors: Mapping[str, TensorInfo], found: Mapping[str, WeightDecoder], view: ViewTensor) -> set[str]:
    """Return the biases of packed weights that are zero in all layers: some quantizers add one to every layer."""
    packed = [name for name, decoder in found.items() if decoder.info.dtype in PACKED]
    biases = [bias for name in packed if (bias := name.removesuffix("weight") + "bias") in tensors]
    kinds = {name: re.sub(r"\.\d+\.", ".", name) for name in biases}
    used = {kinds[name] for name in biases if tensors[name].dtype not in FLOATS or view(tensors[name]).any()}
    return {name for name in biases if kinds[name] not in used}


def notes(config: ConfigJson, tensors: Mapping[str, TensorInfo], found: Mapping[str, WeightDecoder]) -> Iterator[str]:
    """Yield remarks for the receipt: which weights are dequantized, and which scales are left out."""
    packed = [name for name, decoder in found.items() if decoder.info.dtype in PACKED]
    if packed:
        method = config["quantization_config"]["quant_method"]
        yield (
            f"{len(packed)} weights of the base are quantized ({method}) and were dequantized: what the quantization "
            "has lost does not come back"
        )
    for pattern, meaning in ((_OF_CACHE, "an 8-bit key-value cache"), (_OF_ACTIVATIONS, "quantized activations")):
        count = sum(1 for name in tensors if pattern.fullmatch(name)) if found else 0
        if count:
            yield f"{count} tensors with scales of {meaning} are left out: the weights do not need them"


def _unknown_packing(
    name: str, tensors: Mapping[str, TensorInfo], config: ConfigJson, view: ViewTensor
) -> WeightDecoder:
    raise WeightError(f"{name} is packed in a way that {config.get('quant_method')!r} in config.json does not have")


def _kind(
    name: str, info: TensorInfo, tensors: Mapping[str, TensorInfo], method: QuantizationMethod, is_quantized: bool
) -> MakeDecoder | None:
    """The decoder of a weight, None for a plain one: found by its name and the tensors that accompany it."""
    for ending in _PACKED_ENDINGS:
        if name.endswith(ending):
            return method.packed.get(ending, _unknown_packing)
    if name.endswith(BLOCKS) and scales_of(name) in tensors:
        return Mxfp4Weight
    if not name.endswith(".weight"):
        return None
    module = name.removesuffix(".weight")
    if any(other in tensors for other in (f"{name}.absmax", *state_names(name))):
        return FourBitWeight
    if info.dtype == "U8" and f"{module}.weight_scale_2" in tensors:
        return modelopt_weight
    if f"{module}.SCB" in tensors or (info.dtype == "I8" and scale_of(module, tensors) is None):
        return Int8Weight
    if scale_of(module, tensors) is not None or (info.dtype in FLOAT8 and is_quantized):
        return ScaledWeight
    if info.dtype == "U8" and is_quantized:
        return FourBitWeight
    return None
