"""What decoding a token reads, and how fast memory is read."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.numpy import load_file

from edgetune.benchmarking.memory import MemorySpeed, bytes_per_token, measure_memory
from tests.converters import family_models
from tests.runtime import models

EMBEDDING = "model.embed_tokens.weight"


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["gguf", "onnx", "portable"])
def test_a_token_reads_all_weights_but_a_table_of_which_it_takes_a_row(kind: str, tied: bool, tmp_path: Path) -> None:
    base = models.base(tmp_path / "base", "qwen2", tie_word_embeddings=tied)
    tensors = load_file(base / "model.safetensors")
    assert ("lm_head.weight" in tensors) is not tied
    expected = sum(tensor.size * 4 for tensor in tensors.values())
    if not tied:
        expected -= tensors[EMBEDDING].size * 4
    if kind == "gguf":
        found = bytes_per_token(models.gguf(base, tmp_path / "f32.gguf"))
    else:
        found = bytes_per_token(models.onnx(base, tmp_path / "f32", portable=kind == "portable"))
    assert expected <= found < expected * 1.01, "small constants of the graph are counted, too"


def test_an_int4_graph_reads_the_blocks_and_scales_of_its_matrices(tmp_path: Path) -> None:
    base = models.base(tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    weights = sum(tensor.size for tensor in tensors.values())
    found = bytes_per_token(models.onnx(base, tmp_path / "int4", "int4"))
    assert weights / 2 < found < weights * 1.5


def test_of_the_experts_those_count_that_a_token_uses(tmp_path: Path) -> None:
    base = family_models.base("qwen3moe", tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    share = 2 / 5  # num_experts_per_tok and num_experts of the case
    expected = sum(tensor.size * 4 * (share if ".experts." in name else 1) for name, tensor in tensors.items())
    found = bytes_per_token(models.gguf(base, tmp_path / "f32.gguf"))
    assert found == pytest.approx(expected, rel=1e-6)


def test_memory_is_read_and_copied_by_all_threads() -> None:
    found = measure_memory(2, size=8 << 20)
    assert found.threads == 2
    assert found.read > 1e8
    assert found.copied > 1e8
    assert found.bandwidth == max(found.read, found.copied)
    assert MemorySpeed(2, 3.0, 4.0).best(MemorySpeed(2, 5.0, 2.0)) == MemorySpeed(2, 5.0, 4.0)
