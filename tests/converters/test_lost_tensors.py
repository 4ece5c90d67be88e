"""An adapter that lacks the tensors of a module that its configuration names is refused, of whatever kind it is."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors.torch import load_file, save_file

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.completeness import is_adapted, lost_modules
from edgetune_converters.errors import AdapterError
from tests.converters import peft_methods
from tests.converters.tiny import _between_libraries, peft, torch

WIDTH = 8
# class of the configuration -> its options
KINDS: dict[str, dict[str, Any]] = {
    "LoraConfig": {"r": 2, "bias": "all"},
    "AdaLoraConfig": {"init_r": 2, "target_r": 1, "total_step": 10},
    "IA3Config": {"feedforward_modules": []},
    "OFTConfig": {"r": 0, "oft_block_size": 4},
    "BOFTConfig": {"boft_block_size": 4},
    "LoHaConfig": {"r": 2},
    "LoKrConfig": {"r": 2},
    "HRAConfig": {"r": 2},
    "VeraConfig": {"r": 2},
    "MissConfig": {"r": 2},
    "RoadConfig": {"group_size": 4},
    "DeloraConfig": {"r": 2},
    "FourierFTConfig": {"n_frequency": 4},
    "LNTuningConfig": {},
}


class Block(torch.nn.Module):  # type: ignore[misc]
    def __init__(self) -> None:
        super().__init__()
        self.mix = torch.nn.ModuleDict({name: torch.nn.Linear(WIDTH, WIDTH) for name in ("q", "v")})
        self.up = torch.nn.Linear(WIDTH, WIDTH)
        self.norm = torch.nn.LayerNorm(WIDTH)
        self.last_norm = torch.nn.LayerNorm(WIDTH)


class Net(torch.nn.Module):  # type: ignore[misc]
    """Blocks and a head; the last block has a layer more."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([Block() for _ in range(layers)])
        self.layers[-1].extra = torch.nn.Linear(WIDTH, WIDTH)
        self.head = torch.nn.Linear(WIDTH, WIDTH)
        self.config = SimpleNamespace(model_type="none", to_dict=dict)


@st.composite
def _choices(draw: st.DrawFn, kind: str) -> dict[str, Any]:
    """Options that say which modules are adapted; one of them at least is."""
    names = ["norm", "last_norm"] if kind == "LNTuningConfig" else ["q", "v", "up", "extra", "head", "absent"]
    stated: Any = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
    as_pattern = draw(st.booleans())
    if as_pattern:
        stated = rf"(.*\.)?({'|'.join(stated)})"
    options: dict[str, Any] = {"target_modules": stated}
    known = {field.name for field in dataclasses.fields(getattr(peft, kind))}
    if "layers_to_transform" in known and not as_pattern and draw(st.booleans()):
        options["layers_to_transform"] = draw(st.lists(st.integers(0, 2), min_size=1, unique=True))
        if draw(st.booleans()):
            options["layers_pattern"] = "layers"
    if "exclude_modules" in known and draw(st.booleans()):
        options["exclude_modules"] = draw(st.sampled_from([["v"], ["layers.1.up"], r"layers\.0\..*"]))
    return options


@_between_libraries()
def _written(net: Any, kind: str, options: dict[str, Any], directory: Path) -> bool:
    """Write an adapter of PEFT; False if PEFT adapts nothing with these options."""
    try:
        wrapped = peft.get_peft_model(net, getattr(peft, kind)(**KINDS[kind], **options))
    except ValueError:
        return False
    peft_methods.randomize(wrapped)
    wrapped.save_pretrained(directory)
    return True


@pytest.mark.parametrize("kind", KINDS)
@settings(phases=(Phase.explicit, Phase.reuse, Phase.generate))
@given(data=st.data())
def test_the_tensors_of_one_module_cannot_be_lost(kind: str, data: st.DataObject) -> None:
    options = data.draw(_choices(kind))
    net = Net(3)
    base = BaseTargets({name: tuple(value.shape) for name, value in net.state_dict().items()})
    with tempfile.TemporaryDirectory() as written:
        directory = Path(written)
        if not _written(net, kind, options, directory):
            return
        assert Adapter(directory).changes(base)  # complete: nothing is missed
        file = directory / "adapter_model.safetensors"
        tensors = load_file(file)
        modules = {
            module
            for module in (name.removesuffix(".weight") for name in base.shapes if name.endswith(".weight"))
            if any(name.startswith(f"base_model.model.{module}.") for name in tensors)
            and is_adapted(json.loads((directory / "adapter_config.json").read_text()), module)
        }
        if len(modules) < 2:
            return
        lost = data.draw(st.sampled_from(sorted(modules)))
        kept = {
            name: value
            for name, value in tensors.items()
            if not name.startswith(f"base_model.model.{lost}.") or name == f"base_model.model.{lost}.bias"
        }
        if kind == "LNTuningConfig":
            kept.pop(f"base_model.model.{lost}.bias", None)
        assert len(kept) < len(tensors)
        save_file(kept, file)
        with pytest.raises(AdapterError, match=rf"{lost} is adapted by adapter_config.json \(target_modules\)"):
            Adapter(directory).changes(base)


NAMES = ["a.layers.0.q", "a.layers.1.q", "a.layers.10.mlp.experts.1.q", "layers.1.up", "h.2.v", "head", "q", "xq"]
FIELDS = {
    "target_modules": st.sampled_from(
        [["q"], ["q", "v", "head"], ["layers.1.q"], r".*\.(q|up)", "head", ["a.layers.1.q"]]
    ),
    "exclude_modules": st.sampled_from([None, [], ["q"], ["layers.0.q"], r".*\.1\..*"]),
    "layers_to_transform": st.sampled_from([None, [], 1, [0, 1], [2]]),
    "layers_pattern": st.sampled_from([None, [], "layers", ["h", "layers"]]),
    "modules_to_save": st.sampled_from([None, ["head"], ["up"]]),
}


@settings(max_examples=200)
@given(config=st.fixed_dictionaries(FIELDS), name=st.sampled_from(NAMES))
def test_the_rules_are_those_of_peft(config: dict[str, Any], name: str) -> None:
    stated = SimpleNamespace(**config, target_parameters=None)
    found = check_target_module_exists(stated, name)
    assert is_adapted(config, name) is (bool(found) and type(found).__name__ != "_ExcludedModule")


def test_nothing_is_concluded_where_the_rules_do_not_fit_what_is_there() -> None:
    shapes = {f"model.layers.{layer}.{name}.weight": (4, 4) for layer in range(3) for name in "qv"}
    one = ["model.layers.0.q", "model.layers.1.q"]
    for config in ({}, {"target_modules": None}, {"target_modules": r"wrapped\..*q"}, {"target_modules": "("}):
        assert lost_modules(config, one, BaseTargets(shapes)) == []
    assert lost_modules({"target_modules": ["q"]}, one, BaseTargets(shapes)) == ["model.layers.2.q"]
    every = BaseTargets(shapes)
    assert lost_modules({"target_modules": ["q", "v"]}, [*one, "model.layers.2.q"], every) == [
        f"model.layers.{layer}.v" for layer in range(3)
    ]


def test_modules_are_found_in_other_layers_where_the_base_has_other_names() -> None:
    shapes = {f"blk.{layer}.{name}.weight": (4, 4) for layer in range(3) for name in "qv"}
    base = BaseTargets(shapes, renamed=lambda name: name.replace("model.layers", "blk"))
    found = lost_modules({"target_modules": ["q"]}, ["model.layers.0.q", "model.layers.2.q"], base)
    assert found == ["model.layers.1.q"]


def test_experts_and_larger_parameters_may_be_absent() -> None:
    shapes: dict[str, tuple[int, ...]] = {
        f"layers.{n}.mlp.experts.{k}.up.weight": (4, 4) for n in range(2) for k in range(2)
    }
    shapes |= {"layers.0.up.weight": (4, 4), "layers.1.up.weight": (2, 4, 4)}
    assert lost_modules({"target_modules": ["up"]}, ["layers.0.up"], BaseTargets(shapes)) == []
