"""The activations that the matrices of a model are multiplied with, on some tokens of the held-out rows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from edgetune.reference.codecs import F32
from edgetune.reference.scored_rows import ScoredRows
from edgetune.runtime.onnx import model_file
from edgetune.runtime.onnx.session import open_session
from edgetune.runtime.threads import default_threads
from edgetune.sensitivity.onnx import graphs

TOKENS = 128
"""Positions whose activations are stored: k numbers each; matrices with the same input share them."""


def capture(folder: Path, names: Sequence[str], rows: ScoredRows, place: Path) -> Mapping[str, F32]:
    """Return the activations [n, k] of each named matrix, memory-mapped from files in `place`.

    The tokens are spread over all rows. The first token of a row is left out: as an attention sink its activations are
    hundreds of times larger than all others.
    """
    graph, outputs = graphs.write_capturing_graph(folder, names)
    model = model_file.read(graph)
    session = open_session(model, default_threads(model.size))
    spread = _spread(rows)
    count = sum(len(positions) for positions in spread)
    wanted = list(dict.fromkeys(outputs.values()))
    mapped: dict[str, F32] = {}
    past = {
        entry.name: np.zeros((1, entry.shape[1], 0, entry.shape[3]), np.float32)
        for entry in session.get_inputs()
        if entry.name.startswith("past_")
    }
    done = 0
    for (ids, _, _), positions in zip(rows, spread, strict=True):
        if not len(positions):
            continue
        length = int(positions[-1]) + 1
        text = {
            "input_ids": ids[None, :length].astype(np.int64),
            "attention_mask": np.ones((1, length), np.int64),
            graphs.POSITIONS: positions,
        }
        found = dict(zip(wanted, session.run(wanted, text | past), strict=True))
        for name, values in found.items():
            if name not in mapped:
                shape = (count, values.shape[2])
                mapped[name] = np.lib.format.open_memmap(place / f"{name}.npy", "w+", np.float32, shape)
            mapped[name][done : done + len(positions)] = values[0]
        done += len(positions)
    return {name: mapped[output] for name, output in outputs.items()}


def _spread(rows: ScoredRows) -> list[np.ndarray[tuple[int], np.dtype[np.int64]]]:
    """Return the positions of each row, spread evenly over all tokens up to the last scored one."""
    places = [
        (row, position) for row, (_, scored, _) in enumerate(rows) for position in range(1, max(scored, default=0))
    ]
    chosen = np.unique(np.linspace(0, len(places) - 1, min(TOKENS, len(places))).round().astype(np.int64))
    kept: list[list[int]] = [[] for _ in range(len(rows))]
    for index in chosen:
        row, position = places[index]
        kept[row].append(position)
    return [np.array(positions, np.int64) for positions in kept]
