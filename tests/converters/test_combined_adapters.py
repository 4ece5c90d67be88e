"""Several adapters are combined as PEFT combines them, and named in receipt and metadata."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import save_file

from edgetune.errors import ConfigError
from edgetune.exporting.run import prepare_export
from edgetune.exporting.source import find_source
from edgetune.validation.provenance import mismatches
from edgetune_converters.adapters.combined import Combination, rescaled, weighted_sum, without_smallest
from edgetune_converters.adapters.low_rank import best_factors
from edgetune_converters.adapters.torch_random import kept_at_random
from edgetune_converters.errors import AdapterError
from edgetune_converters.gguf import keys
from edgetune_converters.gguf.reader import read
from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from edgetune_converters.names import CombineName
from edgetune_converters.provenance.receipts import Receipt, combined_hash
from tests.converters import family_models, tiny
from tests.converters.peft_methods import METHODS, Method, adapter, merged_by_peft
from tests.converters.tiny import _between_libraries, peft, torch, transformers

merge_utils: Any = pytest.importorskip("peft.utils.merge_utils")

FAMILIES = ("llama", "qwen2", "gpt2")
_PAIRS: Sequence[Mapping[str, Any]] = ({"r": 4, "lora_alpha": 6}, {"r": 4, "lora_alpha": 3, "use_rslora": True})


@pytest.fixture(scope="module", params=FAMILIES)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp(request.param)
    if request.param in tiny.MODELS:
        return tiny.base(request.param, directory, tie_word_embeddings=False)
    family_models.base(request.param, directory)
    return directory


@pytest.fixture(scope="module")
def pair(base: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two LoRA adapters of different scales."""
    places = [tmp_path_factory.mktemp("first"), tmp_path_factory.mktemp("second")]
    for seed, (place, options) in enumerate(zip(places, _PAIRS, strict=True)):
        tiny.adapter(base, place, seed=seed + 1, **dict(options))
    return places


def folded(base: Path, combination: Combination) -> dict[str, Any]:
    """The merged tensors."""
    model = open_model(base, combination.adapters[0], merge_base_named("original"), None, combination)
    return {
        tensor.name: np.concatenate([make(1).floats for make in tensor.pieces(model.checkpoint, 3000)]).reshape(
            tensor.shape
        )
        for tensor in model.in_base_order
    }


@_between_libraries()
def combined_by_peft(base: Path, adapters: Sequence[Path], weights: Sequence[float], kind: str, **options: Any) -> Any:
    """The tensors that PEFT merges of a weighted adapter.

    Singular vectors are those of float64: float32 mixes those whose singular values are near each other.
    """
    dtype = torch.float64 if kind.endswith("svd") else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    wrapped = peft.PeftModel.from_pretrained(model, adapters[0], adapter_name="a0")
    for number, path in enumerate(adapters[1:], 1):
        wrapped.load_adapter(path, adapter_name=f"a{number}")
    names = [f"a{number}" for number in range(len(adapters))]
    wrapped.add_weighted_adapter(names, list(weights), "sum", combination_type=kind, **options)
    wrapped.set_adapter("sum")
    return wrapped.merge_and_unload().state_dict()


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.2, -0.4)])
@pytest.mark.parametrize(
    ("method", "kind", "options"),
    [
        ("linear", "cat", {}),
        ("cat", "cat", {}),
        ("svd", "svd", {}),
        ("svd", "svd", {"rank": 2}),
        ("ties-svd", "ties_svd", {"density": 0.4}),
        ("ties-svd", "ties_svd", {"density": 0.4, "rank": 9}),
        ("magnitude-prune-svd", "magnitude_prune_svd", {"density": 0.3, "rank": 3}),
        ("dare-linear-svd", "dare_linear_svd", {"density": 1.0}),
        ("dare-ties-svd", "dare_ties_svd", {"density": 1.0, "rank": 5}),
        ("ties", "ties", {"density": 0.4}),
        ("magnitude-prune", "magnitude_prune", {"density": 0.3}),
        ("dare-linear", "dare_linear", {"density": 1.0}),
        ("dare-ties", "dare_ties", {"density": 1.0}),
    ],
)
def test_pairs_are_combined_as_peft_combines_them(
    method: Any, kind: str, options: Mapping[str, Any], weights: tuple[float, float], base: Path, pair: list[Path]
) -> None:
    renamed = {"svd_rank" if name == "rank" else name: value for name, value in options.items()}
    theirs = combined_by_peft(base, pair, weights, kind, **renamed)
    ours = folded(base, Combination(tuple(pair), weights, method, **options))
    for name, values in ours.items():
        assert np.allclose(values, theirs[name].numpy(), rtol=1e-5, atol=2e-6), name


def test_changes_of_any_kind_are_added(base: Path, pair: list[Path], tmp_path: Path) -> None:
    kinds = {"ia3": METHODS["ia3"], "hira": Method("HiraConfig", {"r": 3, "init_weights": False})}
    places = {name: adapter(base, tmp_path / name, method) for name, method in kinds.items()}
    adapters, weights = (pair[0], *places.values()), (0.5, 0.25, 2.0)
    ours = folded(base, Combination(adapters, weights))
    before = {name: tensor.numpy() for name, tensor in _state(base).items()}
    alone = [merged_by_peft(base, path) for path in adapters]
    for name, values in ours.items():
        wanted = before[name] + sum(
            weight * (merged[name].numpy() - before[name]) for weight, merged in zip(weights, alone, strict=True)
        )
        assert np.allclose(values, wanted, rtol=1e-5, atol=5e-6), name


def _state(base: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).state_dict()


@settings(max_examples=30)
@given(
    shape=st.tuples(st.integers(1, 9), st.integers(1, 9)),
    weights=st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=4),
    density=st.floats(0.1, 0.95),
    seed=st.integers(0, 2**32 - 1),
)
def test_each_step_is_that_of_peft(shape: tuple[int, int], weights: list[float], density: float, seed: int) -> None:
    torch.manual_seed(seed)
    values = [torch.randn(shape) for _ in weights]
    weight = torch.tensor(weights)
    pruned = np.stack([without_smallest(each.numpy(), density) for each in values])
    torch.manual_seed(seed)
    drawn = merge_utils.prune(values[0], density, "random", rescale=True).numpy()
    assert np.allclose(
        rescaled(values[0].numpy(), kept_at_random(values[0].numel(), density, seed), density), drawn, rtol=1e-6
    )
    for by_majority, theirs in ((True, merge_utils.ties), (False, merge_utils.magnitude_prune)):
        ours = weighted_sum(pruned, weight.numpy(), by_majority=by_majority)
        assert np.allclose(ours, theirs(values, weight, density).numpy(), rtol=1e-5, atol=1e-6)


def test_dare_keeps_the_share_and_follows_the_seed(base: Path, pair: list[Path]) -> None:
    weights = (0.5, 0.5)
    first, again, other = (
        folded(base, Combination(tuple(pair), weights, "dare-linear", 0.5, seed)) for seed in (1, 1, 2)
    )
    changed = [name for name in first if not np.array_equal(first[name], other[name])]
    assert len(changed) >= 6
    assert all(np.array_equal(first[name], again[name]) for name in first)


def test_what_cannot_be_pruned_is_named(base: Path, pair: list[Path], tmp_path: Path) -> None:
    tiny.adapter(base, tmp_path / "wide", r=5)
    said = r"(?s)ties cannot combine.*changed by .* and wide: the ranks 4, 5 differ\n.*\.\.\. and \d+ more"
    with pytest.raises(AdapterError, match=said):
        folded(base, Combination((pair[0], tmp_path / "wide"), (1, 1), "ties", 0.5))
    adapter(base, tmp_path / "hira", Method("HiraConfig", {"r": 3, "init_weights": False}))
    methods: tuple[CombineName, ...] = ("ties", "cat", "svd", "ties-svd")
    for method in methods:
        with pytest.raises(AdapterError, match="not changed by a pair A, B of LoRA alone"):
            folded(base, Combination((pair[0], tmp_path / "hira"), (1, 1), method, 0.5))


@pytest.mark.parametrize("place", [0, 1])
def test_an_adapter_with_new_biases_is_refused_in_any_place(tmp_path: Path, place: int) -> None:
    base = tiny.base("llama", tmp_path / "base", attention_bias=False, mlp_bias=False)
    lora, folder = tmp_path / "lora", tmp_path / "biases"
    tiny.adapter(base, lora)
    folder.mkdir()
    name = "model.layers.0.mlp.down_proj.bias"
    width = json.loads((base / "config.json").read_text())["hidden_size"]
    save_file({name: np.ones(width, np.float32)}, folder / "adapter_model.safetensors")
    settings_ = {"peft_type": None, "edgetune_method": "bitfit", "zero_in_base": [name], "trained_tensors": [name]}
    (folder / "adapter_config.json").write_text(json.dumps(settings_))
    adapters = (folder, lora) if place == 0 else (lora, folder)
    with pytest.raises(AdapterError, match="biases has biases that the base has not, and cannot be combined"):
        folded(base, Combination(adapters, (0.5, 0.5)))


def test_products_of_different_ranks_are_combined_to_the_largest(base: Path, pair: list[Path], tmp_path: Path) -> None:
    """PEFT too takes the largest rank where none is given."""
    adapters = (pair[0], tiny.adapter(base, tmp_path / "wide", seed=7, r=7))
    for made, kind, density in (
        (Combination(adapters, (0.8, 0.5), "svd"), "svd", None),
        (Combination(adapters, (0.8, 0.5), "ties-svd", 0.6), "ties_svd", 0.6),
    ):
        theirs = combined_by_peft(base, adapters, made.weights, kind, density=density)
        for name, values in folded(base, made).items():
            assert np.allclose(values, theirs[name].numpy(), rtol=1e-5, atol=2e-6), name


def test_products_of_adapters_keep_what_dare_draws(base: Path, pair: list[Path]) -> None:
    """The rank is whole, so that singular values leave out nothing: kept values are scaled, the others are zero."""
    before = {name: tensor.numpy() for name, tensor in _state(base).items()}
    whole = folded(base, Combination((pair[0],) * 2, (1.0, 0.0), "svd"))
    drawn = folded(base, Combination((pair[0],) * 2, (1.0, 0.0), "dare-linear-svd", 0.5, 3, rank=10_000))
    changed = [name for name in whole if not np.array_equal(whole[name], before[name])]
    assert len(changed) >= 4
    for name in changed:
        kept = np.abs(drawn[name] - before[name]) > 1e-6
        assert 0.4 < kept.mean() < 0.6
        wanted = np.where(kept, before[name] + 2 * (whole[name] - before[name]), before[name])
        assert np.allclose(drawn[name], wanted, atol=5e-6), name


@given(shape=st.tuples(st.integers(1, 12), st.integers(1, 12)), rank=st.integers(1, 14), seed=st.integers(0, 2**32 - 1))
def test_the_best_factors_are_those_of_the_largest_singular_values(
    shape: tuple[int, int], rank: int, seed: int
) -> None:
    matrix = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
    left, right = best_factors(matrix, rank)
    u, values, v = np.linalg.svd(matrix.astype(np.float64), full_matrices=False)
    assert np.allclose(left @ right, (u[:, :rank] * values[:rank]) @ v[:rank], atol=1e-5)
    assert left.shape[1] == right.shape[0] == min(rank, *shape)


def test_receipt_and_metadata_name_all_adapters(base: Path, pair: list[Path], tmp_path: Path) -> None:
    options = {"formats": ["gguf", "gguf-lora"], "types": ["f32"], "adapter_weights": [0.7, 0.3]}
    export = prepare_export(find_source(None, base, pair[0], pair[1:]), options, tmp_path)
    receipts = export.run()
    made = Receipt.read(Path(receipts[0].artifact))
    assert made.combination is not None
    stated = made.combination["adapters"]
    assert [(each["name"], each["weight"]) for each in stated] == [(pair[0].name, 0.7), (pair[1].name, 0.3)]
    assert made.adapter is not None
    assert made.adapter.keys() >= {f"{pair[1].name}/adapter_model.safetensors", "combination"}
    metadata = read(Path(made.artifact)).metadata
    assert json.loads(str(metadata[keys.COMBINATION])) == made.combination
    assert metadata[keys.ADAPTER_HASH] == combined_hash(made.adapter)
    other = prepare_export(
        find_source(None, base, pair[0], pair[1:]), options | {"adapter_weights": [0.6, 0.4]}, tmp_path / "other"
    ).run()
    assert other[0].adapter != made.adapter


@pytest.mark.parametrize(
    ("count", "options", "message"),
    [
        (2, {}, "2 adapters and 0 weights were given"),
        (2, {"adapter_weights": [0.0, 0.0]}, "every --adapter-weight is 0, and the file would equal the base"),
        (2, {"adapter_weights": [1.0]}, "2 adapters and 1 weights were given"),
        (0, {"adapter_weights": [1.0]}, "there is no adapter to weight"),
        (1, {"combine": "ties", "density": 0.5}, "--combine ties combines several adapters"),
        (1, {"adapter_weights": [1], "combine": "cat"}, "--combine cat combines several adapters"),
        (2, {"adapter_weights": [1, 1], "combine": "ties"}, "--combine ties prunes values: give --density"),
        (2, {"adapter_weights": [1, 1], "combine": "svd", "density": 0.5}, "--density is for ties"),
        (2, {"adapter_weights": [1, 1], "combine_rank": 4}, "--combine-rank is for svd, ties-svd, dare-linear-svd"),
        (2, {"adapter_weights": [1, 1], "density": 0.5}, "--density is for ties"),
        (
            2,
            {"adapter_weights": [1, 1], "combine": "ties", "density": 0.5, "combine_seed": 4},
            "--combine-seed is for dare-linear, dare-ties, dare-linear-svd and dare-ties-svd",
        ),
    ],
)
def test_contradictions_are_named(count: int, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    adapters = [tmp_path / f"a{number}" for number in range(count)]
    source = find_source(None, tmp_path, adapters[0] if adapters else None, adapters[1:])
    with pytest.raises(ConfigError, match=message):
        prepare_export(source, options)


def test_validate_says_that_a_file_combines_several_adapters(tmp_path: Path) -> None:
    """`mismatches` needs of a run its manifest and its adapter alone."""
    tiny.base("llama", tmp_path / "base")
    own, other = tmp_path / "own", tmp_path / "other"
    tiny.adapter(tmp_path / "base", own)
    tiny.adapter(tmp_path / "base", other, seed=5)
    options = {"formats": ["gguf-lora"], "types": ["f32"], "adapter_weights": [0.7, 0.3]}
    export = prepare_export(find_source(None, tmp_path / "base", own, [other]), options, tmp_path / "file.gguf")
    (receipt,) = export.run()
    metadata = read(Path(receipt.artifact)).metadata
    for adapter_of_run, among in ((own, "among them this run's"), (tmp_path / "third", "none of them this run's")):
        if not adapter_of_run.exists():
            tiny.adapter(tmp_path / "base", adapter_of_run, seed=6)
        run: Any = SimpleNamespace(
            manifest=SimpleNamespace(base=SimpleNamespace(files=receipt.base), captured_task=None),
            adapter=adapter_of_run,
            trained_adapter={},
        )
        (found,) = mismatches(metadata, run)
        assert found == f"the file combines several adapters (own 0.7, other 0.3; linear), {among}"
