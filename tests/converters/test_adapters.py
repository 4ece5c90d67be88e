"""The delta of each tensor is PEFT's own, and an adapter that does not fit is refused with all its faults."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.errors import AdapterError
from tests.converters.test_checkpoint import safetensors

TARGETS = {"m.q.weight": (6, 4), "m.r.weight": (6, 4), "m.v.weight": (3, 4), "m.v.bias": (3,), "e.weight": (10, 4)}
_CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
_RANDOM = np.random.default_rng(0)
A = _RANDOM.normal(size=(2, 4)).astype(np.float32)
B = _RANDOM.normal(size=(6, 2)).astype(np.float32)

Tensors = dict[str, NDArray[Any]]


def write(directory: Path, tensors: Tensors | None = None, **config: Any) -> Path:
    """An adapter directory; by default one pair on m.q."""
    if tensors is None:
        tensors = pair("base_model.model.m.q")
    directory.mkdir(exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(_CONFIG | config))
    entries = {name: ("F32", list(value.shape), value.astype("<f4").tobytes()) for name, value in tensors.items()}
    safetensors(directory / "adapter_model.safetensors", entries)
    return directory


def pair(module: str, a: NDArray[Any] = A, b: NDArray[Any] = B) -> Tensors:
    return {f"{module}.lora_A.weight": a, f"{module}.lora_B.weight": b}


def delta(directory: Path, target: str = "m.q.weight") -> NDArray[np.float32]:
    factors = Adapter(directory).changes(BaseTargets(TARGETS))[target].factors
    assert factors is not None
    left, right = factors()
    return left @ right


@pytest.mark.parametrize(
    ("config", "scale"),
    [
        ({}, 8 / 2),
        ({"use_rslora": True}, 8 / 2**0.5),
        ({"alpha_pattern": {"q": 3}}, 3 / 2),
        ({"alpha_pattern": {"m.q": 5, "q": 3}}, 5 / 2),
        ({"alpha_pattern": {"other": 3}}, 8 / 2),
        ({"r": 99, "rank_pattern": {"q": 2}, "use_rslora": True}, 8 / 2**0.5),
    ],
)
def test_the_scale_follows_rank_alpha_and_patterns(config: dict[str, Any], scale: float, tmp_path: Path) -> None:
    assert np.allclose(delta(write(tmp_path, **config)), scale * B @ A, rtol=1e-6)


def test_fan_in_fan_out_transposes(tmp_path: Path) -> None:
    tensors = pair("base_model.model.m.q", B.T[:, :6], A.T)
    assert np.allclose(delta(write(tmp_path, tensors, fan_in_fan_out=True)), 4 * (A.T @ B.T).T, rtol=1e-5)


def test_an_embedding_is_transposed(tmp_path: Path) -> None:
    a, b = _RANDOM.normal(size=(2, 10)).astype(np.float32), _RANDOM.normal(size=(4, 2)).astype(np.float32)
    tensors = {"base_model.model.e.lora_embedding_A": a, "base_model.model.e.lora_embedding_B": b}
    assert np.allclose(delta(write(tmp_path, tensors), "e.weight"), 4 * (b @ a).T, rtol=1e-5)


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("prefix", ["", "base_model.model."])
def test_tensor_names_are_read_with_and_without_peft_prefixes(prefix: str, infix: str, tmp_path: Path) -> None:
    tensors = {f"{prefix}m.q.lora_A{infix}.weight": A, f"{prefix}m.q.lora_B{infix}.weight": B}
    assert np.allclose(delta(write(tmp_path, tensors)), 4 * B @ A, rtol=1e-6)


@pytest.mark.parametrize("name", ["m.v.weight", "m.v.base_layer.weight", "m.v.modules_to_save.default.weight"])
def test_modules_to_save_replace_the_tensor(name: str, tmp_path: Path) -> None:
    value = _RANDOM.normal(size=(3, 4)).astype(np.float32)
    change = Adapter(write(tmp_path, {f"base_model.model.{name}": value})).changes(BaseTargets(TARGETS))["m.v.weight"]
    assert change.replacement is not None
    replaced = change.file.rows(change.replacement, slice(1, 3))
    assert np.array_equal(replaced, value[1:3])


def test_identity_names_both_files(tmp_path: Path) -> None:
    first = Adapter(write(tmp_path / "a")).identity()
    assert sorted(first) == ["adapter_config.json", "adapter_model.safetensors"]
    assert first == Adapter(write(tmp_path / "b")).identity()
    assert first != Adapter(write(tmp_path / "c", lora_alpha=9)).identity()


# -- adapters that do not fit ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        (pair("m.nothing"), "m.nothing is not a module of the base model"),
        ({"m.q.lora_A.weight": A}, "m.q has no lora_B"),
        ({"m.q.lora_B.weight": B}, "m.q has no lora_A"),
        (pair("m.q", A[:, :3]), r"A \[2, 3\] and B \[6, 2\] do not fit \[6, 4\] at rank 2"),
        (pair("m.q", A[:1], B[:, :1]), "at rank 2"),
        (pair("m.q", A, B * 0), "is all zero: training changed nothing"),
        (pair("m.q", A, B * 0) | pair("m.r", A * 0, B), "^the adapter .* is all zero: .* would equal the base"),
        (pair("m.q", A * np.nan, B), "hold NaN or infinity"),
        (pair("m.q", A, B * np.inf), "hold NaN or infinity"),
        (pair("m.q") | {"m.q.lora_magnitude_vector": A}, r"m.q has a lora_magnitude_vector \(DoRA\)"),
        (
            pair("m.q") | {"m.q.lora_B.bias": B[:, 0]},
            r"m.q has a LoRA bias \(lora_bias\), for which the base has no bias",
        ),
        (pair("m.q") | {"m.q.lora_A.default.weight": A}, "is duplicated under another name"),
        ({"z.weight": A}, "z.weight matches no tensor of the base model"),
        ({"m.v.weight": A}, r"m.v.weight has the shape \[2, 4\], the base \[3, 4\]"),
        ({}, "holds no tensors"),
        (pair("m.q", A[:0], B[:, :0]), "2 tensors are empty: they were saved before DeepSpeed"),
        (
            {f"m.q{n}.lora_A.weight": A for n in range(9)},
            "(?s)m.q2 has no lora_B.*6 more modules do not fit",
        ),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_tensors_that_do_not_fit_the_base_are_refused(tensors: Tensors, message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter(write(tmp_path, tensors)).changes(BaseTargets(TARGETS))


@pytest.mark.parametrize(("a", "b"), [(A, B * 0), (A * 0, B)])
def test_a_pair_without_effect_is_noted(a: NDArray[Any], b: NDArray[Any], tmp_path: Path) -> None:
    adapter = Adapter(write(tmp_path, pair("m.q", a, b) | pair("m.r")))
    assert adapter.changes(BaseTargets(TARGETS)).keys() == {"m.q.weight", "m.r.weight"}
    assert "1 of 2 pairs A, B change nothing, because their product is zero: m.q.lora_B.weight" in adapter.notes[0]


@pytest.mark.parametrize(
    ("tensors", "hint"),
    [
        (pair("m.nothing"), "Was it trained on this base model"),
        (pair("m.q", A[:0], B[:, :0]), "Save it again"),
        (pair("m.q", A, B * np.inf), "Save it again"),
        ({"m.v.weight": A[:1], "m.v.modules_to_save.weight": A[1:]}, "Save it again"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value encountered in multiply")
def test_the_hint_doubts_the_base_only_where_names_or_shapes_differ(
    tensors: Tensors, hint: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError) as raised:
        Adapter(write(tmp_path, tensors)).changes(BaseTargets(TARGETS | {"m.v.weight": (1, 4)}))
    assert (raised.value.hint or "").startswith(hint)


def test_a_trained_tensor_that_an_adapter_lacks_is_named(tmp_path: Path) -> None:
    stated = {"peft_type": None, "edgetune_method": "freeze", "trained_tensors": ["m.v.bias", "m.v.weight"]}
    folder = write(tmp_path, {"m.v.weight": np.ones((3, 4), np.float32)}, **stated)
    with pytest.raises(AdapterError, match=r"m\.v\.bias is a trained tensor that the adapter lacks"):
        Adapter(folder).changes(BaseTargets(TARGETS))


def test_all_faults_are_reported_at_once(tmp_path: Path) -> None:
    tensors = pair("m.nothing") | {"m.q.lora_A.weight": A} | {"odd": B}
    with pytest.raises(AdapterError, match=r"(?s)3 problems.*odd is not.*m.nothing is not.*m.q has no lora_B"):
        Adapter(write(tmp_path, tensors)).changes(BaseTargets(TARGETS))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"peft_type": "NEVER_HEARD_OF"}, "of the kind NEVER_HEARD_OF, which cannot be merged; known are .*LORA"),
        ({"peft_type": None}, "adapter_config.json states no peft_type"),
        ({"peft_type": ["LORA"]}, "of the kind"),
        ({"use_dora": True}, "has no lora_magnitude_vector"),
        ({"use_dora": "yes"}, "use_dora is 'yes', not true or false"),
        ({"kasa_config": {"beta": 1}}, "KaSA"),
        ({"layer_replication": [0, 2]}, r"layer_replication is \[0, 2\], not a list of ranges"),
        ({"init_lora_weights": "pissa"}, "initialized with 'pissa'"),
        ({"init_lora_weights": "pissa_niter_4"}, "initialized with 'pissa_niter_4'"),
        ({"init_lora_weights": "loftq"}, "initialized with 'loftq'"),
        ({"init_lora_weights": "never heard of"}, "initialized with 'never heard of'"),
        ({"r": 0}, "r is 0"),
        ({"r": "two"}, "r is 'two'"),
        ({"lora_alpha": None}, "lora_alpha is None"),
        ({"lora_alpha": 10**400}, "lora_alpha is 1000"),
        ({"rank_pattern": {"(": 3}}, "is not a pattern"),
        ({"rank_pattern": [3]}, "must be objects"),
    ],
)
def test_kinds_that_cannot_be_merged_are_named(config: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(AdapterError, match=message):
        Adapter(write(tmp_path, **config)).changes(BaseTargets(TARGETS))


@pytest.mark.parametrize("start", [True, False, "gaussian", "eva", "orthogonal"])
def test_initializations_that_keep_the_base_are_accepted(start: object, tmp_path: Path) -> None:
    assert Adapter(write(tmp_path, init_lora_weights=start)).changes(BaseTargets(TARGETS))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), r"has the weights of an adapter, but no adapter_config\.json"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "is not JSON"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), r"has no adapter_model\.safetensors"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"123"), "too few"),
        (
            lambda d: (d / "adapter_model.safetensors").rename(d / "adapter_model.bin"),
            r"adapter_model\.bin is not a file",
        ),
    ],
)
def test_damaged_directories_are_refused(damage: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    damage(write(tmp_path))
    with pytest.raises(AdapterError, match=message):
        Adapter(tmp_path)
