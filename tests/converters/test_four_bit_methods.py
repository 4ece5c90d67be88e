"""Methods of PEFT on a base in 4 bits: merged into what training had, and, for DoRA, with its row norms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune_converters.merging.merge_base import merge_base_named
from edgetune_converters.model import open_model
from tests.converters import family_models, peft_methods, tiny
from tests.converters.peft_methods import METHODS
from tests.converters.test_merge_base import ODD, load
from tests.converters.tiny import _between_libraries, peft, torch

pytest.importorskip("bitsandbytes")

from edgetune.training import bnb_record

# HRA and LoHa work on unpacked weights alone
ON_FOUR_BITS = ("dora", "adalora", "ia3", "vera", "oft", "boft")


@_between_libraries()
def _train(base: Path, directory: Path, name: str, ids: list[int]) -> tuple[Any, Any]:
    """Write an adapter on the base in 4 bits; return the record of its weights and the logits of PEFT's forward."""
    model = load(base, "float32")
    record = bnb_record.record_quantized_weights(model)
    method = METHODS[name]
    stated = {"task_type": "CAUSAL_LM", "target_modules": "all-linear", **method.options}
    wrapped = peft.get_peft_model(model, getattr(peft, method.config)(**stated)).eval()
    peft_methods.randomize(wrapped)
    wrapped.save_pretrained(directory)
    with torch.no_grad():
        return record, wrapped(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("name", ON_FOUR_BITS)
def test_merged_into_the_rounded_base_it_is_the_trained_model(name: str, tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base", **ODD)
    ids = tiny.random_ids(64)
    record, wanted = _train(base, tmp_path / "adapter", name, ids)
    folded = peft_methods.folded(base, tmp_path / "adapter", "nf4", record)
    kld, same = tiny.divergence(wanted, peft_methods.logits(base, folded, ids))
    assert (kld < 1e-8, same) == (True, 1.0)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_rows_of_the_original_base_get_the_norms_of_the_rounded_one(family: str, tmp_path: Path) -> None:
    """W' = m / |D + B A| (W + B A), where D is the base in 4 bits: merged into D it is m / |D + B A| (D + B A)."""
    base = tmp_path / "base"
    if family == "llama":
        tiny.base("llama", base, **ODD)
    else:
        family_models.base("gpt2", base)
    record, _ = _train(base, tmp_path / "adapter", "dora", tiny.random_ids(8))
    adapter = tmp_path / "adapter"
    original, rounded = (peft_methods.folded(base, adapter, name, record) for name in ("original", "nf4"))
    stored, read_as_rounded = (peft_methods.folded(base, None, name, record) for name in ("original", "nf4"))
    seen = 0
    for key, values in original.items():
        weight, dequantized = stored[key], read_as_rounded[key]
        if torch.equal(weight, dequantized):
            continue
        # the scale of a row follows from both: (m / n) (W - D) is what the two merged matrices differ in
        outputs = 1 if family == "gpt2" else 0
        difference, base_difference = values - rounded[key], weight - dequantized
        scale = difference.abs().sum(1 - outputs) / base_difference.abs().sum(1 - outputs)
        wanted = base_difference * scale.unsqueeze(1 - outputs)
        assert float((difference.abs() - wanted.abs()).abs().max()) < 1e-5, key
        norms = np.linalg.norm(rounded[key].numpy(), axis=1 - outputs)
        assert np.allclose(norms, np.abs(_magnitudes(adapter, key)), rtol=1e-5), "the norms of the trained rows are m"
        seen += 1
    assert seen > 5


def _magnitudes(adapter: Path, key: str) -> Any:
    tensors = peft.utils.save_and_load.load_peft_weights(str(adapter), device="cpu")
    return tensors[f"base_model.model.{key.removesuffix('.weight')}.lora_magnitude_vector"].numpy()


def test_the_merge_into_the_original_base_is_noted_where_norms_are_those_of_the_rounded_one(tmp_path: Path) -> None:
    base = tiny.base("llama", tmp_path / "base", **ODD)
    record, _ = _train(base, tmp_path / "adapter", "dora", tiny.random_ids(8))
    notes = open_model(base, tmp_path / "adapter", merge_base_named("original", record)).notes
    assert any("--merge-base nf4 is exactly the trained model" in note for note in notes)
    assert not open_model(base, tmp_path / "adapter", merge_base_named("original")).notes
