"""How the first lines of a training name the method."""

from __future__ import annotations

import pytest

from edgetune.methods.ia3 import Ia3
from edgetune.methods.lora import Lora


@pytest.mark.parametrize(
    ("method", "title"),
    [
        (Lora(), "LoRA"),
        (Lora(use_dora=True), "LoRA (DoRA)"),
        (Lora(use_rslora=True, loraplus_lr_ratio=16, init="pissa"), "LoRA (rsLoRA, LoRA+, init pissa)"),
        (Ia3(), "IA3"),
    ],
)
def test_a_method_is_named_with_its_variant(method: Lora | Ia3, title: str) -> None:
    assert method.title == title
