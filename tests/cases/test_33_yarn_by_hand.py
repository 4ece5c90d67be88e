"""A scaling that is switched on by hand reaches past max_position_embeddings, in both formats and in the reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from edgetune import cli
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.loading import load
from edgetune.training.capture.long_rows import choose_long_lengths, longest_context
from edgetune_converters.onnx.plan import OnnxSettings
from tests.converters import family_models, runtime, tiny
from tests.converters.onnx import session
from tests.export_requests import export
from tests.training import runs

transformers = tiny.transformers

ORIGINAL, FACTOR = 128, 4.0
YARN = {"factor": FACTOR, "original_max_position_embeddings": ORIGINAL}
# config.json as people edit it: in the spelling of cards, and in that of transformers 5
SPELLINGS: dict[str, dict[str, Any]] = {
    "card": {"rope_theta": 10000.0, "rope_scaling": {"type": "yarn", **YARN}},
    "rope_scaling": {"rope_theta": 10000.0, "rope_scaling": {"rope_type": "yarn", **YARN}},
    "rope_parameters": {"rope_parameters": {"rope_type": "yarn", "rope_theta": 10000.0, **YARN}},
    "linear": {"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, **YARN}},
}


def _by_hand(name: str, directory: Path, changes: dict[str, Any], stated: int = ORIGINAL) -> Path:
    """The model of a family with a context of `stated` tokens, and changes to its config.json."""
    plain: dict[str, Any] = {
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "max_position_embeddings": stated,
    }
    base = family_models.base(name, directory, **plain)
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    (base / "config.json").write_text(json.dumps(config | changes))
    return base


def _stated(path: Path) -> int:
    reader = GGUFReader(path)
    (found,) = [field.contents() for name, field in reader.fields.items() if name.endswith(".context_length")]
    return int(found)


CASES = [("llama", spelling) for spelling in SPELLINGS]
CASES += [(name, "card") for name in ("qwen2", "qwen3", "mixtral", "qwen3moe", "qwen2moe")]


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_positions_past_the_original_context_are_those_of_transformers(
    name: str, spelling: str, tmp_path: Path
) -> None:
    base = _by_hand(name, tmp_path / "base", SPELLINGS[spelling])
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"})
    for receipt in receipts:
        (note,) = [note for note in receipt.notes if note.startswith("the context is")]
        assert "512 tokens, 4 times the original 128" in note
    ids = tiny.random_ids(500)
    expected = tiny.torch_logits(base, None, ids)
    assert _stated(tmp_path / "m.gguf") == 512
    found = runtime.logits(tmp_path / "m.gguf", ids)
    assert tiny.divergence(expected[ORIGINAL:], found[ORIGINAL:])[0] < 1e-6
    genai = json.loads((tmp_path / "onnx" / "genai_config.json").read_text())
    assert (genai["model"]["context_length"], genai["search"]["max_length"]) == (512, 512)
    assert tiny.divergence(expected[ORIGINAL:], session.logits(tmp_path / "onnx", ids)[ORIGINAL:])[0] < 1e-9
    for path in (tmp_path / "m.gguf", tmp_path / "onnx"):
        with load(path, context=500) as loaded:
            assert (loaded.trained_context, loaded.context) == (512, 500)


def test_portable_graphs_reach_as_far(tmp_path: Path) -> None:
    base = _by_hand("llama", tmp_path / "base", SPELLINGS["card"])
    export(base, onnx={"f32": tmp_path / "onnx"}, onnx_settings=OnnxSettings(portable=True))
    ids = tiny.random_ids(500)
    assert tiny.divergence(tiny.torch_logits(base, None, ids), session.logits(tmp_path / "onnx", ids))[0] < 1e-9


def test_a_product_below_the_stated_context_does_not_shorten_it(tmp_path: Path) -> None:
    scaling = {"type": "yarn", "factor": 1.5, "original_max_position_embeddings": ORIGINAL}
    base = _by_hand("llama", tmp_path / "base", {"rope_theta": 1e4, "rope_scaling": scaling}, stated=512)
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"})
    assert _stated(tmp_path / "m.gguf") == 512
    assert not [note for receipt in receipts for note in receipt.notes if "the context is" in note]
    ids = tiny.random_ids(500)
    expected = tiny.torch_logits(base, None, ids)
    assert tiny.divergence(expected, session.logits(tmp_path / "onnx", ids))[0] < 1e-9
    assert tiny.divergence(expected, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6


@pytest.mark.parametrize("kind", ["yarn", "linear"])
def test_without_the_original_context_the_stated_one_is_taken_and_the_way_to_raise_it_said(
    kind: str, tmp_path: Path
) -> None:
    base = _by_hand("llama", tmp_path / "base", {"rope_theta": 1e4, "rope_scaling": {"type": kind, "factor": 4.0}})
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"})
    assert _stated(tmp_path / "m.gguf") == ORIGINAL
    for receipt in receipts:
        assert [f'add "original_max_position_embeddings": {ORIGINAL}' in note for note in receipt.notes] == [True]
    ids = tiny.random_ids(ORIGINAL)
    expected = tiny.torch_logits(base, None, ids)
    assert tiny.divergence(expected, session.logits(tmp_path / "onnx", ids))[0] < 1e-9
    assert tiny.divergence(expected, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6


@pytest.mark.parametrize("name", ["llama", "qwen3", "mixtral"])
def test_dynamic_scaling_is_right_up_to_the_stated_context_and_ends_there(name: str, tmp_path: Path) -> None:
    base = _by_hand(name, tmp_path / "base", {"rope_theta": 1e4, "rope_scaling": {"type": "dynamic", "factor": 4.0}})
    receipts = export(base, {"f32": tmp_path / "m.gguf"}, onnx={"f32": tmp_path / "onnx"})
    assert _stated(tmp_path / "m.gguf") == ORIGINAL
    for receipt in receipts:
        assert [f"begins past {ORIGINAL} tokens" in note for note in receipt.notes] == [True]
    ids = tiny.random_ids(ORIGINAL)
    expected = tiny.torch_logits(base, None, ids)
    assert tiny.divergence(expected, session.logits(tmp_path / "onnx", ids))[0] < 1e-9
    assert tiny.divergence(expected, runtime.logits(tmp_path / "m.gguf", ids))[0] < 1e-6


# -- the reference -----------------------------------------------------------------------------------------------------

_LENGTHS: dict[str, tuple[str, dict[str, Any], int, list[int]]] = {
    "yarn": ("LlamaConfig", {"rope_parameters": SPELLINGS["rope_parameters"]["rope_parameters"]}, 512, [128, 144]),
    "none": ("LlamaConfig", {}, 128, [128]),
    "window": ("MistralConfig", {"sliding_window": 64}, 128, [64, 80]),
    "by kind of layer": (
        "Olmo3Config",
        {"rope_parameters": {
            "full_attention": {"rope_type": "yarn", "rope_theta": 1e4, **YARN},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        }},
        512,
        [128, 144],
    ),
    "bloom": ("BloomConfig", {}, 2048, [2048]),
}  # fmt: skip


@pytest.mark.parametrize("kind", _LENGTHS)
def test_long_rows_go_past_the_original_context(kind: str) -> None:
    name, options, context, lengths = _LENGTHS[kind]
    stated = {} if name == "BloomConfig" else {"max_position_embeddings": ORIGINAL}
    config = getattr(transformers, name)(**stated, **options)
    assert longest_context(config) == context
    assert choose_long_lengths(config) == lengths


def test_a_run_compares_past_the_original_context(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = runs.make_base(tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"max_position_embeddings": ORIGINAL, **SPELLINGS["card"]}
    (base / "config.json").write_text(json.dumps(config))
    values = runs.settings(base, tmp_path, max_steps=2)
    values["reference"]["long"] = True
    path = runs.write_config(tmp_path / "c.yaml", values)
    assert cli.run(["train", str(path), "-o", str(tmp_path / "run")]) == 0
    assert "long rows of 128 and 144 tokens" in capsys.readouterr().err
    run = RunDirectory.open(tmp_path / "run")
    artifacts = tmp_path / "out"
    export_both = ["merge-export", str(run.path), "--format", "gguf,onnx", "-q", "f32", "-o", str(artifacts)]
    assert cli.run(export_both) == 0
    files = sorted(path for path in artifacts.iterdir() if path.suffix == ".gguf" or path.is_dir())
    assert len(files) == 2
    for file in files:
        results = tmp_path / "results.json"
        assert cli.run(["validate", str(run.path), str(file), "--json", str(results)]) in (0, 3)
        long_rows = [rows for rows in _long_rows(json.loads(results.read_text())) if rows]
        assert long_rows
        assert all([row["tokens"] for row in rows] == [128, 144] for rows in long_rows)
        assert all(row["kld"] < 1e-3 for row in long_rows[-1])


def _long_rows(value: Any) -> list[Any]:
    """Every list of long rows in a document."""
    parts = list(value.values()) if isinstance(value, dict) else value if isinstance(value, list) else []
    found = [rows for part in parts for rows in _long_rows(part)]
    own = value.get("long_rows") if isinstance(value, dict) else None
    return [own, *found] if isinstance(own, list) else found
