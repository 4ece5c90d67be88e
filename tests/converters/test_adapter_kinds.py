"""Every kind of adapters is matched with its base in one way: what does not fit is named, what is idle is refused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import pytest
from numpy.typing import NDArray

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.expert_factors import ExpertPart
from edgetune_converters.errors import AdapterError
from edgetune_converters.tensors import ALL, F32, RowIndex
from tests.converters.test_adapters import write

ROWS, COLUMNS, RANK = 6, 4, 2
TARGETS = {"m.q.weight": (ROWS, COLUMNS), "m.q.bias": (ROWS,), "m.n.weight": (COLUMNS,), "e.weight": (10, COLUMNS)}
_RANDOM = np.random.default_rng(0)
Tensors = dict[str, NDArray[Any]]


class Case(NamedTuple):
    """An adapter of a kind on the module m.q: the shapes of its tensors, and the value of one that changes nothing."""

    kind: str
    shapes: dict[str, tuple[int, ...]]
    idle: dict[str, float]
    config: Mapping[str, Any] = MappingProxyType({})
    shared: tuple[str, ...] = ()


CASES = {
    "DoRA": Case(
        "LORA",
        {"lora_A.weight": (RANK, COLUMNS), "lora_B.weight": (ROWS, RANK), "lora_magnitude_vector": (ROWS,)},
        {"lora_B.weight": 0},
        {"use_dora": True, "r": RANK, "lora_alpha": 3},
    ),
    "AdaLoRA": Case(
        "ADALORA",
        {"lora_A": (RANK, COLUMNS), "lora_B": (ROWS, RANK), "lora_E": (RANK, 1)},
        {"lora_E": 0},
        {"init_r": 9, "lora_alpha": 3},
    ),
    "LoHa": Case(
        "LOHA",
        {
            "hada_w1_a": (ROWS, RANK), "hada_w1_b": (RANK, COLUMNS), "hada_w2_a": (ROWS, RANK),
            "hada_w2_b": (RANK, COLUMNS),
        },
        {"hada_w2_b": 0},
        {"r": RANK, "alpha": 3},
    ),
    "LoKr": Case(
        "LOKR",
        {"lokr_w1": (2, 2), "lokr_w2_a": (3, RANK), "lokr_w2_b": (RANK, 2)},
        {"lokr_w1": 0},
        {"r": RANK, "alpha": 3},
    ),
    "IA3": Case("IA3", {"ia3_l": (ROWS, 1)}, {"ia3_l": 1}),
    "VeRA": Case(
        "VERA",
        {"vera_lambda_b": (ROWS,), "vera_lambda_d": (RANK,), "vera_A": (RANK, COLUMNS + 3), "vera_B": (ROWS + 1, RANK)},
        {"vera_lambda_b": 0},
        {"r": RANK, "save_projection": True},
        shared=("vera_A", "vera_B"),
    ),
    "OFT": Case("OFT", {"oft_R.weight": (2, 1)}, {"oft_R.weight": 0}),
    "BOFT": Case("BOFT", {"boft_R": (1, 2, 2, 2), "boft_s": (ROWS, 1)}, {"boft_R": 0, "boft_s": 1}),
    "HRA": Case("HRA", {"hra_u": (COLUMNS, RANK)}, {"hra_u": 1}, {"r": RANK}),
}  # fmt: skip


def tensors(case: Case, module: str = "base_model.model.m.q") -> Tensors:
    values = {role: _RANDOM.normal(size=shape).astype(np.float32) for role, shape in case.shapes.items()}
    return {
        f"base_model.{role}" if role in case.shared else f"{module}.{role}": value for role, value in values.items()
    }


def adapter(directory: Path, case: Case, values: Tensors, **config: Any) -> Adapter:
    stated = {"peft_type": case.kind, **case.config, **config}
    write(directory, values)
    (directory / "adapter_config.json").write_text(json.dumps(stated))
    return Adapter(directory)


def merged(of: Adapter, base: BaseTargets, target: str, stored: F32) -> F32:
    change = of.changes(base)[target]

    def read(rows: RowIndex, columns: RowIndex) -> F32:
        return stored[rows][:, columns]

    if change.factors is not None:
        left, right = change.factors()
        return stored + left @ right
    assert change.transform is not None
    return change.transform.apply(read, read)(ALL, ALL)


@pytest.mark.parametrize("name", CASES)
def test_the_kind_changes_its_module_and_uses_every_tensor(name: str, tmp_path: Path) -> None:
    found = adapter(tmp_path, CASES[name], tensors(CASES[name]))
    stored = _RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    changes = found.changes(BaseTargets(TARGETS))
    assert set(changes) == ({"m.q.weight", "m.q.bias"} if name == "IA3" else {"m.q.weight"})
    assert not np.allclose(merged(found, BaseTargets(TARGETS), "m.q.weight", stored), stored)
    assert found.notes == []


@pytest.mark.parametrize("name", CASES)
def test_a_base_that_stores_the_matrix_transposed_gets_the_same_change(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    found = adapter(tmp_path, case, tensors(case))
    stored = _RANDOM.normal(size=(ROWS, COLUMNS)).astype(np.float32)
    turned = BaseTargets({**TARGETS, "m.q.weight": (COLUMNS, ROWS)}, transposed={"m.q.weight"})
    one = merged(found, BaseTargets(TARGETS, transposed=()), "m.q.weight", stored)
    other = merged(found, turned, "m.q.weight", np.ascontiguousarray(stored.T))
    assert np.allclose(one, other.T, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("infix", ["", ".default"])
@pytest.mark.parametrize("prefix", ["", "base_model.model.", "base_model.model.module."])
@pytest.mark.parametrize("name", CASES)
def test_names_are_read_with_prefixes_and_the_name_of_the_adapter(
    name: str, prefix: str, infix: str, tmp_path: Path
) -> None:
    case = CASES[name]
    values = {
        (key.removesuffix(".weight") + infix + (".weight" if key.endswith(".weight") else "")): value
        for key, value in tensors(case, f"{prefix}m.q").items()
    }
    assert "m.q.weight" in adapter(tmp_path, case, values).changes(BaseTargets(TARGETS))


EVERY_ROLE = [pytest.param(name, role, id=f"{name}-{role}") for name, case in CASES.items() for role in case.shapes]


def _key(values: Tensors, role: str) -> str:
    return next(key for key in values if key.endswith(role))


@pytest.mark.parametrize(("name", "role"), [case for case in EVERY_ROLE if len(CASES[str(case.values[0])].shapes) > 1])
def test_a_missing_tensor_is_named(name: str, role: str, tmp_path: Path) -> None:
    values = tensors(CASES[name])
    del values[_key(values, role)]
    with pytest.raises(AdapterError, match=f"m.q has no {role.removesuffix('.weight')}"):
        adapter(tmp_path, CASES[name], values).changes(BaseTargets(TARGETS))


@pytest.mark.parametrize(("name", "role"), EVERY_ROLE)
def test_nan_is_named(name: str, role: str, tmp_path: Path) -> None:
    values = tensors(CASES[name])
    key = _key(values, role)
    values[key] = np.full_like(values[key], np.nan)
    with pytest.raises(AdapterError, match="NaN or infinity") as caught:
        adapter(tmp_path, CASES[name], values).changes(BaseTargets(TARGETS))
    assert role.split("_")[-1].removesuffix(".weight") in str(caught.value)


@pytest.mark.parametrize(("name", "role"), EVERY_ROLE)
def test_another_shape_is_named(name: str, role: str, tmp_path: Path) -> None:
    values = tensors(CASES[name])
    key = _key(values, role)
    values[key] = np.ones((7, 11), np.float32)
    with pytest.raises(AdapterError, match=r"\[7, 11\]|do not make|shape \[\d+, 2\], not"):
        adapter(tmp_path, CASES[name], values).changes(BaseTargets(TARGETS))


@pytest.mark.parametrize("name", CASES)
def test_tensors_of_other_names_are_listed_with_all_other_problems(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    values = tensors(case) | tensors(case, "base_model.model.m.nothing") | {"odd": np.ones((2, 2), np.float32)}
    values["base_model.model.m.q.lora_C.weight"] = np.ones((2, 2), np.float32)
    with pytest.raises(AdapterError) as caught:
        adapter(tmp_path, case, values).changes(BaseTargets(TARGETS))
    assert "odd is not a tensor of a" in str(caught.value)
    assert "m.q.lora_C.weight matches no tensor of the base model" in str(caught.value)
    assert "m.nothing is not a module of the base model" in str(caught.value)


@pytest.mark.parametrize("name", CASES)
def test_an_adapter_that_changes_nothing_is_refused(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    values = tensors(case)
    for role, value in case.idle.items():
        values[_key(values, role)][:] = value
    with pytest.raises(AdapterError, match="is all zero: training changed nothing"):
        adapter(tmp_path, case, values).changes(BaseTargets(TARGETS))


def test_a_module_that_is_unchanged_beside_others_is_noted(tmp_path: Path) -> None:
    values = tensors(CASES["IA3"]) | {"m.r.ia3_l": np.ones((1, COLUMNS), np.float32)}
    found = adapter(tmp_path, CASES["IA3"], values)
    found.changes(BaseTargets({**TARGETS, "m.r.weight": (3, COLUMNS)}))
    assert found.notes == ["1 of 3 changes have no effect: m.r.ia3_l (was the whole model trained?)"]


def test_fields_that_are_not_known_are_noted(tmp_path: Path) -> None:
    found = adapter(tmp_path, CASES["HRA"], tensors(CASES["HRA"]), lora_alpha=3, unheard_of=[1])
    assert "fields that are not known here and not used: lora_alpha, unheard_of" in found.notes[0]


@pytest.mark.parametrize(
    ("name", "config", "message"),
    [
        ("VeRA", {"save_projection": False, "projection_prng_key": 7}, "2 tensors are used by no module"),
        ("AdaLoRA", {"init_r": 1}, "has the rank 2, and training began with init_r 1"),
        ("AdaLoRA", {"lora_alpha": 0}, "PEFT then scales by ranks that are not stored"),
        ("AdaLoRA", {"lora_alpha": "3"}, "lora_alpha is '3', not a number"),
        ("LoHa", {"alpha": None}, "alpha is None"),
        ("LoKr", {"r": 0}, "r is 0"),
        ("OFT", {"block_share": 1}, "block_share is 1, not true or false"),
        ("OFT", {"block_share": True}, r"oft_R has the shape \[2, 1\], which makes no rotation of 4"),
        ("OFT", {"num_cayley_neumann_terms": -1}, "num_cayley_neumann_terms is -1, not a natural number"),
        ("HRA", {"r": 3}, r"hra_u has the shape \[4, 2\], not \[4, 3\]"),
    ],
)
def test_values_of_the_configuration_that_do_not_fit_are_named(
    name: str, config: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(AdapterError, match=message):
        adapter(tmp_path, CASES[name], tensors(CASES[name]), **config).changes(BaseTargets(TARGETS))


def test_a_module_of_which_no_rank_is_left_changes_nothing(tmp_path: Path) -> None:
    none = {"m.r.lora_A": np.zeros((0, COLUMNS)), "m.r.lora_B": np.zeros((3, 0)), "m.r.lora_E": np.zeros((0, 1))}
    values = tensors(CASES["AdaLoRA"]) | {name: value.astype(np.float32) for name, value in none.items()}
    found = adapter(tmp_path, CASES["AdaLoRA"], values)
    assert set(found.changes(BaseTargets({**TARGETS, "m.r.weight": (3, COLUMNS)}))) == {"m.q.weight"}


# -- kinds that hold new values ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("infix", ["", ".default"])
def test_layer_norms_are_replaced(infix: str, tmp_path: Path) -> None:
    values = {f"base_model.model.m.n.ln_tuning_layers{infix}.weight": np.arange(COLUMNS, dtype=np.float32)}
    change = Adapter(write(tmp_path, values, peft_type="LN_TUNING")).changes(BaseTargets(TARGETS))["m.n.weight"]
    assert change.replacement is not None
    assert np.array_equal(change.file.rows(change.replacement, ALL).ravel(), np.arange(COLUMNS))


@pytest.mark.parametrize("ids", [[7, 2], {"e": [7, 2]}])
def test_rows_of_trained_tokens_are_replaced(ids: object, tmp_path: Path) -> None:
    values = {"base_model.model.e.trainable_tokens_delta": np.ones((2, COLUMNS), np.float32)}
    stated = {"peft_type": "TRAINABLE_TOKENS", "token_indices": ids}
    change = Adapter(write(tmp_path, values, **stated)).changes(BaseTargets(TARGETS))["e.weight"]
    assert change.token_rows is not None
    read = change.token_rows.over(lambda rows, columns: np.zeros((10, COLUMNS), np.float32)[rows][:, columns])
    assert np.flatnonzero(read(ALL, ALL)[:, 0]).tolist() == [2, 7]


def test_a_token_beyond_the_vocabulary_is_named_with_its_field(tmp_path: Path) -> None:
    values = {"base_model.model.e.trainable_tokens_delta": np.ones((1, COLUMNS), np.float32)}
    stated = {"peft_type": "TRAINABLE_TOKENS", "token_indices": [10]}
    with pytest.raises(AdapterError, match=r"token_indices names 1 tokens up to 10, and the base has \[10, 4\]"):
        Adapter(write(tmp_path, values, **stated)).changes(BaseTargets(TARGETS))


# -- single experts ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("name", ["DoRA", "LoHa", "AdaLoRA", "OFT"])
def test_matrices_of_single_experts_are_changed_within_the_parameter_of_all(
    name: str, transposed: bool, tmp_path: Path
) -> None:
    case = CASES[name]
    own = {
        f"base_model.model.x.{number}.{role}": tensors(case)[key]
        for number in (0, 2)
        for role, key in ((role, f"base_model.model.m.q.{role}") for role in case.shapes)
    }
    parts = {f"x.{number}": ExpertPart("x.all", number, ROWS, ROWS, COLUMNS) for number in range(3)}
    shape = (3, COLUMNS, 2 * ROWS) if transposed else (3, 2 * ROWS, COLUMNS)
    base = BaseTargets({"x.all": shape}, transposed={"x.all"} if transposed else (), experts=parts)
    stored = _RANDOM.normal(size=shape).astype(np.float32)
    change = adapter(tmp_path, case, own).changes(base)["x.all"]
    assert change.transform is not None
    flat = stored.reshape(-1, shape[-1])
    read = change.transform.apply(
        lambda rows, columns: flat[rows][:, columns], lambda rows, columns: flat[rows][:, columns]
    )
    found = read(ALL, ALL).reshape(shape)
    order = _RANDOM.permutation(len(flat))[:7]
    some = np.array([2, 0, 1])
    assert np.array_equal(read(order, some), found.reshape(-1, shape[-1])[order][:, some])
    for number in range(3):
        matrix, merged_matrix = (each[number].T if transposed else each[number] for each in (stored, found))
        assert np.array_equal(matrix[:ROWS], merged_matrix[:ROWS])
        if number == 1:
            assert np.array_equal(matrix, merged_matrix)
            continue
        alone = adapter(
            tmp_path / str(number),
            case,
            {key.replace(f"x.{number}", "m.q"): value for key, value in own.items() if f"x.{number}." in key},
        )
        wanted = merged(alone, BaseTargets(TARGETS), "m.q.weight", np.ascontiguousarray(matrix[ROWS:]))
        assert np.allclose(merged_matrix[ROWS:], wanted, rtol=1e-6, atol=1e-6)
