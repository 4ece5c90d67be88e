"""Importance matrices as llama-imatrix writes them."""

from __future__ import annotations

from pathlib import Path

import gguf as gguf_package
import numpy as np
from numpy.typing import NDArray

from tests.export_requests import plan_gguf

Weights = dict[str, NDArray[np.float32]]


def weights(base: Path, seed: int = 3) -> Weights:
    (plan,) = plan_gguf(base, ["q4_k_m"])
    random = np.random.default_rng(seed)
    matrices = [row for row in plan.rows if len(row.shape) == 2 and not row.name.startswith("token_embd")]
    return {row.name: random.gamma(0.3, 2, row.shape[-1]).astype(np.float32) for row in matrices}


def write(path: Path, weights: Weights, count: int = 3) -> Path:
    writer = gguf_package.GGUFWriter(path, "")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", ["calibration.txt"])
    writer.add_uint32("imatrix.chunk_count", 7)
    writer.add_uint32("imatrix.chunk_size", 512)
    for name, values in weights.items():
        writer.add_tensor(f"{name}.in_sum2", (values * count).reshape(1, -1))
        writer.add_tensor(f"{name}.counts", np.array([[count]], np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
