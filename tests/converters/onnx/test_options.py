"""Each option on each family that has a description: agreement with transformers, or a refusal, never another model."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgetune_converters.architectures import FAMILIES
from edgetune_converters.errors import ArchitectureError
from edgetune_converters.onnx.plan import OnnxSettings
from tests.converters import family_models, family_options, tiny
from tests.converters.onnx import session
from tests.export_requests import export

KLD = 1e-9
DESCRIBED = {family.name for family in FAMILIES if family.onnx}
TRIED = [(family, option) for family, option in family_options.tried() if family in DESCRIBED]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "option"), TRIED)
def test_an_option_is_carried_or_refused(family: str, option: str, tmp_path: Path) -> None:
    name = family_options.CASES[family]
    if (family, option) in family_options.ABSENT:
        pytest.skip(f"transformers has no such model: {family_options.ABSENT[family, option]}")
    base = family_models.base(name, tmp_path / "base", **family_options.settings(family, option))
    ids = family_models.ids(name)
    wanted = family_models.reference(name, base)
    for portable in (False, True):
        folder = tmp_path / f"portable-{portable}"
        try:
            export(base, {}, onnx={"f32": folder}, onnx_settings=OnnxSettings(portable=portable))
        except ArchitectureError as error:
            print(f"{family}, {option}: refused: {error.message.splitlines()[0]}")
            return
        kld, _ = tiny.divergence(wanted, session.logits(folder, ids))
        print(f"{family}, {option}: {kld:.1e}")
        assert kld < KLD


def test_a_position_that_is_no_rotation_is_refused(tmp_path: Path) -> None:
    """Baichuan's 13 B is told from its 7 B by its layers alone."""
    base = family_models.base("baichuan", tmp_path / "base", num_hidden_layers=40)
    with pytest.raises(ArchitectureError, match="only the 7 B of Baichuan"):
        export(base, {}, onnx={"f32": tmp_path / "f32"})
