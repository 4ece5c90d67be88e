"""The export as a whole: several files from one read, nothing left behind, bounded memory, bad input refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import edgetune_native
from edgetune_converters import gguf
from edgetune_converters.architectures import ModelConfig, bind, family_of
from edgetune_converters.errors import (
    AdapterError,
    ArchitectureError,
    ArtifactError,
    CheckpointError,
    EdgetuneError,
    RecipeError,
)
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.merging import stream
from edgetune_converters.provenance.receipts import Receipt
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import imatrices, tiny
from tests.export_requests import export


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.adapter(base, tmp_path_factory.mktemp("adapter"))


# -- one read, several files -------------------------------------------------------------------------------------------


def test_files_from_one_read_are_those_of_separate_reads(base: Path, adapter: Path, tmp_path: Path) -> None:
    together = {name: tmp_path / f"{name}.gguf" for name in ("f32", "q8_0", "bf16")}
    receipts = export(base, together, adapter=adapter)
    for name, receipt in zip(together, receipts, strict=True):
        (alone,) = export(base, {name: tmp_path / "alone.gguf"}, adapter=adapter, threads=1)
        assert alone.sha256 == receipt.sha256
        assert (tmp_path / "alone.gguf").read_bytes() == together[name].read_bytes()


@pytest.mark.parametrize("type_", ["q4_0", "iq4_nl"])
def test_delta_survival_compares_like_with_like(type_: str, base: Path, adapter: Path, tmp_path: Path) -> None:
    """With an importance matrix, base and merged model are both quantized with it: measured from two exports' files."""
    imatrix = imatrices.write(tmp_path / "imatrix.gguf", imatrices.weights(base))
    options: dict[str, Any] = {"imatrix": imatrix, "allow_fallback": True}
    before, after, exact = ({type_: tmp_path / f"{name}.gguf"} for name in ("before", "after", "exact"))
    export(base, before, **options)
    (receipt,) = export(base, after, adapter=adapter, measure_survival=True, **options)
    export(base, {"f32": exact[type_]}, adapter=adapter)
    export(base, {"f32": tmp_path / "base.gguf"})
    assert receipt.survival
    for name, survived in receipt.survival.items():
        change = _values(exact[type_], name) - _values(tmp_path / "base.gguf", name)
        moved = _values(after[type_], name) - _values(before[type_], name)
        # the measure takes W + D - D for W, whose last bit may differ: now and then a weight is rounded otherwise
        assert survived == pytest.approx(np.vdot(change, moved) / np.vdot(change, change), abs=5e-3)


def _values(path: Path, name: str) -> NDArray[np.float64]:
    """A tensor as numbers."""
    file = gguf.read(path)
    entry = next(each for each in file.tensors if each.name == name)
    stored = file.tensor(name)
    if entry.type == "f32":
        return stored.view(np.float32).astype(np.float64)
    return np.asarray(edgetune_native.dequantize(stored, entry.type, entry.shape[-1]), np.float64)


def test_progress_grows_to_the_total(base: Path, tmp_path: Path) -> None:
    calls: list[tuple[int, int]] = []
    export(base, {"f32": tmp_path / "x.gguf"}, progress=lambda done, total: calls.append((done, total)))
    assert calls == sorted(calls)
    assert calls[-1][0] == calls[-1][1] == sum(info.bytes for info in Checkpoint(base).tensors.values())


def test_metadata_carries_the_proof(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    extra: dict[str, str | int | float] = {"edgetune.run": "demo", "edgetune.steps": 7, "edgetune.loss": 0.5}
    export(base, {"q8_0": path}, adapter=adapter, name="Tiny", metadata=extra, chat_template="{{ x }}")
    found = gguf.read(path).metadata
    wanted = {
        "general.architecture": "llama", "general.name": "Tiny", "general.file_type": 7, "edgetune.recipe": "q8_0",
        "general.quantization_version": 2, "tokenizer.chat_template": "{{ x }}", "llama.rope.scaling.type": "linear",
        "llama.attention.head_count_kv": 2, "llama.vocab_size": 523, "edgetune.merge_base": "original", **extra,
    }  # fmt: skip
    assert {key: found.get(key) for key in wanted} == wanted
    assert len(str(found["edgetune.base.sha256"])) == len(str(found["edgetune.adapter.sha256"])) == 64


def test_the_receipt_is_written_and_proves_the_file(base: Path, adapter: Path, tmp_path: Path) -> None:
    path = tmp_path / "x.gguf"
    (receipt,) = export(base, {"q8_0": path}, adapter=adapter)
    assert receipt.write() == tmp_path / "x.gguf.receipt.json"
    read = Receipt.read(path)
    assert read == receipt
    read.check()
    assert json.loads((tmp_path / "x.gguf.receipt.json").read_text())["artifact"] == "x.gguf"
    damaged = bytearray(path.read_bytes())
    damaged[-40] ^= 1
    path.write_bytes(damaged)
    with pytest.raises(ArtifactError, match="its contents have changed"):
        read.check()


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_what_is_no_receipt(content: str | None, tmp_path: Path) -> None:
    if content is not None:
        (tmp_path / "x.gguf.receipt.json").write_text(content)
    with pytest.raises(ArtifactError):
        Receipt.read(tmp_path / "x.gguf")


def test_delta_survival_is_measured(base: Path, adapter: Path, tmp_path: Path) -> None:
    files = {name: tmp_path / f"{name}.gguf" for name in ("f32", "q8_0", "q4_0")}
    receipts = export(base, files, adapter=adapter, measure_survival=True)
    survived = {name: receipt.survival or {} for name, receipt in zip(files, receipts, strict=True)}
    assert len(survived["f32"]) == 7 * 3
    assert all(value == pytest.approx(1, abs=1e-5) for value in survived["f32"].values())
    assert all(0.8 < value < 1.2 for value in survived["q8_0"].values())
    assert np.mean(list(survived["q4_0"].values())) == pytest.approx(1, abs=0.2)


def test_a_sliding_window_shortens_the_stated_context(tmp_path: Path) -> None:
    base = tiny.base("mistral", tmp_path / "base")
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"})
    assert gguf.read(tmp_path / "x.gguf").metadata["llama.context_length"] == 250
    assert any("sliding window" in note for note in receipt.notes)


# -- memory ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [1, 4096, 40 * 1024])
def test_blocks_are_bounded_and_add_up(base: Path, adapter: Path, limit: int, tmp_path: Path) -> None:
    checkpoint = Checkpoint(base)
    config = ModelConfig(checkpoint.config)
    family = family_of(config)
    bound = bind(family, config, checkpoint.tensors)
    for tensor in stream.merged_tensors(family, config, checkpoint, bound, {}):
        whole = np.concatenate([block.rows for block in tensor.blocks(checkpoint)])
        pieces = [block.rows for block in tensor.blocks(checkpoint, limit)]
        assert np.array_equal(np.concatenate(pieces), whole)
        smallest = 4 * tensor.shape[-1]  # a row is never cut
        assert max(piece.nbytes for piece in pieces) <= max(limit, smallest)


def test_no_block_exceeds_the_bound_during_an_export(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert stream.BLOCK_BYTES == 4 * 1024 * 1024
    sizes: list[int] = []
    append = GgufWriter.append

    def counted(writer: GgufWriter, block: NDArray[np.generic]) -> None:
        sizes.append(block.nbytes)
        append(writer, block)

    monkeypatch.setattr(stream.MergedTensor.pieces, "__defaults__", (16 * 1024,))
    monkeypatch.setattr(GgufWriter, "append", counted)
    export(base, {"f32": tmp_path / "x.gguf"}, adapter=adapter)
    assert max(sizes) <= 16 * 1024
    assert len(sizes) > 40


# -- nothing half-written ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 20])
def test_an_interrupted_export_leaves_nothing(error: type[BaseException], at: int, base: Path, tmp_path: Path) -> None:
    calls = 0

    def interrupt(done: int, total: int) -> None:
        nonlocal calls
        calls += 1
        if calls == at:
            raise error

    with pytest.raises(error):
        export(base, {"f32": tmp_path / "a.gguf", "q8_0": tmp_path / "b.gguf"}, progress=interrupt)
    assert calls == at
    assert list(tmp_path.iterdir()) == []


def test_no_space_left(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(EdgetuneError, match="no space left: the export needs"):
        export(base, {"f32": tmp_path / "x.gguf"})
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_on_the_way(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, block: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(GgufWriter, "append", full)
    with pytest.raises(EdgetuneError, match="No space left on device"):
        export(base, {"f32": tmp_path / "x.gguf"})
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written(base: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(EdgetuneError, match=r"cannot be written: .* is a file"):
        export(base, {"f32": tmp_path / "file" / "x.gguf"})


# -- bad input ---------------------------------------------------------------------------------------------------------


def test_outputs_that_collide(base: Path, tmp_path: Path) -> None:
    with pytest.raises(EdgetuneError, match="two outputs would be written"):
        export(base, {"f32": tmp_path / "x.gguf", "q8_0": tmp_path / "." / "x.gguf"})
    with pytest.raises(EdgetuneError, match="is a directory"):
        export(base, {"f32": tmp_path})
    with pytest.raises(RecipeError, match="no storage type was given"):
        export(base, {})


def test_the_wrong_base(base: Path, adapter: Path, tmp_path: Path) -> None:
    identity = Checkpoint(base).identity()
    export(base, {"f32": tmp_path / "x.gguf"}, adapter=adapter, expected_base=identity)
    with pytest.raises(AdapterError, match=r"is not the base the adapter was trained on: model\.safetensors differs"):
        export(base, {"f32": tmp_path / "y.gguf"}, adapter=adapter, expected_base=identity | {"model.safetensors": "0"})
    assert not (tmp_path / "y.gguf").exists()


def _copy(base: Path, target: Path) -> Path:
    target.mkdir()
    for path in base.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def _reconfigured(base: Path, target: Path, **changes: Any) -> Path:
    copy = _copy(base, target)
    config = json.loads((copy / "config.json").read_text()) | changes
    (copy / "config.json").write_text(json.dumps(config))
    return copy


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"architectures": ["FooForCausalLM"]}, ArchitectureError, "FooForCausalLM, which is not supported"),
        ({"architectures": None, "model_type": None}, ArchitectureError, "`architectures` in config.json is empty"),
        ({"num_hidden_layers": 2}, ArchitectureError, r"(?s)9 tensors.*model\.layers\.2\..* is not known"),
        ({"num_hidden_layers": 4}, ArchitectureError, r"(?s)9 tensors.*model\.layers\.3\..* is missing"),
        ({"num_hidden_layers": None}, ArchitectureError, "num_hidden_layers must be a positive integer, not absent"),
        ({"num_hidden_layers": "3"}, ArchitectureError, "num_hidden_layers must be a positive integer, not '3'"),
        ({"vocab_size": 600}, ArchitectureError, r"has the shape \[523, 96\], config.json asks for \[600, 96\]"),
        ({"hidden_act": "gelu"}, ArchitectureError, "hidden_act 'gelu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, ArchitectureError, "rope type 'longrope'"),
        ({"rope_parameters": {"rope_type": "llama3"}}, ArchitectureError, "rope factor must be a positive number"),
        ({"rope_parameters": [1]}, ArchitectureError, "rope parameters must be an object"),
        ({"tie_word_embeddings": False}, ArchitectureError, r"lm_head.weight is missing"),
        ({"quantization_config": {"quant_method": "bitnet"}}, CheckpointError, r"already quantized \(bitnet\)"),
    ],
)
def test_configs_that_do_not_fit(
    changes: dict[str, Any], error: type[EdgetuneError], message: str, base: Path, tmp_path: Path
) -> None:
    with pytest.raises(error, match=message):
        export(_reconfigured(base, tmp_path / "base", **changes), {"f32": tmp_path / "x.gguf"})
    assert not (tmp_path / "x.gguf").exists()


def test_older_configs_state_rope_differently(base: Path, tmp_path: Path) -> None:
    older = {"rope_parameters": None, "rope_theta": 10000.0, "rope_scaling": {"type": "linear", "factor": 2.5}}
    export(_reconfigured(base, tmp_path / "base", **older), {"f32": tmp_path / "old.gguf"}, name="x")
    export(base, {"f32": tmp_path / "new.gguf"}, name="x")
    old, new = gguf.read(tmp_path / "old.gguf").metadata, gguf.read(tmp_path / "new.gguf").metadata
    assert {key for key in new if new[key] != old.get(key)} == {"edgetune.base.sha256"}


def test_a_truncated_base(base: Path, tmp_path: Path) -> None:
    copy = _copy(base, tmp_path / "base")
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="is truncated") as caught:
        export(copy, {"f32": tmp_path / "x.gguf"})
    assert "fetch it again" in str(caught.value.hint)


def _poke(base: Path, name: str, value: float) -> None:
    """Overwrite one weight of a tensor."""
    info = Checkpoint(base).tensors[name]
    with info.file.open("r+b") as file:
        file.seek(info.start + 8)
        file.write(np.float32(value).tobytes())


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_no_numbers(value: float, base: Path, tmp_path: Path) -> None:
    copy = _copy(base, tmp_path / "base")
    _poke(copy, "model.layers.1.mlp.up_proj.weight", value)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight holds 1 weights that are NaN"):
        export(copy, {"f32": tmp_path / "x.gguf"})
    assert not (tmp_path / "x.gguf").exists()


def test_weights_that_are_no_numbers_are_counted_in_the_whole_tensor(tmp_path: Path) -> None:
    """Which is read in blocks of 4 MiB; the embedding of 12,000 rows has two."""
    base = tiny.base("qwen3", tmp_path / "base", vocab_size=12_000)
    info = Checkpoint(base).tensors["model.embed_tokens.weight"]
    with info.file.open("r+b") as file:
        for at in (8, info.bytes - 8):
            file.seek(info.start + at)
            file.write(np.float32(np.nan).tobytes())
    with pytest.raises(CheckpointError, match=r"embed_tokens\.weight holds 2 weights that are NaN"):
        export(base, {"q8_0": tmp_path / "x.gguf"})


def test_weights_beyond_f16(base: Path, tmp_path: Path) -> None:
    copy = _copy(base, tmp_path / "base")
    _poke(copy, "model.layers.1.mlp.up_proj.weight", 70000.0)
    export(copy, {"bf16": tmp_path / "x.gguf"})
    with pytest.raises(RecipeError, match=r"blk\.1\.ffn_up\.weight holds weights beyond 65504"):
        export(copy, {"f16": tmp_path / "y.gguf"})


def test_an_equal_head_is_left_out_and_another_is_kept(tmp_path: Path) -> None:
    untied = tiny.base("llama", tmp_path / "base")
    export(untied, {"f32": tmp_path / "x.gguf"})
    assert "output.weight" in {entry.name for entry in gguf.read(tmp_path / "x.gguf").tensors}
    checkpoint = Checkpoint(untied)
    head, embedding = checkpoint.tensors["lm_head.weight"], checkpoint.tensors["model.embed_tokens.weight"]
    with embedding.file.open("rb") as source, head.file.open("r+b") as target:
        source.seek(embedding.start)
        target.seek(head.start)
        target.write(source.read(embedding.bytes))
    export(untied, {"f32": tmp_path / "x.gguf"})
    assert "output.weight" not in {entry.name for entry in gguf.read(tmp_path / "x.gguf").tensors}


@pytest.mark.parametrize("function", [lambda p: export(p, {"f32": p / "x.gguf"})])
def test_a_missing_base(function: Callable[[Path], Any], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="there is no model directory"):
        function(tmp_path / "nowhere")
