"""The fold of each kind of PEFT's adapters, for random shapes, ranks, patterns and dtypes, against PEFT's own merge."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from safetensors.torch import load_file, save_file

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.products import product
from edgetune_converters.tensors import ALL, F32, Read, RowIndex
from tests.converters import peft_methods
from tests.converters.tiny import _between_libraries, peft, torch

# relative to the largest weight of a matrix: f32 has a relative rounding of 6e-8, and a rotation sums over a row
ROUNDING = 2e-6
Options = Callable[[st.DataObject, int], dict[str, Any]]


def _rank(data: st.DataObject, most: int = 7) -> int:
    return data.draw(st.integers(1, most))


def _divisor(data: st.DataObject, number: int) -> int:
    return data.draw(st.sampled_from([size for size in range(2, number + 1) if number % size == 0]))


def _patterns(data: st.DataObject) -> dict[str, Any]:
    """Patterns in the order of their names: PEFT saves them so, and the first that matches counts."""
    ranks, alphas = st.integers(1, 6), st.sampled_from([-3, 1, 4, 9])
    names = st.sampled_from(["(a|b)", "a", "b", "inner.a"])
    return {
        "rank_pattern": dict(sorted(data.draw(st.dictionaries(names, ranks, max_size=2)).items())),
        "alpha_pattern": dict(sorted(data.draw(st.dictionaries(names, alphas, max_size=2)).items())),
    }


def _block_sizes(data: st.DataObject, width: int) -> dict[str, Any]:
    size = _divisor(data, width)
    return {"r": 0, "oft_block_size": size} if data.draw(st.booleans()) else {"r": width // size, "oft_block_size": 0}


# class of the configuration -> its options, for layers with so many inputs
KINDS: dict[str, tuple[str, Options]] = {
    "lora": ("LoraConfig", lambda data, width: {"r": _rank(data), "lora_alpha": 5, **_patterns(data)}),
    "dora": (
        "LoraConfig",
        lambda data, width: {
            "r": _rank(data), "lora_alpha": 5, "use_dora": True, "use_rslora": data.draw(st.booleans()),
            **_patterns(data),
        },
    ),
    "adalora": (
        "AdaLoraConfig",
        lambda data, width: {"init_r": _rank(data), "lora_alpha": data.draw(st.integers(1, 9)), "total_step": 10},
    ),
    "loha": ("LoHaConfig", lambda data, width: {"r": _rank(data), "alpha": 5, **_patterns(data)}),
    "lokr": (
        "LoKrConfig",
        lambda data, width: {
            "r": _rank(data), "alpha": 5, "decompose_both": data.draw(st.booleans()),
            "decompose_factor": data.draw(st.sampled_from([-1, 2, 3, 4, 16])), **_patterns(data),
        },
    ),
    "ia3": (
        "IA3Config",
        lambda data, width: {"feedforward_modules": data.draw(st.sampled_from([[], ["a"], ["a", "b"]]))},
    ),
    "vera": (
        "VeraConfig",
        lambda data, width: {
            "r": _rank(data), "projection_prng_key": data.draw(st.integers(0, 2**40)),
            "save_projection": data.draw(st.booleans()),
        },
    ),
    "oft": (
        "OFTConfig",
        lambda data, width: {
            **_block_sizes(data, width), "use_cayley_neumann": data.draw(st.booleans()),
            "num_cayley_neumann_terms": data.draw(st.integers(1, 7)), "coft": data.draw(st.booleans()),
            "eps": data.draw(st.floats(0.01, 1)), "block_share": data.draw(st.booleans()),
        },
    ),
    "boft": ("BOFTConfig", lambda data, width: {"boft_block_size": _divisor(data, width)}),
    # Gram-Schmidt divides by what the vectors before leave over: near nothing for many vectors of few numbers, and PEFT
    # divides in f32; with a third of the numbers its rounding stays below 3e-7 of a unit vector
    "hra": ("HRAConfig", lambda data, width: {"r": min(_rank(data), width // 3), "apply_GS": data.draw(st.booleans())}),
}  # fmt: skip


class Net(torch.nn.Module):  # type: ignore[misc]
    """Two linear layers with as many inputs; one has a bias."""

    def __init__(self, width: int, outputs: tuple[int, int]) -> None:
        super().__init__()
        self.inner = torch.nn.Module()
        self.inner.a = torch.nn.Linear(width, outputs[0], bias=True)
        self.inner.b = torch.nn.Linear(width, outputs[1], bias=False)

    def forward(self, x: Any) -> Any:
        return self.inner.a(x), self.inner.b(x)


@_between_libraries()
def trained(net: Any, kind: str, stated: dict[str, Any], directory: Path, dtype: Any) -> dict[str, NDArray[Any]]:
    """Write an adapter with random values of a dtype, and return the tensors that PEFT merges."""
    wrapped = peft.get_peft_model(net, getattr(peft, kind)(target_modules=["a", "b"], **stated))
    peft_methods.randomize(wrapped)
    with torch.no_grad():
        saved = stated.get("save_projection")
        shared = [value for name, value in wrapped.named_buffers() if saved and "vera_" in name]
        for value in [*shared, *(each for each in wrapped.parameters() if each.requires_grad)]:
            value.copy_(value.to(dtype).float())
    wrapped.save_pretrained(directory)
    file = directory / "adapter_model.safetensors"
    save_file({name: value.to(dtype) for name, value in load_file(file).items()}, file)
    return {name: value.numpy().copy() for name, value in wrapped.merge_and_unload().state_dict().items()}


def merged(change: Change | None, base: NDArray[Any]) -> Read:
    """A reader of the merged values of a tensor, and of the base where there is no change."""
    matrix = base if base.ndim > 1 else base[:, None]

    def stored(rows: RowIndex, columns: RowIndex) -> F32:
        return matrix[rows][:, columns]

    if change is None:
        return stored
    if change.transform is not None:
        return change.transform.apply(stored, stored)
    assert change.factors is not None
    left, right = change.factors()
    return lambda rows, columns: stored(rows, columns) + product(left, right, rows, columns)


@pytest.mark.parametrize("name", KINDS)
@settings(phases=(Phase.explicit, Phase.reuse, Phase.generate))  # an example takes a second: shrinking takes hours
@given(data=st.data())
def test_any_rows_and_columns_are_those_of_pefts_merge(name: str, data: st.DataObject) -> None:
    width = data.draw(st.sampled_from([4, 6, 12, 18, 30, 64]), "inputs")
    outputs = data.draw(st.tuples(st.integers(1, 40), st.integers(1, 40)), "outputs")
    kind, options = KINDS[name]
    stated = options(data, width)
    dtype = getattr(torch, data.draw(st.sampled_from(["float32", "bfloat16", "float16"]), "dtype"))
    torch.manual_seed(data.draw(st.integers(0, 3)))
    net = Net(width, outputs)
    before = {name: value.numpy().copy() for name, value in net.state_dict().items()}
    with tempfile.TemporaryDirectory() as written:
        directory = Path(written)
        wanted = trained(net, kind, stated, directory, dtype)
        adapter = Adapter(directory)
        changes = adapter.changes(BaseTargets({key: value.shape for key, value in before.items()}))
        for key, values in wanted.items():
            read = merged(changes.get(key), before[key])
            expected = values if values.ndim > 1 else values[:, None]
            tolerance = ROUNDING * np.abs(expected).max()
            for rows, columns in _parts(data, *expected.shape):
                found = read(rows, columns)
                assert found.shape == expected[rows][:, columns].shape
                assert np.abs(found - expected[rows][:, columns]).max(initial=0) <= tolerance, (key, rows, columns)


def _parts(data: st.DataObject, rows: int, columns: int) -> Iterator[tuple[RowIndex, RowIndex]]:
    """The whole matrix, a block of rows, and numbers of rows and columns in any order."""
    yield ALL, ALL
    first = data.draw(st.integers(0, rows - 1))
    yield slice(first, data.draw(st.integers(first + 1, rows))), ALL
    some = st.lists(st.integers(0, rows - 1), min_size=1, max_size=5)
    others = st.lists(st.integers(0, columns - 1), min_size=1, max_size=5)
    yield np.array(data.draw(some)), np.array(data.draw(others))
    yield ALL, slice(0, data.draw(st.integers(1, columns)))
