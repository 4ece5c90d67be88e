"""The ONNX graph of a model, traced by torch.onnx.export from transformers' code, for families without a description.

Tracing can bake in a shape that depends on the sequence. Such a shape shows only at other lengths. Therefore the logits
of transformers for a text are stored (`Probe`) and compared with those of the written graph in steps of other lengths.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, DynamicCache
from transformers.utils.logging import disable_progress_bar

import edgetune_native
from edgetune.errors import DataError
from edgetune.planning.base_model import base_loading_error
from edgetune.training.environment import silence_libraries
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.onnx.genai import DecoderSizes
from edgetune_converters.onnx.traced_model import TracedModel

OPSET = 17  # the newest of the tracing exporter of torch
MAX_KLD = 1e-6
_BATCH, _PAST, _NEW = 2, 5, 3  # of the traced call: all different; none is 1, which would be broadcast
_PROBE, _BEYOND, _FAR = (
    96,
    40,
    1024,
)  # tokens of the probe: _BEYOND a window of at most _FAR
_STEPS = 12
_FILE = "traced.onnx"
_EXACT_FILE, _IN_F32 = "exact.onnx", 1  # MatMulNBits' accuracy_level
_USE_GGUF = "Write it as GGUF: --format gguf"
_PACKAGES = ("torch", "transformers", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Probe:
    """Token ids [n] and the logits f32 [n, vocabulary] of transformers."""

    ids: NDArray[np.int64]
    logits: NDArray[np.float32]


class _Decoder(torch.nn.Module):
    """A model with its cache as plain input and output tensors: ids, mask, key 0, value 0, key 1, ..."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Any, mask: Any, *past: Any) -> tuple[Any, ...]:
        """Return logits, then all keys and values after the call.

        The cache has no sliding window, so that it keeps every position; the masks apply the windows.
        """
        cache = DynamicCache()
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True)
        return found.logits, *(part for layer in found.past_key_values.layers for part in (layer.keys, layer.values))


def package_versions() -> dict[str, str]:
    """Return the versions of the packages that affect the graph."""
    return {name: importlib.metadata.version(name) for name in _PACKAGES}


def trace_model(directory: Path, family: str, context: int) -> tuple[TracedModel, Callable[[], Probe]]:
    """Load a merged model in f32 and trace it.

    Returns:
        The traced model, and a function that computes a probe. The weights are not copied: after a change of them, the
        probe is computed with the changed weights.

    Raises:
        ArchitectureError: If the model cannot be traced, or keeps a state other than keys and values.
        DataError: If transformers cannot load the model.
    """
    disable_progress_bar()
    with silence_libraries(), torch.no_grad():
        model = _load_model(directory, family)
        shapes, vocabulary = _cache_shapes(model, family)
        graph = _trace_graph(model, family, shapes, directory / _FILE)
        weights = {f"model.{name}": value.detach().numpy() for name, value in model.state_dict().items()}
    used = {entry.name for entry in graph.graph.input}
    _declare_output_shapes(graph, shapes, vocabulary)
    kept = {name: value for name, value in weights.items() if name in used}
    if odd := [name for name, value in kept.items() if value.dtype != np.float32]:
        raise _unsupported(family, f"its {odd[0]} is not f32")
    sizes = _model_sizes(model.config.get_text_config(), shapes, vocabulary, context)
    return TracedModel(graph, kept, sizes), partial(_compute_probe, model, context)


def check_graph(graph: Path, probe: Probe, family: str) -> float:
    """Return the mean KLD in nats of the written graph from transformers: in one call or in steps, whichever is larger.

    Activations are in f32 for this check, also in products with quantized weights, so that only the graph is compared.

    Raises:
        ArchitectureError: If the graph does not compute the model.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    count = len(probe.ids)
    try:
        with _exact_activations(graph) as exact:
            session = onnxruntime.InferenceSession(exact, options, providers=["CPUExecutionProvider"])
        found = [
            _run_in_steps(session, probe.ids, steps) for steps in ([count], [count - _STEPS - 4, 4, *[1] * _STEPS])
        ]
    except Exception as error:  # noqa: BLE001 - ONNX Runtime's exceptions have no common base of their own
        raise _unsupported(family, f"ONNX Runtime cannot run the traced graph: {_first_line(error)}") from None
    divergence = max(_mean_kld(probe, logits) for logits in found)
    if not divergence < MAX_KLD:
        raise _unsupported(family, f"the traced graph is not the model: mean KLD {divergence:.1e} in another step")
    return divergence


@contextmanager
def _exact_activations(graph: Path) -> Iterator[Path]:
    """Write a copy of the graph with activations in f32 beside it, for the time of the check."""
    path = graph.with_name(_EXACT_FILE)
    model = onnx.load_model(graph, load_external_data=False)
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = _IN_F32
    path.write_bytes(model.SerializeToString())
    try:
        yield path
    finally:
        path.unlink()


def _load_model(directory: Path, family: str) -> Any:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            directory,
            dtype=torch.float32,
            attn_implementation="eager",
            use_safetensors=True,
            output_loading_info=True,
            **_expert_options(directory),
        )
    except (ValueError, KeyError, ImportError, OSError) as error:
        raise base_loading_error(family, error) from None
    missing = sorted([*report["missing_keys"], *map(str, report["mismatched_keys"])])
    if missing:
        raise DataError(f"transformers finds no {missing[0]} in the merged {family} model", _USE_GGUF)
    return model.eval()


def _expert_options(directory: Path) -> dict[str, str]:
    """Compute experts by gathering their weights: other implementations sort tokens, which a trace would bake in."""
    text = (directory / "config.json").read_text(encoding="utf-8")
    return {"experts_implementation": "batched_mm"} if "expert" in text else {}


def _cache_shapes(model: Any, family: str) -> tuple[list[tuple[int, int]], int]:
    """Return (heads, head size) of each key and value in turn, and the width of the logits."""
    found = model(input_ids=torch.zeros(1, 2, dtype=torch.long), use_cache=True)
    cache = found.past_key_values
    layers = getattr(cache, "layers", None) or [None]
    shapes = []
    for layer in layers:
        for part in (getattr(layer, "keys", None), getattr(layer, "values", None)):
            if part is None or part.dim() != 4:
                raise _unsupported(
                    family, f"its {type(layer or cache).__name__} keeps a state other than keys and values"
                )
            shapes.append((part.shape[1], part.shape[3]))
    return shapes, found.logits.shape[-1]


def _compute_probe(model: Any, context: int) -> Probe:
    """Compute the logits of random tokens, more of them than a short sliding window holds."""
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None) or 0
    count = min(context, max(_PROBE, window + _BEYOND if window <= _FAR else 0))
    ids = np.random.default_rng(0).integers(0, config.vocab_size, count)
    with silence_libraries(), torch.no_grad():
        return Probe(ids, model(input_ids=torch.from_numpy(ids)[None]).logits[0].float().numpy())


def _trace_graph(model: Any, family: str, shapes: Sequence[tuple[int, int]], file: Path) -> onnx.ModelProto:
    """Trace the graph, with the weights as inputs under their names; discard what torch prints."""
    past = [torch.randn(_BATCH, heads, _PAST, size) for heads, size in shapes]
    ids = torch.arange(_BATCH * _NEW).reshape(_BATCH, _NEW)
    mask = torch.ones(_BATCH, _PAST + _NEW, dtype=torch.long)
    inputs, outputs = _tensor_names(len(shapes))
    try:
        with _discard_output():
            torch.onnx.export(
                _Decoder(model),
                (ids, mask, *past),
                file,
                input_names=inputs,
                output_names=outputs,
                dynamic_axes=_dynamic_axes(inputs, outputs),
                opset_version=OPSET,
                export_params=False,
                do_constant_folding=False,  # it would transpose matrices, under new names
                dynamo=False,
            )
    except Exception as error:  # noqa: BLE001 - whatever a model's code does under a trace
        raise _unsupported(family, f"torch.onnx.export cannot trace it: {_first_line(error)}") from None
    return onnx.load_model(file, load_external_data=False)


@contextmanager
def _discard_output() -> Iterator[None]:
    """Discard what Python and C++ print: after an error the exporter prints its whole graph."""
    library = ctypes.CDLL(None)
    streams = sys.stdout, sys.stderr
    kept = [os.dup(number) for number in (1, 2)]
    try:
        for stream in streams:
            stream.flush()
        with open(os.devnull, "wb") as nothing:  # noqa: PTH123 - not a file of ours
            for number in (1, 2):
                os.dup2(nothing.fileno(), number)
        yield
    finally:
        for stream in streams:
            stream.flush()
        library.fflush(None)
        for number, old in zip((1, 2), kept, strict=True):
            os.dup2(old, number)
            os.close(old)


def _tensor_names(caches: int) -> tuple[list[str], list[str]]:
    each = [f"{layer}.{part}" for layer in range(caches // 2) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{name}" for name in each)]
    return inputs, ["logits", *(f"present.{name}" for name in each)]


def _dynamic_axes(inputs: Sequence[str], outputs: Sequence[str]) -> dict[str, dict[int, str]]:
    text = {"input_ids": {0: "batch", 1: "sequence"}, "attention_mask": {0: "batch", 1: "total"}}
    past = {name: {0: "batch", 2: "past"} for name in inputs[2:]}
    present = {name: {0: "batch", 2: "total"} for name in outputs[1:]}
    return {**text, **past, "logits": {0: "batch", 1: "sequence"}, **present}


def _declare_output_shapes(graph: onnx.ModelProto, shapes: Sequence[tuple[int, int]], vocabulary: int) -> None:
    """Declare the fixed sizes of the outputs; the exporter infers few of them."""
    wanted: list[list[int | str]] = [["batch", "sequence", vocabulary]]
    wanted += [["batch", heads, "total", size] for heads, size in shapes]
    for value, shape in zip(graph.graph.output, wanted, strict=True):
        value.CopyFrom(onnx.helper.make_tensor_value_info(value.name, onnx.TensorProto.FLOAT, shape))
    del graph.graph.value_info[:]


def _model_sizes(config: Any, shapes: Sequence[tuple[int, int]], vocabulary: int, context: int) -> DecoderSizes:
    kv_heads, size = shapes[0]
    sizes = config.hidden_size, config.num_hidden_layers, config.num_attention_heads
    return DecoderSizes(vocabulary, context, *sizes, kv_heads, size, in_place=False)


def _run_in_steps(session: Any, ids: NDArray[np.int64], steps: Sequence[int]) -> NDArray[np.float32]:
    """Compute logits [n, vocabulary] with the given numbers of tokens per call."""
    past = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_")
    }
    found, done = [], 0
    for count in steps:
        text = {"input_ids": ids[None, done : done + count], "attention_mask": np.ones((1, done + count), np.int64)}
        logits, *present = session.run(None, text | past)
        past = dict(zip(past, present, strict=True))
        found.append(logits[0])
        done += count
    whole: NDArray[np.float32] = np.concatenate(found)
    return whole


def _mean_kld(probe: Probe, logits: NDArray[np.float32]) -> float:
    if logits.shape != probe.logits.shape:
        return float("inf")
    return float(edgetune_native.compare(probe.logits, logits, probe.ids).kld.mean())


def _unsupported(family: str, why: str) -> ArchitectureError:
    return ArchitectureError(f"{family} cannot be written as ONNX: {why}", _USE_GGUF)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
