"""A score head in every format: the scores are those of transformers' network and the head, for every family."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from numpy.typing import NDArray

from edgetune_converters import planning
from edgetune_converters.architectures import ModelConfig
from edgetune_converters.architectures.classifiers import classifier_of
from edgetune_converters.architectures.model_types import MODEL_TYPES
from edgetune_converters.errors import AdapterError, ArchitectureError, EdgetuneError
from edgetune_converters.gguf import keys, reader
from edgetune_converters.merging.score_head import ScoreHead
from edgetune_converters.onnx.plan import OnnxSettings
from edgetune_converters.request import ExportRequest
from tests.converters import family_models, tiny
from tests.converters.onnx import session
from tests.converters.tiny import torch, transformers
from tests.export_requests import export, targets

PAD = 511
ROWS = [tiny.random_ids(37, 500, seed=3), tiny.random_ids(5, 500, seed=4), tiny.random_ids(24, 500, seed=5)]
# without the options that take long or that change nothing here
FAMILIES = [
    name for name in family_models.CASES if not name.endswith("-before") and name not in ("baichuan", "baichuan-13b")
]
TRACED = (
    "bloom",
    "falcon",
    "falcon-7b",
    "mpt",
    "deepseek-v2",
    "deepseek-v3",
    "gpt-oss",
    "llama4",
    "llama4-seeing",
    "lfm2",
)
USUAL = ("llama", "qwen3", "gemma3", "gpt2", "phi2", "gemma3-seeing")


def _marked(names: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=[] if name in USUAL else [pytest.mark.slow]) for name in names]


def _hidden_size(base: Path) -> int:
    config = ModelConfig(json.loads((base / "config.json").read_text()))
    return config.hidden


def _head(base: Path) -> ScoreHead:
    weight = np.random.default_rng(6).normal(0, 0.3, _hidden_size(base)).astype(np.float32)
    return ScoreHead(weight, PAD, "<pad>")


def _reference(base: Path, head: ScoreHead) -> NDArray[np.float32]:
    """Scores [rows] of transformers' language model: its last hidden state by the head, a row at a time."""
    saved = base.with_name(base.name + "-as-saved")  # of a family without a class in transformers
    base = saved if saved.is_dir() else base
    config = transformers.AutoConfig.from_pretrained(base)
    kind = transformers.AutoModelForImageTextToText if hasattr(config, "vision_config") else None
    kind = kind or transformers.AutoModelForCausalLM
    model = kind.from_pretrained(base, dtype=torch.float32, attn_implementation="eager").eval()
    found = []
    with torch.no_grad():
        for row in ROWS:
            hidden = model(input_ids=torch.tensor([row]), output_hidden_states=True).hidden_states[-1][0, -1]
            found.append(float(hidden.double().numpy() @ head.weight.astype(np.float64)))
    return np.array(found, np.float32)


def _padded(left: bool) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Ids and mask [rows, longest] of ROWS."""
    longest = max(map(len, ROWS))
    ids, mask = np.full((len(ROWS), longest), PAD, np.int64), np.zeros((len(ROWS), longest), np.int64)
    for number, row in enumerate(ROWS):
        place = slice(longest - len(row), None) if left else slice(len(row))
        ids[number, place], mask[number, place] = row, 1
    return ids, mask


def test_the_classes_are_those_of_transformers() -> None:
    classes = transformers.models.auto.modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES
    assert {name: classifier_of(name) for name in MODEL_TYPES} == {
        name: classes.get(model_type) for name, model_type in MODEL_TYPES.items()
    }


@pytest.mark.parametrize("name", _marked(FAMILIES))
def test_transformers_loads_a_classifier_and_gives_the_same_scores(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    architecture = json.loads((base / "config.json").read_text())["architectures"][0]
    head = _head(base)
    if classifier_of(architecture) is None:
        with pytest.raises(ArchitectureError, match="no class for sequence classification"):
            export(base, safetensors={"f32": tmp_path / "m"}, score_head=head)
        return
    export(base, safetensors={"f32": tmp_path / "m"}, score_head=head)
    model, report = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "m", dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert type(model).__name__ == classifier_of(architecture)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    for left in (False, True):
        ids, mask = (torch.from_numpy(array) for array in _padded(left))
        with torch.no_grad():
            places = (mask.cumsum(1) - 1).clamp(min=0)  # GPT-2 would count the padding on the left
            found = model.eval()(input_ids=ids, attention_mask=mask, position_ids=places).logits
        assert found.shape == (len(ROWS), 1)
        np.testing.assert_allclose(found[:, 0].numpy(), _reference(base, head), rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", _marked(FAMILIES))
def test_the_graph_ends_in_the_score_of_the_last_token(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    head = _head(base)
    if name.startswith(TRACED):
        with pytest.raises(ArchitectureError, match="graph is traced"):
            export(base, onnx={"f32": tmp_path / "m"}, score_head=head)
        return
    export(base, onnx={"f32": tmp_path / "m"}, score_head=head)
    wanted = _reference(base, head)
    export(base, onnx={"f32": tmp_path / "p"}, score_head=head, onnx_settings=OnnxSettings(portable=True))
    for folder in ("m", "p"):
        opened = session.open_session(tmp_path / folder)
        graph = onnx.load(tmp_path / folder / "model.onnx", load_external_data=False).graph
        in_place = any(node.op_type == "GroupQueryAttention" for node in graph.node)
        ids, mask = _padded(left=not in_place)  # as the attention of the graph wants it
        past = {
            entry.name: np.zeros(
                [len(ROWS), entry.shape[1], ids.shape[1] if in_place else 0, entry.shape[3]], np.float32
            )
            for entry in opened.get_inputs()
            if entry.name.startswith("past_")
        }
        given = {"input_ids": ids, "attention_mask": mask, **past}
        (scores,) = opened.run(["score"], given)
        assert scores.shape == (len(ROWS), 1)
        np.testing.assert_allclose(scores[:, 0], wanted, rtol=0, atol=2e-4)
        # the logits are not needed
        (again,) = opened.run(["score"], {**given, "logits_range": np.zeros(2, np.int64)})
        assert np.array_equal(again, scores)


def test_the_head_stays_in_f32_in_every_format_and_the_graph_holds_no_weights(tmp_path: Path) -> None:
    base = family_models.base("llama", tmp_path / "base")
    head = _head(base)
    receipts = export(
        base, {"q8_0": tmp_path / "m.gguf"}, safetensors={"bf16": tmp_path / "s"}, onnx={"int4": tmp_path / "o"},
        score_head=head, allow_fallback=True,
    )  # fmt: skip
    assert reader.read(tmp_path / "m.gguf").metadata[keys.SCORE_HEAD] == head.text
    tensors = safetensors.numpy.load_file(tmp_path / "s/model.safetensors")
    assert np.array_equal(tensors["score.weight"], head.weight[None])
    assert not [name for name in tensors if name.startswith("lm_head")]
    found = session.onnx_weight(tmp_path / "o", "score.weight")
    assert np.array_equal(found, head.weight[:, None])
    assert [receipt.tensors.get("score.weight") for receipt in receipts] == [None, "f32", "f32"]
    assert (tmp_path / "o/model.onnx").stat().st_size < 2**17


def test_the_tokenizer_pads_with_the_token_that_is_not_scored(tmp_path: Path) -> None:
    base = family_models.base("llama", tmp_path / "base")
    export(base, safetensors={"base": tmp_path / "m"}, score_head=_head(base))
    assert json.loads((tmp_path / "m/config.json").read_text())["pad_token_id"] == PAD
    assert json.loads((tmp_path / "m/tokenizer_config.json").read_text())["pad_token"] == "<pad>"
    export(base, safetensors={"base": tmp_path / "lm"})
    assert (tmp_path / "lm/tokenizer_config.json").read_bytes() == (base / "tokenizer_config.json").read_bytes()


def test_the_plan_has_the_head_and_refuses_what_has_no_place_for_it(tmp_path: Path) -> None:
    base = family_models.base("llama", tmp_path / "base")
    head = _head(base)
    made = targets(safetensors={"f32": tmp_path / "s"}, onnx={"f32": tmp_path / "o"})
    for plan in planning.plan(ExportRequest(base, made, score_head=head)):
        assert [row.type for row in plan.rows if row.name == "score.weight"] == ["f32"]
    with pytest.raises(EdgetuneError, match="gguf-lora has no place for the score head"):
        planning.plan(ExportRequest(base, targets(lora={"f32": tmp_path / "l.gguf"}), score_head=head))
    with pytest.raises(AdapterError, match="the score head has 3 values, and the hidden state of the base has 72"):
        planning.plan(ExportRequest(base, made, score_head=ScoreHead(np.zeros(3, np.float32))))


def test_a_head_that_is_damaged_is_refused_with_its_file(tmp_path: Path) -> None:
    file = tmp_path / "head.safetensors"
    cases: list[tuple[dict[str, NDArray[np.float32]], str]] = [
        ({"other": np.zeros((1, 4), np.float32)}, "no score.weight of one row"),
        ({"score.weight": np.zeros((2, 4), np.float32)}, "no score.weight of one row"),
        ({"score.weight": np.full((1, 4), np.nan, np.float32)}, "not a finite number"),
    ]
    for tensors, message in cases:
        safetensors.numpy.save_file(tensors, file)
        with pytest.raises(AdapterError, match=message) as caught:
            ScoreHead.read(file)
        assert str(file) in caught.value.message
