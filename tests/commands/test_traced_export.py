"""Families without a description: transformers and torch.onnx draw the graph, or one sentence says why not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import numpy as np
import onnx
import pytest

from edgetune.cli import run
from edgetune.runtime import load
from edgetune_converters.receipts import Receipt
from tests.converters import family_models, tiny
from tests.converters.onnx import session

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
        ("lfm2", "keeps another state than keys and values"),
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


def test_integers_and_a_machine_without_torch(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    base = family_models.base("bloom", tmp_path / "base")
    (tmp_path / "out").mkdir()
    capfd.readouterr()
    assert export(base, tmp_path / "out" / "a", kind="int4") == 2
    assert "gives f32 and f16 and not int4" in capfd.readouterr().err
    assert export(base, tmp_path / "out" / "a", "--block-size", "32") == 2
    assert "which have no blocks" in capfd.readouterr().err
    assert export(base, tmp_path / "out" / "a", "--plan") == 0
    assert "32.000 bits per weight" in capfd.readouterr().out
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else find(name, *more))
    assert export(base, tmp_path / "out" / "a") == 1
    assert "pip install 'edgetune[train]'" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())


def test_a_graph_that_is_another_model_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a trace gets wrong shows in the comparison: here one weight of the file differs from the model's."""
    from edgetune_converters.outputs import traced

    write = traced.write

    def wrong(folder: Path, drawn: traced.Drawn, *more: object) -> traced.Stored:
        weights = dict(drawn.weights)
        name = next(name for name in weights if name.endswith("dense_h_to_4h.weight"))
        weights[name] = weights[name] * np.float32(1.5)
        return write(folder, traced.Drawn(drawn.graph, weights, drawn.sizes), *more)  # type: ignore[arg-type]

    monkeypatch.setattr(traced, "write", wrong)
    base = family_models.base("bloom", tmp_path / "base")
    (tmp_path / "out").mkdir()
    assert export(base, tmp_path / "out" / "a") == 1
    assert "the traced graph is not the model" in capfd.readouterr().err
    assert not list((tmp_path / "out").iterdir())
