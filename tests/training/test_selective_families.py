"""Methods that train tensors of the base itself, on every family: the exported file answers as the changed model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from edgetune.config import parse_config
from edgetune.errors import ConfigError
from edgetune.methods import BitFit, Freeze, Full, LlamaPro, Method
from edgetune.planning.base_model import find_base
from edgetune.training import adapters
from tests.converters import family_models, runtime, tiny
from tests.export_requests import export

KLD = 1e-5
METHODS: dict[str, Method] = {
    "bitfit": BitFit(),
    "freeze": Freeze(layers=1, modules="all", also=["norm"]),
    "llama-pro": LlamaPro(new_blocks=1),
    "full": Full(),
}
WITHOUT_CLASS = {name for name, case in family_models.CASES.items() if case.after is not None}
"""Cases that transformers loads as another family, or not at all."""
# what the export could not hold, and why it is said before training
REFUSED: dict[tuple[str, str], str] = {
    **{(name, "bitfit"): "llama.cpp reads no bias of" for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3")},
    **{(name, "llama-pro"): "by their numbers" for name in ("deepseek-v2-lite", "deepseek-v2", "deepseek-v3")},
    **{(name, "llama-pro"): "by their numbers" for name in ("llama4", "llama4-seeing")},
    ("exaone4-32b", "llama-pro"): "only the 64 of the 32 B",
}


def _changed(base: Path, method: Method, formats: list[str]) -> Any:
    config = parse_config({"base": str(base), "data": {"train": "rows.jsonl"}, "quantization": {"bits": 16}})
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    model = adapters.add_adapter(model, method, find_base(config).layers, formats)
    torch.manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.03)
    return model.eval()


@pytest.mark.slow
@pytest.mark.parametrize("kind", METHODS)
@pytest.mark.parametrize("name", [name for name in family_models.CASES if name not in WITHOUT_CLASS])
def test_the_exported_file_answers_as_the_changed_model(name: str, kind: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    refusal = REFUSED.get((name, kind))
    if refusal is not None:
        with pytest.raises(ConfigError, match=refusal):
            _changed(base, METHODS[kind], ["gguf"])
        return
    model = _changed(base, METHODS[kind], ["gguf"])
    model.save_pretrained(tmp_path / "adapter")
    export(base, {"f32": tmp_path / "f32.gguf"}, adapter=tmp_path / "adapter")
    ids = family_models.ids(name)
    with torch.no_grad():
        trained = model(torch.tensor([ids])).logits[0].float().numpy()
        with model.disable_adapter():
            before = model(torch.tensor([ids])).logits[0].float().numpy()
    assert tiny.divergence(trained, before)[0] > 1e-4, "the change must matter"
    kld, _ = tiny.divergence(trained, runtime.logits(tmp_path / "f32.gguf", ids))
    print(f"{name} {kind}: {kld:.1e}")
    assert kld < KLD
