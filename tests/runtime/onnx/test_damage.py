"""Folders that are damaged, incomplete or hostile: one sentence, before ONNX Runtime sees them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from edgetune.runtime import RuntimeProblem, load
from edgetune.runtime.onnx import model_file
from edgetune.runtime.onnx.folder import OnnxFolder
from edgetune_converters.errors import ArtifactError
from tests.runtime.onnx.test_runtime import configure, edit


@pytest.fixture
def copy(folder: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(folder, tmp_path / "model")


def first_external(proto: Any) -> Any:
    return next(tensor for tensor in proto.graph.initializer if tensor.data_location == tensor.EXTERNAL)


def place(**entries: str) -> Callable[[Any], None]:
    """Change the location of the first tensor's data."""

    def change(proto: Any) -> None:
        tensor = first_external(proto)
        kept = {entry.key: entry.value for entry in tensor.external_data}
        del tensor.external_data[:]
        for key, value in {**kept, **entries}.items():
            tensor.external_data.add(key=key, value=value)

    return change


def test_missing_data_are_an_error(copy: Path) -> None:
    (copy / "model.onnx.data").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx\.data.*is missing"):
        load(copy)


@pytest.mark.parametrize("keep", [0, 1000, -1])
def test_truncated_data_are_an_error(copy: Path, keep: int) -> None:
    data = copy / "model.onnx.data"
    data.write_bytes(data.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=rf"has {data.stat().st_size} bytes|but there are"):
        load(copy)


def test_data_of_another_size_are_an_error(copy: Path) -> None:
    with (copy / "model.onnx.data").open("ab") as stream:
        stream.write(b"more")
    with pytest.raises(ArtifactError, match=r"was written with \d+ bytes of data"):
        load(copy)


def test_verify_finds_changed_data(copy: Path) -> None:
    data = bytearray((copy / "model.onnx.data").read_bytes())
    data[5000] ^= 1
    (copy / "model.onnx.data").write_bytes(data)
    with load(copy) as runtime, pytest.raises(ArtifactError, match="not the data that"):
        runtime.verify()


@pytest.mark.parametrize(
    "location", ["../model.onnx.data", "/etc/passwd", "", "a/../../x", "..", "C:\\data", "sub/model.onnx.data", "x\0y"]
)
def test_data_outside_the_folder_are_refused(copy: Path, location: str) -> None:
    shutil.copy(copy / "model.onnx.data", copy.parent)
    edit(copy, place(location=location))
    with pytest.raises(ArtifactError, match="outside its folder") as error:
        load(copy)
    assert "trust" in str(error.value.hint)


def test_a_link_to_data_outside_the_folder_is_refused(copy: Path) -> None:
    outside = shutil.move(copy / "model.onnx.data", copy.parent / "elsewhere")
    (copy / "model.onnx.data").symlink_to(outside)
    with pytest.raises(ArtifactError, match="outside its folder"):
        load(copy)


def test_a_snapshot_in_the_hub_cache_which_consists_of_links_is_read(copy: Path) -> None:
    blobs = copy.parent / "blobs"
    blobs.mkdir()
    for number, file in enumerate(sorted(copy.iterdir())):
        shutil.move(file, blobs / f"{number:064x}")
        file.symlink_to(os.path.relpath(blobs / f"{number:064x}", copy))
    model = model_file.read(OnnxFolder.open(copy).graph)
    assert model.data_files


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"offset": "99999999"}, "ends at"),
        ({"offset": "-4096"}, "offset '-4096'"),
        ({"offset": "9" * 30}, "offset"),
        ({"length": "8"}, "has 8 bytes"),
        ({"length": "0x10"}, "length '0x10'"),
        ({"location": "nowhere.data"}, "is missing"),
    ],
)
def test_impossible_locations_of_data_are_an_error(copy: Path, entries: dict[str, str], message: str) -> None:
    with pytest.raises(ArtifactError, match=message):
        load(edit(copy, place(**entries)))


def test_impossible_shapes_and_types_are_an_error(copy: Path) -> None:
    whole = (copy / "model.onnx").read_bytes()
    changes: dict[str, Callable[[Any], None]] = {
        "shape": lambda proto: first_external(proto).dims.__setitem__(0, -3),
        "bytes, but its shape and type need": lambda proto: first_external(proto).dims.append(1 << 40),
        "unknown type": lambda proto: setattr(first_external(proto), "data_type", 99),
    }
    for message, change in changes.items():
        (copy / "model.onnx").write_bytes(whole)
        with pytest.raises(ArtifactError, match=message):
            load(edit(copy, change))


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04" + bytes(500), b"GGUF", b"\x08\x0a"])
def test_a_file_that_is_not_an_onnx_model_is_an_error(copy: Path, content: bytes) -> None:
    (copy / "model.onnx").write_bytes(content)
    with pytest.raises(ArtifactError, match="is not an ONNX model"):
        load(copy)


def test_a_missing_graph_is_an_error(copy: Path) -> None:
    (copy / "model.onnx").unlink()
    with pytest.raises(ArtifactError, match=r"model\.onnx is missing"):
        load(copy)


# -- graphs that are whole and do not fit ------------------------------------------------------------------------------


def an_operator(domain: str, name: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        node = helper.make_node(name, ["logits_before"], ["logits"], domain=domain)
        last = next(node for node in proto.graph.node if "logits" in node.output)
        last.output[:] = ["logits_before" if output == "logits" else output for output in last.output]
        proto.graph.node.append(node)

    return change


def test_a_missing_operator_is_named(copy: Path) -> None:
    with pytest.raises(RuntimeProblem, match=r"com\.microsoft\.Divine, which the installed onnxruntime") as error:
        load(edit(copy, an_operator("com.microsoft", "Divine")))
    assert "pip install" in str(error.value.hint)


def test_a_missing_operator_comes_with_the_release_that_has_it(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this were ONNX Runtime 1.17: the session fails, and the operator is not among the available ones."""
    import onnxruntime

    from edgetune.runtime.onnx import operators

    have = operators.available_operators() - {("com.microsoft", "GroupQueryAttention")}
    monkeypatch.setattr(operators, "available_operators", lambda: have)

    def refuse(*_: Any, **__: Any) -> None:
        raise RuntimeError("not implemented")

    monkeypatch.setattr(onnxruntime, "InferenceSession", refuse)
    with pytest.raises(RuntimeProblem, match="GroupQueryAttention") as error:
        load(copy)
    assert "onnxruntime>=1.18" in str(error.value.hint)


def test_the_installed_onnxruntime_has_every_operator_of_the_exports() -> None:
    from edgetune.runtime.onnx import operators

    assert {("com.microsoft", name) for name in operators.FIRST_RELEASE} <= operators.available_operators()


def test_an_operator_set_that_is_too_new_is_an_error(copy: Path) -> None:
    def change(proto: Any) -> None:
        proto.opset_import[0].version = 99

    with pytest.raises(RuntimeProblem, match="operator set 99"):
        load(edit(copy, change))


def rename_input(old: str, new: str) -> Callable[[Any], None]:
    def change(proto: Any) -> None:
        for entry in proto.graph.input:
            entry.name = new if entry.name == old else entry.name
        for node in proto.graph.node:
            node.input[:] = [new if name == old else name for name in node.input]

    return change


def retype_logits(proto: Any) -> None:
    proto.graph.output[0].type.tensor_type.elem_type = TensorProto.INT8


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (rename_input("input_ids", "tokens"), "no input 'input_ids'"),
        (rename_input("attention_mask", "pixels"), "has the unknown input 'pixels'"),
        (rename_input("past_key_values.0.key", "p"), "unknown input 'p'|different numbers of keys"),
        (rename_input("past_key_values.1.value", "past_key_values.9.value"), "no output 'present.9.value'"),
        (retype_logits, "has logits in another type"),
        (lambda proto: proto.graph.output.pop(0), "no output 'logits'"),
    ],
)
def test_unexpected_inputs_and_outputs_are_an_error(copy: Path, change: Callable[[Any], None], message: str) -> None:
    with pytest.raises(RuntimeProblem, match=message):
        load(edit(copy, change))


@pytest.mark.parametrize("value", [0, -1, 1 << 40, "two", None])
def test_impossible_heads_are_an_error(copy: Path, value: Any) -> None:
    def forget(proto: Any) -> None:
        for entry in proto.graph.input:
            if entry.name.startswith("past"):
                entry.type.tensor_type.shape.dim[1].dim_param = "heads"

    with pytest.raises(RuntimeProblem, match="the number of heads"):
        load(configure(edit(copy, forget), decoder={"num_key_value_heads": value}))


def test_an_error_of_onnx_runtime_contains_its_message(copy: Path) -> None:
    def break_(proto: Any) -> None:
        proto.graph.node[0].input[0] = "nowhere"

    with pytest.raises(RuntimeProblem, match="nowhere"):
        load(edit(copy, break_))


def test_a_graph_with_its_weights_inside_runs(folder: Path, copy: Path) -> None:
    whole = onnx.load_model(folder / "model.onnx")
    del whole.metadata_props[:]
    (copy / "model.onnx").write_bytes(whole.SerializeToString())
    (copy / "model.onnx.data").unlink()
    with load(copy) as runtime:
        assert not model_file.read(copy / "model.onnx").data_files
        runtime.verify()
