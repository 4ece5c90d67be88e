"""The table of families: its pages, what it refuses, and its operations block by block."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.architectures import ModelConfig, bind, family_of, stored_transposed, supported_names, targets
from edgetune_converters.architectures.families import FAMILIES
from edgetune_converters.architectures.operations import RopePermute, Take, View
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.merging import stream
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import family_models, tiny
from tests.export_requests import export

DOCS = Path(__file__).resolve().parents[2] / "docs" / "export.md"


# -- the table and its page --------------------------------------------------------------------------------------------


def test_the_page_lists_every_family() -> None:
    rows = [
        f"| {family.name} | {', '.join(f'`{name}`' for name in family.hf)} | `{family.gguf}` |" for family in FAMILIES
    ]
    page = DOCS.read_text("utf-8").splitlines()
    first = page.index("| Family | `architectures` in config.json | in llama.cpp |") + 2
    found = page[first : page.index("", first)]
    assert found == rows, "docs/export.md, first table: one row for each of FAMILIES, in the same order"


def test_every_family_has_a_case(tmp_path: Path) -> None:
    for number, name in enumerate(family_models.CASES):
        family_models.base(name, tmp_path / str(number))
    tested = {
        family_of(ModelConfig(json.loads((path / "config.json").read_text("utf-8")))).name
        for path in tmp_path.iterdir()
        if not path.name.endswith("-as-saved")
    }
    untested = {family.name for family in FAMILIES} - tested
    assert not untested, "add a model of each to CASES of tests/converters/family_models.py"


def test_no_architecture_is_claimed_twice() -> None:
    assert len(supported_names()) == len(set(supported_names()))


def test_an_unknown_family_is_refused_with_the_supported_ones() -> None:
    with pytest.raises(ArchitectureError, match="HalForCausalLM, which is not supported") as caught:
        family_of(ModelConfig({"architectures": ["HalForCausalLM"]}))
    assert all(name in str(caught.value.hint) for name in supported_names())


# -- what cannot be carried is refused by name -------------------------------------------------------------------------

# a case of the models, what is changed in its config.json, and what the refusal says
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("gemma2", {"query_pre_attn_scalar": 30}, "query_pre_attn_scalar 30: only 24"),
    ("gemma2", {"use_bidirectional_attention": True}, "use_bidirectional_attention"),
    ("gemma2", {"final_logit_softcapping": None}, "final_logit_softcapping must be a positive number, not absent"),
    ("gemma2", {"sliding_window": None}, "sliding_window must be a positive integer"),
    ("gemma3", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping"),
    ("phi3", {"hidden_act": "relu"}, "hidden_act 'relu'"),
    ("phi3-long", {"rope_parameters": {"rope_type": "longrope", "long_factor": [1.0]}}, "short_factor|long_factor"),
    ("phi3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "rope type 'yarn'"),
    ("phi2", {"qk_layernorm": True}, "qk_layernorm True"),
    ("qwen2moe", {"norm_topk_prob": True}, "norm_topk_prob True"),
    ("qwen2moe", {"decoder_sparse_step": 2}, "decoder_sparse_step 2"),
    ("qwen3moe", {"norm_topk_prob": False}, "norm_topk_prob False"),
    ("qwen3moe", {"mlp_only_layers": [1]}, r"mlp_only_layers \[1\]"),
    ("smollm3", {"no_rope_layers": [1, 0, 1, 0, 1]}, "no_rope_layers"),
    ("smollm3", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0, "truncate": False}}, "truncate False"),
    ("smollm3", {"rope_parameters": {"rope_type": "linear"}}, "'linear' without a factor"),
    ("exaone4", {"sliding_window": 100}, "sliding_window 100 with 3 layers"),
    (
        "olmo3",
        {
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "default", "rope_theta": 5000.0},
            }
        },
        "rope_theta 1000.0 in the layers with a sliding window",
    ),
    ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
    ("bloom", {"apply_residual_connection_post_layernorm": True}, "apply_residual_connection_post_layernorm"),
    ("falcon-7b", {"alibi": True}, "alibi True"),
    ("falcon-7b", {"parallel_attn": False}, "parallel_attn False"),
    ("mpt", {"attn_config": {"alibi": False}}, "attn_config: alibi False"),
    ("mpt", {"no_bias": False}, "no_bias False"),
    ("starcoder2", {"use_bias": False}, "use_bias False"),
    ("command-r", {"use_qk_norm": True}, "use_qk_norm True with 3 layers"),
    ("deepseek-v2", {"topk_method": "group_limited_greedy"}, "topk_method 'group_limited_greedy'"),
    ("deepseek-v2", {"q_lora_rank": None}, "q_lora_rank None with 3 layers"),
    ("deepseek-v3", {"rope_interleave": False}, "rope_interleave False"),
    ("deepseek-v3", {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 1.0}}, "mscale 1.0 and"),
    ("gpt-oss", {"swiglu_limit": 9.0}, "swiglu_limit 9.0"),
    ("llama4", {"attention_chunk_size": 100}, "attention_chunk_size 100"),
    ("lfm2", {"conv_bias": True}, "conv_bias True"),
    ("internlm2", {"bias": True}, "bias True"),
    ("baichuan", {"num_hidden_layers": 36}, "36 layers: only the 7 B"),
    ("glm4", {"rope_parameters": {"rope_type": "llama3"}}, "rope type 'llama3'"),
    ("granite", {"attention_multiplier": None}, "attention_multiplier must be a positive number, not absent"),
]


@pytest.mark.parametrize(("name", "change", "message"), REFUSED)
def test_settings_that_cannot_be_exported_are_refused(
    name: str, change: dict[str, Any], message: str, bases: Callable[[str], Path], tmp_path: Path
) -> None:
    base = bases(name)
    path = base / "config.json"
    before = path.read_text("utf-8")
    path.write_text(json.dumps({**json.loads(before), **change}), "utf-8")
    try:
        with pytest.raises(ArchitectureError, match=message):
            export(base, {"f32": tmp_path / "model.gguf"})
    finally:
        path.write_text(before, "utf-8")
    assert not (tmp_path / "model.gguf").exists()


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return cache(lambda name: family_models.base(name, tmp_path_factory.mktemp("bases") / name))


def test_a_head_of_its_own_is_refused_where_llama_cpp_has_none(tmp_path: Path) -> None:
    base = family_models.base("gemma", tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", target_modules=["q_proj", "lm_head"])
    with pytest.raises(ArchitectureError, match=r"the output matrix differs from the embedding.* for Gemma"):
        export(base, {"f32": tmp_path / "f32.gguf"}, adapter=adapter)


# -- the operations ----------------------------------------------------------------------------------------------------


def _of_numpy(view: View, whole: NDArray[np.float32]) -> NDArray[np.float32]:
    """What a view is of a matrix, by reshaping it as a whole."""
    rows = whole
    if view.transpose:
        slabs = rows.reshape(-1, view.transpose.size, rows.shape[1])[
            :, view.transpose.first : view.transpose.first + view.transpose.count
        ]
        rows = slabs.transpose(0, 2, 1).reshape(-1, view.transpose.count)
    for step in view.steps:
        if isinstance(step, Take):
            groups = rows.reshape(-1, step.size, rows.shape[1])[:, step.first : step.first + step.count]
            rows = groups.reshape(-1, rows.shape[1])
        else:
            pairs = rows.reshape(-1, 2, step.head_dim // 2, rows.shape[1])
            rows = pairs.transpose(0, 2, 1, 3).reshape(rows.shape)
    return rows


VIEWS = [
    View(),
    View((RopePermute(6),)),
    View((Take(12, 0, 4),)),
    View((Take(12, 4, 2), RopePermute(2))),
    View((Take(4, 0, 2), Take(6, 3, 3))),
    View(transpose=Take(24, 0, 24)),
    View(transpose=Take(8, 0, 8)),
    View(transpose=Take(8, 2, 5)),
    View((Take(2, 1, 1),), transpose=Take(12, 0, 12)),
    View((Take(10, 5, 5), Take(5, 1, 3)), transpose=Take(6, 0, 6)),
]


@pytest.mark.parametrize("view", VIEWS)
def test_any_rows_of_a_view_are_those_of_the_whole(view: View) -> None:
    whole = np.random.default_rng(3).standard_normal((24, 10)).astype(np.float32)
    expected = _of_numpy(view, whole)
    assert view.problem(24, 10) is None
    assert view.shape(24, 10) == expected.shape
    for first, last in itertools.combinations(range(0, expected.shape[0] + 1, 3), 2):
        found = view.read(lambda rows, columns: whole[rows][:, columns], 10, first, last)
        assert np.array_equal(found, expected[first:last])


def test_rows_that_do_not_divide_are_refused() -> None:
    assert "groups of 5" in str(View((Take(5, 0, 1),)).problem(24, 10))
    assert "whole heads" in str(View((RopePermute(7),)).problem(21, 10))
    assert "groups of 7" in str(View(transpose=Take(7, 0, 7)).problem(24, 10))


def test_rows_are_scaled_to_unit_length() -> None:
    rows = np.array([[3.0, 4.0], [0.0, 0.0]], np.float32)
    assert np.allclose(View(unit=True).finalize(rows), [[0.6, 0.8], [0.0, 0.0]])


@pytest.mark.parametrize("name", ["neox", "gpt2", "falcon-40b", "deepseek-v3", "gpt-oss", "mixtral", "mixtral-fused"])
def test_blocks_of_every_kind_are_bounded_and_add_up(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", fan_in_fan_out=name == "gpt2")
    checkpoint = Checkpoint(base)
    family = family_of(ModelConfig(checkpoint.config))
    config = ModelConfig(checkpoint.config).completed(family.defaults)
    bound = bind(family, config, checkpoint.tensors)
    known = BaseTargets(targets(bound), family.canonical_name, stored_transposed(bound))
    changes = Adapter(adapter).changes(known)
    for tensor in stream.merged_tensors(family, config, checkpoint, bound, changes):
        whole = np.concatenate([block.rows for block in tensor.blocks(checkpoint)])
        for limit in (1, 3000):
            pieces = [block.rows for block in tensor.blocks(checkpoint, limit)]
            assert np.allclose(np.concatenate(pieces), whole, rtol=0, atol=1e-6)
            # a row is never cut, and a bias is read at once
            smallest = 4 * tensor.shape[-1] if tensor.part == "weight" else max(piece.nbytes for piece in pieces)
            assert max(piece.nbytes for piece in pieces) <= max(limit, smallest)


@pytest.mark.parametrize("name", [case for case in family_models.CASES if "before" not in case])
def test_every_weight_goes_to_one_place(name: str, tmp_path: Path) -> None:
    """Parts of a fused tensor leave nothing out and take nothing twice."""
    base = family_models.base(name, tmp_path / "base")
    checkpoint = Checkpoint(base)
    family = family_of(ModelConfig(checkpoint.config))
    config = ModelConfig(checkpoint.config).completed(family.defaults)
    used: dict[str, int] = {}
    for item in bind(family, config, checkpoint.tensors):
        for piece in item.pieces:
            if piece.target in (piece.source.name, family.canonical_name(piece.source.name)):
                rows, columns = piece.shape
                used[piece.source.name] = used.get(piece.source.name, 0) + rows * columns
    held = {name: int(np.prod(info.shape)) for name, info in checkpoint.tensors.items() if name in used}
    assert used == held
