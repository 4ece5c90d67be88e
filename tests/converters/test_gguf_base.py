"""A GGUF file as the base: what comes out is what the Hugging Face model gives, and damage is one sentence."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import edgetune_native
from edgetune_converters import gguf
from edgetune_converters.checkpoint import Checkpoint
from edgetune_converters.errors import CheckpointError, EdgetuneError, TokenizerError
from edgetune_converters.export import export
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.types import BY_ID
from edgetune_converters.gguf.values import Value, of_plain, strings, u32
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.gguf_base import GgufBase, open_base
from tests.converters import family_models, runtime, tiny

FAMILIES = [
    "gemma", "gemma2", "phi3", "phi2", "smollm3", "stablelm", "olmo2", "olmo3", "granite", "exaone4", "starcoder2",
    "glm4", "command-r",
]  # fmt: skip
REFUSED = {
    "gemma3": "rope.freq_base_swa is 1000.0, read back as 10000.0",
    "phi3-long": "long_factor",
    "mixtral": "expert_count",
    "gpt2": "fused, turned or one by one",
    "bloom": "fused, turned or one by one",
    "command-r-plus": "has no place in the Command-R family",
}


def made(name: str, directory: Path) -> Path:
    """A random model of one of the tests' families."""
    return tiny.base(name, directory) if name in tiny.MODELS else family_models.base(name, directory)


@pytest.mark.parametrize("name", [*tiny.MODELS, *FAMILIES])
def test_read_back_and_written_again_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    export(made(name, tmp_path / "base"), {"f32": one}, name="x")
    export(one, {"f32": other})
    first, second = gguf.read(one), gguf.read(other)
    assert {**first.metadata, "edgetune.base.sha256": ""} == {**second.metadata, "edgetune.base.sha256": ""}
    assert [entry.name for entry in first.tensors] == [entry.name for entry in second.tensors]
    assert all(np.array_equal(first.tensor(entry.name), second.tensor(entry.name)) for entry in first.tensors)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_read_back_is_refused(name: str, tmp_path: Path) -> None:
    export(made(name, tmp_path / "base"), {"f32": tmp_path / "x.gguf"})
    with pytest.raises(CheckpointError, match=REFUSED[name]):
        open_base(tmp_path / "x.gguf")


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen3"])
def test_an_adapter_on_a_file_is_that_on_the_model(name: str, tmp_path: Path) -> None:
    base = tiny.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    export(base, {"f32": tmp_path / "base.gguf"})
    export(base, {"f32": tmp_path / "one.gguf"}, adapter=adapter)
    export(tmp_path / "base.gguf", {"f32": tmp_path / "other.gguf"}, adapter=adapter, tokenizer=base)
    one, other = gguf.read(tmp_path / "one.gguf"), gguf.read(tmp_path / "other.gguf")
    assert all(np.array_equal(one.tensor(entry.name), other.tensor(entry.name)) for entry in one.tensors)
    ids = tiny.random_ids()
    trained = tiny.torch_logits(base, adapter, ids)
    assert tiny.divergence(trained, runtime.logits(tmp_path / "other.gguf", ids))[0] < 1e-8


@pytest.mark.parametrize("stored", ["q8_0", "q4_k_m", "bf16"])
def test_rows_are_those_of_the_stored_blocks(stored: str, tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base", hidden_size=256, intermediate_size=512, head_dim=64)
    path = tmp_path / "x.gguf"
    export(base, {stored: path})
    (receipt,) = export(path, {"f32": tmp_path / "y.gguf"})
    assert receipt.base == GgufBase(path).identity()
    source, target = gguf.read(path), gguf.read(tmp_path / "y.gguf")
    for entry in source.tensors:
        wanted = edgetune_native.dequantize(source.tensor(entry.name), entry.type, entry.shape[-1])
        assert np.array_equal(target.tensor(entry.name).view(np.float32), wanted), entry.name
    original, found = Checkpoint(base), GgufBase(path)
    name = "model.layers.1.self_attn.q_proj.weight"
    rows = np.array([70, 3, 64, 5])
    assert found.rows(name, rows) == pytest.approx(original.rows(name, rows), abs=0.2)
    assert np.array_equal(found.rows(name, rows), found.rows(name, slice(None))[rows])
    assert np.array_equal(found.rows(name, slice(2, 9)), found.rows(name, slice(None))[2:9])


def test_the_template_can_be_replaced(tmp_path: Path) -> None:
    export(tiny.base("qwen3", tmp_path / "base"), {"f32": tmp_path / "x.gguf"})
    export(tmp_path / "x.gguf", {"f32": tmp_path / "y.gguf"}, chat_template="{{ x }}")
    assert gguf.read(tmp_path / "y.gguf").metadata["tokenizer.chat_template"] == "{{ x }}"


# -- bad input ---------------------------------------------------------------------------------------------------------


def written(path: Path, metadata: dict[str, Value]) -> Path:
    """A file of one small tensor."""
    spec = TensorSpec("token_embd.weight", (4, 8), next(kind for kind in BY_ID.values() if kind.name == "f32"))
    with GgufWriter(path, metadata, [spec]) as writer:
        writer.append(np.zeros((4, 8), np.float32))
        writer.verify()
        writer.publish()
    return path


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "is of the architecture None"),
        ({"general.architecture": of_plain("clip")}, "architecture 'clip', which is not known"),
        ({"general.architecture": of_plain("llama"), "split.count": u32(3)}, "one part of a split file"),
        ({"general.architecture": of_plain("llama")}, "num_hidden_layers must be a positive integer, not absent"),
        ({"general.architecture": of_plain("llama"), "llama.block_count": of_plain("x")}, "not 'x'"),
        ({"general.architecture": of_plain("qwen3"), "qwen3.block_count": strings(["x"])}, r"not \['x'\]"),
    ],
)
def test_files_that_are_no_base(metadata: dict[str, Value], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_base(written(tmp_path / "x.gguf", metadata))


def test_other_files(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_base(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="there is no model directory"):
        open_base(tmp_path / "y.gguf")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    export(tiny.base("llama3-rope", folder / "base", num_hidden_layers=1), {"q8_0": folder / "x.gguf"})
    return (folder / "x.gguf").read_bytes()


def test_a_file_without_tokenizer(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(small.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    with pytest.raises(TokenizerError, match="no tokens for an embedding of 523 rows"):
        export(path, {"f32": tmp_path / "y.gguf"})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    flips=st.lists(st.tuples(st.booleans(), st.integers(0, 1 << 20), st.integers(0, 7)), min_size=1, max_size=4),
)
def test_flipped_bits_are_an_error_or_harmless(
    flips: list[tuple[bool, int, int]], small: bytes, tmp_path: Path
) -> None:
    """Of the metadata before the tokens, or of the names and shapes of tensors."""
    raw = bytearray(small)
    tokens = raw.find(b"tokenizer.ggml.tokens")
    names = raw.rfind(b"blk.0.attn_k.weight") - 200
    for in_metadata, offset, bit in flips:
        place = offset % tokens if in_metadata else names + offset % 1500
        raw[place % len(raw)] ^= 1 << bit
    path, output = tmp_path / "x.gguf", tmp_path / "out" / "y.gguf"
    path.write_bytes(raw)
    output.unlink(missing_ok=True)
    try:
        export(path, {"f32": output})
    except EdgetuneError:
        assert not output.exists()
    else:
        assert gguf.read(output).tensors
