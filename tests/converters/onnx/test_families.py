"""Every family with a description: the graph's logits are transformers', with fused and with standard operators."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest

from edgetune_converters.architectures import FAMILIES
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.onnx.plan import OnnxSettings
from tests.converters import family_models, family_options, tiny
from tests.converters.onnx import session
from tests.export_requests import export

DOCS = Path(__file__).parents[3] / "docs/onnx.md"

# both are f32: what is left is the order of sums, about 1e-11 here
KLD = 1e-9

# sizes at which ONNX Runtime's attention does everything itself: heads of 32 of which 32 or 16 values are rotated
_WHOLE: dict[str, dict[str, Any]] = {
    "llama": {"head_dim": 32},
    "mistral": {"head_dim": 32, "sliding_window": 100},
    "qwen2": {"hidden_size": 96, "num_attention_heads": 6},
    "gemma2": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "gemma3": {"head_dim": 32, "query_pre_attn_scalar": 32},
    "glm4": {"hidden_size": 96, "num_attention_heads": 6, "head_dim": 32},
    "neox": {"hidden_size": 192, "num_attention_heads": 6, "num_key_value_heads": 6},
    "phi3": {"hidden_size": 96, "num_attention_heads": 6, "sliding_window": 100},
}
# sizes of which a group of families is as awkward as can be: heads of 12 or 24
_AWKWARD = (
    "llama", "qwen3", "gemma", "gemma3-untied", "phi3-long", "phi3-long-short-text", "phi2", "mixtral", "qwen2moe",
    "qwen3moe", "granitemoe", "smollm3", "stablelm", "stablelm-12b", "olmo2", "olmo3", "granite", "exaone4", "gpt2",
    "gpt2-narrow-untied", "neox-sequential", "starcoder2", "command-r", "command-r7b", "minicpm", "internlm2",
    "gemma3-seeing", "baichuan",
)  # fmt: skip
CASES = [*_WHOLE.items(), *((name, {}) for name in _AWKWARD)]
_SLOW = ("baichuan",)  # 32 layers
_PARAMETERS = [
    pytest.param(
        name, options, id=f"{name}{'-whole' * bool(options)}", marks=[pytest.mark.slow] if name in _SLOW else []
    )
    for name, options in CASES
]


@pytest.mark.parametrize(("name", "options"), _PARAMETERS)
def test_logits_are_those_of_transformers(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base", **options)
    ids = family_models.ids(name)
    wanted = family_models.reference(name, base)
    for portable in (False, True):
        folder = tmp_path / f"portable-{portable}"
        export(base, {}, onnx={"f32": folder}, onnx_settings=OnnxSettings(portable=portable))
        kld, same = tiny.divergence(wanted, session.logits(folder, ids))
        # a cache that grows, or moves along a window, must give the same
        split = session.logits(folder, ids, [len(ids) - 21, 9, *[1] * 12])
        later, _ = tiny.divergence(wanted[-21:], split[-21:])
        print(f"{name}: {kld:.1e}, {later:.1e} in steps, {same:.4f}")
        assert max(kld, later) < KLD
        assert same == 1
        domains = {entry.domain for entry in onnx.load(folder / "model.onnx", load_external_data=False).opset_import}
        assert domains == ({""} if portable else {"", "com.microsoft"})


_EVEN: dict[str, Any] = {"hidden_size": 96, "intermediate_size": 128, "initializer_range": 0.03}
_IN_BLOCKS = {
    "llama": _EVEN | {"head_dim": 32},
    "mixtral": _EVEN | {"head_dim": 32},
    "qwen2moe": _EVEN | {"num_attention_heads": 6, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64},
}


@pytest.mark.parametrize("name", _IN_BLOCKS)
@pytest.mark.parametrize("portable", [False, True])
def test_codes_are_read_as_they_were_written(name: str, portable: bool, tmp_path: Path) -> None:
    """8-bit codes of a small model lose little; a wrong row, scale or half of a byte would lose everything."""
    base = family_models.base(name, tmp_path / "base", **_IN_BLOCKS[name])
    made = {"int8": tmp_path / "int8", "int4": tmp_path / "int4"}
    receipts = export(base, {}, onnx=made, onnx_settings=OnnxSettings(32, portable=portable))
    ids = family_models.ids(name)
    wanted = family_models.reference(name, base)
    losses = [tiny.divergence(wanted, session.logits(folder, ids))[0] for folder in made.values()]
    print(name, losses)
    assert losses[0] < 2e-4
    assert losses[1] < 300 * losses[0]
    assert {kind for receipt in receipts for kind in receipt.types} >= {"int8/32", "int4/32"}


def test_a_family_without_a_description_is_refused_by_name(tmp_path: Path) -> None:
    base = family_models.base("bloom", tmp_path / "base")
    with pytest.raises(ArchitectureError, match="BLOOM cannot be written as ONNX") as error:
        export(base, {}, onnx={"f32": tmp_path / "f32"})
    assert "Llama, Mistral" in str(error.value.hint)
    assert not (tmp_path / "f32").exists()


def test_the_page_lists_every_family_with_a_graph() -> None:
    page = DOCS.read_text("utf-8").partition("\n## Families\n")[2].strip().partition("\n\n")[0]
    names = [family.name for family in FAMILIES if family.onnx]
    assert page.replace("\n", " ").removesuffix(".").split(", ") == names, "docs/onnx.md, section Families"


def test_every_family_with_a_graph_has_a_case() -> None:
    tested = {name for name, _ in CASES}
    stems = {family.name: family_options.CASES.get(family.name, family.name) for family in FAMILIES if family.onnx}
    missing = [
        family
        for family, stem in stems.items()
        if not any(name == stem or name.startswith(f"{stem}-") for name in tested)
    ]
    assert not missing, "add the family's case to _WHOLE or _AWKWARD of this file"
