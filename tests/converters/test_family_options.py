"""Each option on each family: agreement with transformers or a refusal, as docs/export.md lists them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from huggingface_hub.errors import StrictDataclassError

from edgetune_converters.architectures.families import FAMILIES
from edgetune_converters.errors import ArchitectureError
from tests.converters import family_models, family_options, runtime, tiny
from tests.export_requests import export

DOCS = Path(__file__).resolve().parents[2] / "docs" / "export.md"
_HEAD = "| Family | compared with | past the window | past the original context |"
KLD, SAME = 1e-5, 0.999


def _page() -> dict[str, list[str]]:
    """The rows of the page's table: family -> the other cells."""
    lines = DOCS.read_text("utf-8").splitlines()
    rows = lines[lines.index(_HEAD) + 2 :]
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in rows[: rows.index("")]]
    return {cells[0]: cells[1:] for cells in table}


def test_the_page_has_a_row_for_every_family() -> None:
    names = [family.name for family in FAMILIES]
    assert list(_page()) == names, f"docs/export.md, table {_HEAD}: one row for each of FAMILIES, in the same order"


def test_every_family_has_a_case_for_the_options() -> None:
    names = [family.name for family in FAMILIES]
    assert list(family_options.CASES) == names, "tests/converters/family_options.py: CASES has the order of FAMILIES"


@pytest.mark.parametrize("family", family_options.CASES)
def test_the_page_says_what_the_cases_go_past(family: str) -> None:
    """Windows and original contexts that are shorter than the text of one of the family's cases, or of an option."""
    cases = [name for name in family_models.CASES if _is_of(family, name)]
    windows = any(_past_the_window(name) for name in cases)
    scaled = {"yarn", "llama3", "longrope"} & {*_page()[family][0].split(", ")}
    contexts = bool(scaled) or any(_past_the_context(name) for name in cases)
    assert _page()[family][1:] == ["yes" if windows else "-", "yes" if contexts else "-"]


def _is_of(family: str, name: str) -> bool:
    """Cases are named after that of the options, with what is special behind."""
    first = family_options.CASES[family]
    stems = {
        "falcon-40b": "falcon",
        "command-r": "command-r(-plus)?$",
        "exaone4": "exaone4",
        "deepseek-v2": "deepseek-v2",
    }
    return re.match(stems.get(first, re.escape(first) + r"(-|$)"), name) is not None


def _past_the_window(name: str) -> bool:
    case = family_models.CASES[name]
    options = case.options.get("text_config", case.options)
    return (options.get("sliding_window") or case.positions) < case.positions


def _past_the_context(name: str) -> bool:
    case = family_models.CASES[name]
    rope = case.options.get("text_config", case.options).get("rope_parameters", {})
    original = rope.get("full_attention", rope).get("original_max_position_embeddings", case.positions)
    return bool(original < case.positions)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "option"), family_options.ABSENT)
def test_models_listed_as_absent_are_absent_in_transformers(family: str, option: str, tmp_path: Path) -> None:
    """A model that a newer transformers can build has to be compared."""
    assert (family, option) in set(family_options.tried())
    name = family_options.CASES[family]
    if option in family_options.ROPES:
        with pytest.raises((KeyError, StrictDataclassError), match="rope"):
            family_models.base(name, tmp_path / "base", **family_options.settings(family, option))
        return
    base = family_models.base(name, tmp_path / "base", **family_options.settings(family, option))
    assert not family_options.has_biases(base)


@pytest.mark.slow
@pytest.mark.parametrize(("family", "option"), list(family_options.tried()))
def test_an_option_is_exported_as_the_page_says(family: str, option: str, tmp_path: Path) -> None:
    name = family_options.CASES[family]
    if (family, option) in family_options.ABSENT:
        pytest.skip(f"transformers has no such model: {family_options.ABSENT[family, option]}")
    seed = family_options.SEEDS.get((family, option))
    base = family_models.base(name, tmp_path / "base", seed=seed, **family_options.settings(family, option))
    assert option != "biases" or family_options.has_biases(base)
    assert family_options.family_name(base) == family
    said = option in _page()[family][0].split(", ")
    try:
        export(base, {"f32": tmp_path / "f32.gguf"})
    except ArchitectureError as error:
        print(f"{family}, {option}: refused: {error.message.splitlines()[0]}")
        assert not said
        return
    found = runtime.logits(tmp_path / "f32.gguf", family_models.ids(name))
    kld, same = tiny.divergence(family_models.reference(name, base), found)
    print(f"{family}, {option}: {kld:.1e}, {same:.4f}")
    assert kld < KLD
    assert same >= SAME
    assert said


@pytest.mark.slow
def test_llama_4_past_its_chunk(tmp_path: Path) -> None:
    """Past 8192 tokens the layers with RoPE see only their chunk, and queries of the others grow with the position."""
    base = family_models.base("llama4", tmp_path / "base", num_attention_heads=2, num_key_value_heads=1, hidden_size=24)
    export(base, {"f32": tmp_path / "f32.gguf"})
    ids = tiny.random_ids(8192 + 128)
    reference = tiny.torch_logits(base, None, ids)[-256:]
    kld, same = tiny.divergence(reference, runtime.logits(tmp_path / "f32.gguf", ids)[-256:])
    print(f"{kld:.1e}, {same:.4f}")
    assert kld < KLD
    assert same >= SAME
