"""Plain ONNX Runtime on an exported folder. Nothing of edgetune is used."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
from numpy.typing import NDArray


def open_session(folder: Path) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = 2
    return onnxruntime.InferenceSession(folder / "model.onnx", options, providers=["CPUExecutionProvider"])


def logits(
    folder: Path, ids: Sequence[int], steps: Sequence[int] | None = None, wanted: tuple[int, int] | None = None
) -> NDArray[np.float32]:
    """Logits after each token, [len(ids), vocabulary], with `steps` tokens a call (all at once by default).

    `wanted` asks for the logits of some positions of each call only.
    """
    session = open_session(folder)
    past = {
        entry.name: np.zeros([1, entry.shape[1], 0, entry.shape[3]], np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_")
    }
    found, done = [], 0
    for count in steps or [len(ids)]:
        given = {
            "input_ids": np.array([ids[done : done + count]], np.int64),
            "attention_mask": np.ones([1, done + count], np.int64),
            **past,
            **({} if wanted is None else {"logits_range": np.array(wanted, np.int64)}),
        }
        first, *present = session.run(None, given)
        past = dict(zip(past, present, strict=True))
        found.append(first[0])
        done += count
    whole: NDArray[np.float32] = np.concatenate(found)
    return whole


def onnx_weight(folder: Path, name: str) -> NDArray[np.float32]:
    """A weight of the graph in f32, read from the file beside it."""
    graph = onnx.load(folder / "model.onnx", load_external_data=False).graph
    tensor = next(tensor for tensor in graph.initializer if tensor.name == name)
    place = {entry.key: entry.value for entry in tensor.external_data}
    stored = (folder / place["location"]).read_bytes()[int(place["offset"]) :][: int(place["length"])]
    return np.frombuffer(stored, "<f4").reshape(tensor.dims)
