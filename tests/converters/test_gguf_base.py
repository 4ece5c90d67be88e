"""A GGUF file as the base: the export equals that of the Hugging Face model; damage is reported in one sentence."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import edgetune_native
from edgetune_converters import gguf
from edgetune_converters.errors import CheckpointError, EdgetuneError, TokenizerError
from edgetune_converters.gguf.layout import TensorSpec
from edgetune_converters.gguf.types import BY_ID
from edgetune_converters.gguf.values import Value, strings, u32, value_of
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.gguf_base import GgufBase, open_base
from tests.converters import family_models, runtime, tiny
from tests.export_requests import export

# fused, turned, stacked and with experts; the others, which are slow only because they are many, come after
FAMILIES = [
    "gemma2", "gemma3", "phi3-long", "phi2", "stablelm-12b", "granite", "mixtral", "gpt2", "neox", "falcon-40b",
    "deepseek-v2", "gpt-oss", "llama4", "lfm2", "minicpm",
]  # fmt: skip
OTHERS = [name for name in family_models.CASES if name not in FAMILIES and "before" not in name]


def made(name: str, directory: Path) -> Path:
    """A random model of one of the tests' families."""
    return tiny.base(name, directory) if name in tiny.MODELS else family_models.base(name, directory)


_SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in OTHERS]


@pytest.mark.parametrize("name", [*tiny.MODELS, *FAMILIES, *_SLOW])
def test_read_back_and_written_again_it_is_the_same_file(name: str, tmp_path: Path) -> None:
    one, other = tmp_path / "one.gguf", tmp_path / "other.gguf"
    export(made(name, tmp_path / "base"), {"f32": one}, name="x")
    export(one, {"f32": other})
    first, second = gguf.read(one), gguf.read(other)
    assert {**first.metadata, "edgetune.base.sha256": ""} == {**second.metadata, "edgetune.base.sha256": ""}
    assert [entry.name for entry in first.tensors] == [entry.name for entry in second.tensors]
    assert all(np.array_equal(first.tensor(entry.name), second.tensor(entry.name)) for entry in first.tensors)


# what the adapter is on: parts of fused matrices, single experts, all experts at once, transposed and low-rank ones
_EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
ADAPTERS: dict[str, dict[str, Any]] = {
    "neox": {},
    "gpt2": {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True},
    "falcon-40b": {"use_rslora": True},
    "deepseek-v2": {},
    "qwen3moe": _EXPERTS,
    "gpt-oss": _EXPERTS,
}


@pytest.mark.parametrize("name", ADAPTERS)
def test_an_adapter_finds_the_tensors_of_the_model(name: str, tmp_path: Path) -> None:
    base = made(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    export(base, {"f32": tmp_path / "base.gguf"})
    export(base, {"f32": tmp_path / "one.gguf"}, adapter=adapter)
    export(tmp_path / "base.gguf", {"f32": tmp_path / "other.gguf"}, adapter=adapter, tokenizer=base)
    one, other = gguf.read(tmp_path / "one.gguf"), gguf.read(tmp_path / "other.gguf")
    assert {entry.name for entry in one.tensors} == {entry.name for entry in other.tensors}
    assert all(np.array_equal(one.tensor(entry.name), other.tensor(entry.name)) for entry in one.tensors)
    before = gguf.read(tmp_path / "base.gguf")
    assert any(not np.array_equal(one.tensor(entry.name), before.tensor(entry.name)) for entry in before.tensors)


@pytest.mark.parametrize("stored", ["f16", "bf16", "q8_0", "q4_0"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "gemma2"])
def test_the_same_type_again_is_the_same_bytes(name: str, stored: str, tmp_path: Path) -> None:
    """Of q4_0 not always: a block none of whose weights took the largest level is scaled anew, by less than a level."""
    base = made(name, tmp_path / "base")
    export(base, {stored: tmp_path / "one.gguf"}, allow_fallback=True)
    export(tmp_path / "one.gguf", {stored: tmp_path / "other.gguf"}, allow_fallback=True)
    one, other = gguf.read(tmp_path / "one.gguf"), gguf.read(tmp_path / "other.gguf")
    assert [(entry.name, entry.type) for entry in one.tensors] == [(entry.name, entry.type) for entry in other.tensors]
    for entry in one.tensors:
        a, b = (
            edgetune_native.dequantize(file.tensor(entry.name), entry.type, entry.shape[-1]) for file in (one, other)
        )
        assert np.array_equal(a, b) or entry.type not in ("f32", "f16", "bf16", "q8_0"), entry.name
        assert np.abs(a - b).max() <= np.abs(a).max() / 8, entry.name


# -- in several files --------------------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> list[Path]:
    """A model in three or more files, and x.gguf, the same in one."""
    export(tiny.base("llama", tmp_path / "base"), {"f32": tmp_path / "x.gguf"})
    export(tmp_path / "base", {"f32": tmp_path / "parts" / "x.gguf"}, split_max_size=400_000, name="base")
    return sorted((tmp_path / "parts").glob("*.gguf"))


def test_a_model_in_several_files_is_read(parts: list[Path], tmp_path: Path) -> None:
    assert len(parts) > 2
    (receipt,) = export(parts[0], {"f32": tmp_path / "y.gguf"})
    one, other = gguf.read(tmp_path / "x.gguf"), gguf.read(tmp_path / "y.gguf")
    assert [entry.name for entry in one.tensors] == [entry.name for entry in other.tensors]
    assert all(np.array_equal(one.tensor(entry.name), other.tensor(entry.name)) for entry in one.tensors)
    assert set(receipt.base) == {path.name for path in parts}
    assert not any(key.startswith("split.") for key in other.metadata)


def test_parts_of_different_models_are_refused(parts: list[Path], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="its name is not that of the first"):
        open_base(parts[1])
    shutil.copy(parts[1], tmp_path / "kept")
    shutil.copy(parts[2], parts[1])
    with pytest.raises(CheckpointError, match="is part 2 of"):
        open_base(parts[0])
    parts[1].unlink()
    with pytest.raises(CheckpointError, match="is missing: "):
        open_base(parts[0])
    parts[1].write_bytes((tmp_path / "kept").read_bytes()[:-400])
    with pytest.raises(CheckpointError, match="ends at byte"):
        open_base(parts[0])


def test_a_part_with_an_extra_tensor_is_refused(tmp_path: Path) -> None:
    keys = {"split.count": u32(2), "general.architecture": value_of("llama")}
    written(tmp_path / "x-00001-of-00002.gguf", keys | {"split.no": u32(0)})
    written(tmp_path / "x-00002-of-00002.gguf", keys | {"split.no": u32(1)})
    with pytest.raises(CheckpointError, match=r"'token_embd.weight' is in x-00001-of-00002.gguf and in x-00002"):
        open_base(tmp_path / "x-00001-of-00002.gguf")


def test_a_fused_tensor_that_lacks_a_part_is_refused(tmp_path: Path) -> None:
    export(made("gpt-oss", tmp_path / "base"), {"f32": tmp_path / "x.gguf"})
    raw = (tmp_path / "x.gguf").read_bytes().replace(b"blk.1.ffn_up_exps.weight", b"blk.1.ffn_ap_exps.weight")
    (tmp_path / "x.gguf").write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"(?s)gate_up_proj is not whole.*blk.1.ffn_ap_exps.weight has no place"):
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
    with GgufWriter.open(path, metadata, [spec]) as writer:
        writer.append(np.zeros((4, 8), np.float32))
        writer.verify()
        writer.publish()
    return path


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, "is of the architecture None"),
        ({"general.architecture": value_of("clip")}, "architecture 'clip', which is not known"),
        ({"general.architecture": value_of("llama"), "split.count": u32(3)}, "one part of a split file of 3"),
        ({"general.architecture": value_of("llama")}, "num_hidden_layers must be a positive integer, not absent"),
        ({"general.architecture": value_of("llama"), "llama.block_count": value_of("x")}, "not 'x'"),
        ({"general.architecture": value_of("qwen3"), "qwen3.block_count": strings(["x"])}, r"not \['x'\]"),
    ],
)
def test_files_that_cannot_be_a_base_are_refused(metadata: dict[str, Value], said: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=said):
        open_base(written(tmp_path / "x.gguf", metadata))


def test_files_of_other_kinds_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"no")
    with pytest.raises(CheckpointError, match="is not a GGUF file"):
        open_base(tmp_path / "x.gguf")
    with pytest.raises(CheckpointError, match="there is no model directory"):
        open_base(tmp_path / "y.gguf")


class _File(bytes):
    """The bytes of a file. Hypothesis must not print them: it warns of that, and the warning hides what has failed."""

    def __repr__(self) -> str:
        return f"<{len(self)} bytes>"


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("small")
    export(tiny.base("llama3-rope", folder / "base", num_hidden_layers=1), {"q8_0": folder / "x.gguf"})
    return _File((folder / "x.gguf").read_bytes())


def test_a_file_without_tokenizer_is_refused(small: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    path.write_bytes(small.replace(b"tokenizer.ggml.tokens", b"tokenizer.ggml.tokenz"))
    with pytest.raises(TokenizerError, match="no tokens for an embedding of 523 rows"):
        export(path, {"f32": tmp_path / "y.gguf"})


def test_a_base_with_nan_is_refused(small: bytes, tmp_path: Path) -> None:
    """Found by a long run of the test below: arithmetic with a signalling NaN warns before it is refused."""
    path, raw = tmp_path / "x.gguf", bytearray(small)
    path.write_bytes(raw)
    entry = next(entry for entry in gguf.read(path).tensors if entry.name == "output_norm.weight")
    raw[entry.offset : entry.offset + 4] = b"\x01\x00\x80\x7f"
    path.write_bytes(raw)
    with pytest.raises(CheckpointError, match=r"norm\.weight holds 1 weights that are NaN"):
        export(path, {"f32": tmp_path / "y.gguf"})


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
