"""One model over several files: what llama.cpp loads through the first, all parts or none, and no half sets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune_converters import gguf
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf.writer import GgufWriter
from edgetune_converters.provenance.receipts import Receipt
from tests.converters import runtime, tiny
from tests.export_requests import export

LIMIT = 250_000


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama", tmp_path_factory.mktemp("base"))


def test_the_parts_are_loaded_through_the_first(base: Path, tmp_path: Path) -> None:
    (whole,) = export(base, {"f32": tmp_path / "whole.gguf"})
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, split_max_size=LIMIT)
    parts = sorted(path for path in tmp_path.iterdir() if path.name.startswith("x-"))
    count = len(parts)
    assert count > 4
    assert [path.name for path in parts] == [f"x-{n:05d}-of-{count:05d}.gguf" for n in range(1, count + 1)]
    assert all(path.stat().st_size <= LIMIT for path in parts)
    assert (receipt.artifact, list(receipt.files)) == (str(parts[0]), [path.name for path in parts])
    assert receipt.size == sum(path.stat().st_size for path in parts)
    read = [gguf.read(path) for path in parts]
    tensors = sum(len(part.tensors) for part in read)
    assert [part.metadata["split.no"] for part in read] == list(range(count))
    assert {(part.metadata["split.count"], part.metadata["split.tensors.count"]) for part in read} == {(count, tensors)}
    assert {name for part in read for name in (entry.name for entry in part.tensors)} == whole.tensors.keys()
    ids = tiny.random_ids(32)
    assert np.array_equal(runtime.logits(parts[0], ids), runtime.logits(tmp_path / "whole.gguf", ids))


def test_the_receipt_proves_every_part(base: Path, tmp_path: Path) -> None:
    (receipt,) = export(base, {"q8_0": tmp_path / "x.gguf"}, split_max_size=100_000)
    receipt.write()
    read = Receipt.read(Path(receipt.artifact))
    read.check()
    last = tmp_path / list(receipt.files)[-1]
    content = last.read_bytes()
    last.write_bytes(content[:-1] + b"x")
    with pytest.raises(ArtifactError, match="its contents have changed"):
        read.check()
    last.unlink()
    with pytest.raises(ArtifactError, match="is missing"):
        read.check()


def test_what_fits_is_one_file(base: Path, tmp_path: Path) -> None:
    (receipt,) = export(base, {"q8_0": tmp_path / "x.gguf"}, split_max_size=10**9)
    assert [path.name for path in tmp_path.iterdir()] == ["x.gguf"]
    assert receipt.files == {}


def test_a_tensor_is_never_cut(base: Path, tmp_path: Path) -> None:
    (receipt,) = export(base, {"f32": tmp_path / "x.gguf"}, split_max_size=1)
    assert len(receipt.files) == len(receipt.tensors)


def test_all_parts_or_none(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = GgufWriter.publish
    published: list[GgufWriter] = []

    def fails(writer: GgufWriter) -> str:
        if len(published) == 2:
            raise KeyboardInterrupt
        published.append(writer)
        return publish(writer)

    monkeypatch.setattr(GgufWriter, "publish", fails)
    with pytest.raises(KeyboardInterrupt):
        export(base, {"f32": tmp_path / "x.gguf"}, split_max_size=LIMIT)
    assert "00001-of" not in "".join(writer.path.name for writer in published)
    assert list(tmp_path.iterdir()) == []
