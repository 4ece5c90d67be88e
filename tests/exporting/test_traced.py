"""Families without a description: transformers and torch.onnx draw the graph, or one sentence says why not."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from edgetune.cli import run
from edgetune.runtime import load
from edgetune_converters.provenance.receipts import Receipt
from tests.converters import family_models, tiny, vocabularies
from tests.converters.onnx import session
from tests.data import templates
from tests.training import runs

# f32 on both sides, in another order of sums: 1e-12 at most was seen
KLD = 1e-9
# f16 rounds each weight by 2^-12 of it at most, in about ten matrices one behind the other
KLD_F16 = 1e-5


def export(base: Path, out: Path, *options: str, kind: str = "f32") -> int:
    return run(["merge-export", "--base", str(base), "--format", "onnx", "-q", kind, "-o", str(out), *options])


def steps(count: int) -> list[int]:
    return [count - 21, 9, *[1] * 12]


@pytest.mark.parametrize(
    "name",
    [
        "bloom",
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("falcon-7b", "falcon-40b", "falcon-11b", "mpt", "deepseek-v3", "gpt-oss")
        ),
    ],
)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    base, out = family_models.base(name, tmp_path / "base"), tmp_path / "out" / name
    (out.parent / f"{name}.partial" / "of a pass that was killed").mkdir(parents=True)
    ids = family_models.ids(name)
    wanted = family_models.reference(name, base)
    capfd.readouterr()
    assert export(base, out) == 0
    said = capfd.readouterr()
    assert "needs torch and memory" in said.err
    assert "Traceback" not in said.err
    assert len(said.out.splitlines()) == 1
    found = [session.logits(out, ids, split) for split in (None, steps(len(ids)))]
    klds = [tiny.divergence(wanted, logits)[0] for logits in found]
    print(name, klds)
    assert max(klds) < KLD
    assert {path.name for path in out.parent.iterdir()} == {name, f"{name}.receipt.json"}
    with load(out, context=len(ids)) as runtime:
        positions = np.arange(1, len(ids))
        scored = np.concatenate([block.copy() for block in runtime.score(np.array(ids, np.int32), positions)])
    assert tiny.divergence(wanted[:-1], scored)[0] < KLD


def test_what_is_written(tmp_path: Path) -> None:
    """Names, metadata, receipt; and 16 bits, of which the rounded weights are the only loss."""
    base, out = family_models.base("mpt", tmp_path / "base"), tmp_path / "mpt"
    assert export(base, out, kind="f16") == 0
    graph = onnx.load(out / "model.onnx", load_external_data=False)
    assert [value.name for value in graph.graph.input[:3]] == ["input_ids", "attention_mask", "past_key_values.0.key"]
    assert [value.name for value in graph.graph.output[:3]] == ["logits", "present.0.key", "present.0.value"]
    assert {entry.domain for entry in graph.opset_import} == {""}
    stated = {entry.key: entry.value for entry in graph.metadata_props}
    assert (stated["edgetune.cache"], stated["edgetune.exporter"]) == ("grows", "transformers/torch.onnx")
    receipt = Receipt.read(out)
    receipt.check()
    assert receipt.exporter == "transformers/torch.onnx"
    assert receipt.versions.keys() >= {"torch", "transformers", "onnx", "edgetune"}
    assert receipt.exporter_kld is not None
    assert receipt.exporter_kld < KLD
    matrices = {name for name, kind in receipt.tensors.items() if kind == "f16"}
    assert all("norm" not in name for name in matrices)
    config = json.loads((out / "genai_config.json").read_text("utf-8"))
    assert config["model"]["context_length"] == 640
    assert config["search"]["past_present_share_buffer"] is False
    wanted = family_models.reference("mpt", base)
    kld, _ = tiny.divergence(wanted, session.logits(out, family_models.ids("mpt")))
    assert 0 < kld < KLD_F16


@pytest.mark.slow
def test_the_adapter_is_in_it_and_gguf_beside_it(tmp_path: Path) -> None:
    base = family_models.base("falcon-40b", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter")
    assert export(base, tmp_path / "out", "--adapter", str(adapter), "--format", "gguf,onnx") == 0
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        name + end for name in ("adapter-f32.gguf", "adapter-f32-onnx") for end in ("", ".receipt.json")
    }
    ids = tiny.random_ids(128)
    wanted, plain = (tiny.torch_logits(base, which, ids) for which in (adapter, None))
    found = session.logits(tmp_path / "out" / "adapter-f32-onnx", ids)
    assert tiny.divergence(wanted, found)[0] < KLD
    assert tiny.divergence(plain, found)[0] > 1e-4
    graph, gguf = (Receipt.read(tmp_path / "out" / f"adapter-f32{end}") for end in ("-onnx", ".gguf"))
    assert (graph.base, graph.adapter) == (gguf.base, gguf.adapter)


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("lfm2", "keeps a state other than keys and values"),
        pytest.param("deepseek-v2", "cannot trace it", marks=pytest.mark.slow),
        pytest.param("llama4", "cannot trace it", marks=pytest.mark.slow),
    ],
)
def test_what_cannot_be_traced_leaves_nothing(
    name: str, why: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    base = family_models.base(name, tmp_path / "base")
    (tmp_path / "out").mkdir()
    capfd.readouterr()
    assert export(base, tmp_path / "out", "--format", "gguf,onnx") == 1
    said = capfd.readouterr()
    assert "cannot be written as ONNX" in said.err
    assert why in said.err
    assert "--format gguf" in said.err
    assert "Traceback" not in said.err + said.out
    assert said.out == ""
    assert not list((tmp_path / "out").iterdir())


def stored_as(folder: Path, base: Path) -> dict[str, np.ndarray]:
    """The weights that the codes of a folder stand for, by ONNX Runtime's documentation, under the base's names."""
    graph = onnx.load(folder / "model.onnx")  # with its data
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.graph.initializer}
    blocks = {
        node.input[1 if node.op_type == "MatMulNBits" else 0].removesuffix(".rows"): _sizes(node)
        for node in graph.graph.node
        if node.domain == "com.microsoft"
    }
    found = {}
    for codes, (bits, block) in blocks.items():
        name = codes.removesuffix(".codes")
        found[name.removeprefix("model.")] = _decoded(arrays, name, bits, block)
    return found


def _sizes(node: onnx.NodeProto) -> tuple[int, int]:
    stated = {entry.name: entry.i for entry in node.attribute}
    return stated["bits"], stated["block_size"]


def _decoded(arrays: dict[str, np.ndarray], name: str, bits: int, block: int) -> np.ndarray:
    """scale * (code - zero point), [..., n, whole blocks]."""
    packed, scales = arrays[f"{name}.codes"], arrays[f"{name}.scales"]
    codes = packed if bits == 8 else np.stack([packed & 15, packed >> 4], -1).reshape(*packed.shape[:-1], -1)
    zeros: np.ndarray | int = 1 << (bits - 1)
    if f"{name}.zero_points" in arrays:
        halves = arrays[f"{name}.zero_points"]
        both = np.stack([halves & 15, halves >> 4], -1).reshape(*halves.shape[:-1], -1)
        zeros = both[..., : scales.shape[-1], None]
    values = (codes.astype(np.float32) - zeros) * scales[..., None]
    return np.asarray(values.reshape(*values.shape[:-2], -1), np.float32)


def in_f32(folder: Path, other: Path) -> Path:
    """The same folder with activations in f32."""
    shutil.copytree(folder, other)
    graph = onnx.load(other / "model.onnx", load_external_data=False)
    for node in graph.graph.node:
        for entry in node.attribute:
            if entry.name == "accuracy_level":
                entry.i = 1
    onnx.save(graph, other / "model.onnx")
    return other


EVEN: dict[str, Any] = {"hidden_size": 96}
# families with rows of whole blocks, so that embeddings and stacks of experts are in codes too
WHOLE_ROWS: dict[str, dict[str, Any]] = {
    "bloom": EVEN,
    "falcon-40b": EVEN,
    "mpt": {"d_model": 96},
    "deepseek-v3": EVEN | {"moe_intermediate_size": 32},
    "gpt-oss": EVEN | {"intermediate_size": 64},
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("bloom", "int4"),
        ("gpt-oss", "int4"),
        *(
            pytest.param(name, kind, marks=pytest.mark.slow)
            for name, kind in (
                ("bloom", "int8"), ("falcon-40b", "int4"), ("falcon-40b", "int8"), ("mpt", "int4"),
                ("deepseek-v3", "int4"), ("deepseek-v3", "int8"), ("gpt-oss", "int8"),
            )
        ),
    ],
)  # fmt: skip
def test_codes_stand_for_weights_that_transformers_can_be_given(name: str, kind: str, tmp_path: Path) -> None:
    """With the weights that the codes stand for transformers says the same as the graph with activations in f32."""
    base, out = family_models.base(name, tmp_path / "base", **WHOLE_ROWS[name]), tmp_path / "out"
    assert export(base, out, kind=kind) == 0
    receipt = Receipt.read(out)
    receipt.check()
    assert receipt.exporter_kld is not None
    assert receipt.exporter_kld < KLD
    assert receipt.fallback_share == 0
    weights = stored_as(out, base)
    matrices = {key for key, type_ in receipt.tensors.items() if type_.startswith("int")}
    assert {key.removeprefix("model.") for key in matrices} == weights.keys()
    assert not [key for key in receipt.tensors if "norm" in key and key in matrices]
    assert sum(receipt.types[type_] for type_ in receipt.types if type_.startswith("int")) > 0.6 * sum(
        receipt.types.values()
    )
    wanted = family_models.reference(name, base, weights)
    plain = family_models.reference(name, base)
    ids = family_models.ids(name)
    exact = in_f32(out, tmp_path / "exact")
    for split in (None, steps(len(ids))):
        near = tiny.divergence(wanted, session.logits(exact, ids, split))[0]
        found = session.logits(out, ids, split)
        rounded, far = (tiny.divergence(logits, found)[0] for logits in (wanted, plain))
        print(name, kind, near, rounded, far)
        assert near < KLD
        # as it is, activations are rounded to 8 bits, which can send a token to another expert
        assert rounded < far
    with load(out, context=len(ids)) as runtime:
        assert runtime.is_quantized


@pytest.mark.slow
def test_a_run_is_exported_and_validated(tmp_path: Path) -> None:
    """From training to the report: what validate measures of the traced graph in f32 and in codes."""
    base = family_models.base("bloom", tmp_path / "base", hidden_size=128, n_head=4)
    vocabularies.byte_level(base, chat_template=templates.CHATML, pad_token="<|endoftext|>")
    settings = runs.settings(base, tmp_path, max_steps=60)
    settings |= {"name": "bloom", "quantization": {"bits": 16}}
    config = runs.write_config(tmp_path / "config.yaml", settings)
    assert run(["train", str(config), "--output", str(tmp_path / "run")]) == 0
    klds = {}
    for kind in ("f32", "int8", "int4"):
        assert run(["merge-export", str(tmp_path / "run"), "--format", "onnx", "-q", kind]) == 0
        folder = tmp_path / "run" / "artifacts" / f"bloom-{kind}-onnx"
        found = tmp_path / f"{kind}.json"
        assert run(["validate", str(tmp_path / "run"), str(folder), "--json", str(found)]) == 0
        content = json.loads(found.read_text("utf-8"))
        (file,) = (rung for rung in content["rungs"] if rung["kind"] == "file")
        klds[kind] = file["figures"]["kld"]["value"]
    print(klds)
    # in f32 what the reference's coding leaves (3e-10); in codes what they cost, on a model of 1 M weights
    assert klds["f32"] < 1e-8 < klds["int8"] < klds["int4"] < 1e-2


def test_plans_options_and_a_machine_without_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family_models.base("bloom", tmp_path / "base")
    (tmp_path / "out").mkdir()
    capfd.readouterr()
    out = tmp_path / "out" / "a"
    for kind, options, message in (
        ("int4", (), "rows, that blocks do not fit"),
        ("f32", ("--block-size", "32"), "is for int4 or int8 in ONNX alone"),
        ("int4", ("--portable",), "with ONNX Runtime's operators"),
    ):
        assert export(base, out, *options, kind=kind) != 0
        assert message in capfd.readouterr().err
    assert export(base, out, "--dry-run") == 0
    assert "32.000 bits per weight" in capfd.readouterr().out
    assert export(base, out, "--dry-run", "--block-size", "32", kind="int4") == 0
    planned = capfd.readouterr().out
    assert "int4/32z" in planned
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else find(name, *more))
    assert export(base, out) == 1
    assert "pip install 'edgetune[train]'" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_graph_that_is_another_model_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trace gets wrong shows in the comparison: here one weight of the file differs from the model's."""
    from edgetune_converters.onnx.traced_model import TracedModel, TracedSettings, WeightSummary, write_weights
    from edgetune_converters.outputs import traced

    def write_wrong(path: Path, model: TracedModel, settings: TracedSettings) -> WeightSummary:
        weights = dict(model.weights)
        name = next(name for name in weights if name.endswith("dense_h_to_4h.weight"))
        weights[name] = weights[name] * np.float32(1.5)
        return write_weights(path, TracedModel(model.graph, weights, model.sizes), settings)

    monkeypatch.setattr(traced, "write_weights", write_wrong)
    base = family_models.base("bloom", tmp_path / "base")
    (tmp_path / "out").mkdir()
    assert export(base, tmp_path / "out" / "a") == 1
    assert "the traced graph is not the model" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())
