"""A change that is no pair A, B becomes one of a given rank, and llama.cpp computes with it what PEFT computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune.exporting.run import prepare_export
from edgetune.exporting.source import find_source
from edgetune_converters.adapters.low_rank import low_rank, of_product
from edgetune_converters.errors import AdapterError
from edgetune_converters.provenance.receipts import Receipt
from tests.converters import family_models, runtime, tiny
from tests.converters.peft_methods import METHODS, Method, adapter, merged_by_peft
from tests.export_requests import export

FAMILIES = ("llama", "qwen2", "gpt2")
# kinds that have a low-rank form: exact without a rank
EXACT = {
    "adalora": METHODS["adalora"],
    "vera": METHODS["vera"],
    "miss": Method("MissConfig", {"r": 4}),
    "gralora": Method("GraloraConfig", {"r": 4}, linear_only=False),
    "delora": Method("DeloraConfig", {"r": 4}),
}
# kind -> rank from which it is exact on matrices of 96 to 160 rows and columns
APPROXIMATED = {"dora": 96, "loha": 36, "lokr": 160, "oft": 160, "boft": 160}
EXACT_KLD = 1e-8
# |D| is about a tenth of |W|, and D is a difference of f32 values
ROUNDING_KLD = 1e-7


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param in tiny.MODELS:
        tiny.base(request.param, directory / "base", tie_word_embeddings=False)
    else:
        family_models.base(request.param, directory / "base")
    export(directory / "base", {"f32": directory / "base.gguf"})
    return directory / "base"


def exported(base: Path, trained: Path, folder: Path, **options: Any) -> Receipt:
    source = find_source(None, base, trained)
    return prepare_export(source, {"formats": ["gguf-lora"], "types": ["f32"], **options}, folder / "x.gguf").run()[0]


def _divergence(base: Path, trained: Path, file: Path) -> float:
    ids = tiny.random_ids(64)
    theirs = tiny.torch_logits(base, trained, ids)
    assert tiny.divergence(theirs, tiny.torch_logits(base, None, ids))[0] > 1000 * EXACT_KLD
    return tiny.divergence(theirs, runtime.logits(base.with_suffix(".gguf"), ids, file))[0]


def _supported(method: Method, base: Path) -> None:
    if method.linear_only and "gpt2" in str(base):
        pytest.skip("PEFT refuses Conv1D")


@pytest.mark.parametrize("name", EXACT)
def test_kinds_with_a_low_rank_form_are_exact(name: str, base: Path, tmp_path: Path) -> None:
    _supported(EXACT[name], base)
    trained = adapter(base, tmp_path / "adapter", EXACT[name])
    receipt = exported(base, trained, tmp_path)
    assert receipt.lora_error is None
    assert _divergence(base, trained, Path(receipt.artifact)) < EXACT_KLD


@pytest.mark.parametrize("name", APPROXIMATED)
def test_other_kinds_are_exact_at_their_rank(name: str, base: Path, tmp_path: Path) -> None:
    _supported(METHODS[name], base)
    trained = adapter(base, tmp_path / "adapter", METHODS[name])
    with pytest.raises(AdapterError, match=r"no product of two small matrices") as refused:
        exported(base, trained, tmp_path)
    assert "--lora-rank N" in str(refused.value.hint)
    receipt = exported(base, trained, tmp_path, lora_rank=APPROXIMATED[name])
    assert receipt.lora_error is not None
    assert max(receipt.lora_error.values()) < 1e-4
    assert _divergence(base, trained, Path(receipt.artifact)) < ROUNDING_KLD


def test_the_error_is_stated_and_bounded(base: Path, tmp_path: Path) -> None:
    trained = adapter(base, tmp_path / "adapter", METHODS["dora"])
    with pytest.raises(AdapterError, match=r"rank 4 leave out too much .* at most 0.05 is allowed"):
        exported(base, trained, tmp_path, lora_rank=4, lora_max_error=0.05)
    receipt = exported(base, trained, tmp_path, lora_rank=4, lora_max_error=1.0)
    assert receipt.lora_error is not None
    merged, before = merged_by_peft(base, trained), merged_by_peft_without(base)
    module = "transformer.h.1.attn.c_attn" if "gpt2" in str(base) else "model.layers.1.mlp.down_proj"
    change = (merged[f"{module}.weight"] - before[f"{module}.weight"]).numpy()
    values = np.linalg.svd(change.astype(np.float64), compute_uv=False)
    wanted = np.sqrt(np.square(values[4:]).sum() / np.square(values).sum())
    name = "blk.1.attn_qkv.weight" if "gpt2" in str(base) else "blk.1.ffn_down.weight"
    assert receipt.lora_error[name] == pytest.approx(wanted, rel=1e-3)
    assert "changes are approximated by pairs A, B: the relative error is" in " ".join(receipt.notes)


def merged_by_peft_without(base: Path) -> Any:
    return tiny.transformers.AutoModelForCausalLM.from_pretrained(base, dtype=tiny.torch.float32).state_dict()


def test_pairs_of_a_higher_rank_are_cut(base: Path, tmp_path: Path) -> None:
    trained = tiny.adapter(base, tmp_path / "adapter", r=8)
    assert exported(base, trained, tmp_path).lora_error is None
    receipt = exported(base, trained, tmp_path / "cut", lora_rank=6, lora_max_error=1.0)
    assert receipt.lora_error is not None
    assert min(receipt.lora_error.values()) > 0.01


def _random(shape: tuple[int, int], seed: int, decay: float) -> NDArray[np.float32]:
    random = np.random.default_rng(seed)
    left, right = random.normal(size=(shape[0], 40)), random.normal(size=(40, shape[1]))
    return (left * decay ** np.arange(40) @ right).astype(np.float32)


@settings(max_examples=15)
@given(
    shape=st.tuples(st.integers(1, 60), st.integers(1, 60)), rank=st.integers(1, 70), seed=st.integers(0, 2**31)
)  # fmt: skip
def test_factors_leave_out_least(shape: tuple[int, int], rank: int, seed: int) -> None:
    matrix = _random(shape, seed, 0.8)
    made = low_rank(matrix, rank)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    assert made.left.shape[1] == min(rank, *shape)
    assert made.error == pytest.approx(float(np.square(values[rank:]).sum()), rel=1e-3, abs=1e-8 * made.norm)
    left, right = np.linalg.qr(matrix)
    cut = of_product(left, right, rank)
    assert np.allclose(cut.left @ cut.right, made.left @ made.right, atol=1e-4 * np.sqrt(made.norm))
    assert cut.error == pytest.approx(made.error, rel=1e-3, abs=1e-8 * made.norm)


@pytest.mark.parametrize("shape", [(700, 600), (600, 900)])
def test_the_randomized_factors_of_a_large_matrix_are_near_the_best(shape: tuple[int, int]) -> None:
    matrix = _random(shape, 1, 0.9) + np.random.default_rng(2).normal(size=shape).astype(np.float32) * 0.01
    made = low_rank(matrix, 8)
    values = np.linalg.svd(matrix.astype(np.float64), compute_uv=False)
    best = float(np.square(values[8:]).sum())
    assert best * (1 - 1e-5) <= made.error <= best * 1.001
