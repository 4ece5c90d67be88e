"""Batches without padding: the losses and gradients of rows that are computed one by one."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from edgetune.methods import Lora
from edgetune.methods.adaption_prompt import AdaptionPrompt
from edgetune.training import adapters
from edgetune.training.unpadding import RowPlaces, UnpaddedForward, take_padding_out

LENGTHS = (3, 9, 1, 6)
SHAPE = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
}  # fmt: skip
LLAMA = transformers.LlamaConfig(**SHAPE)
FAMILIES = {
    "llama": LLAMA,
    "qwen2": transformers.Qwen2Config(**SHAPE),
    "gpt2": transformers.GPT2Config(vocab_size=64, n_positions=64, n_embd=32, n_layer=2, n_head=4),
    "mistral": transformers.MistralConfig(**SHAPE, sliding_window=4),
    "gemma3": transformers.Gemma3TextConfig(**SHAPE, head_dim=8, sliding_window=16),
}


def model_of(config: Any, method: Any = None) -> Any:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    adapted = adapters.add_adapter(model, Lora(r=2) if method is None else method)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    return adapted


def batch(left: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(2)
    ids, mask = torch.zeros((2, len(LENGTHS), max(LENGTHS)), dtype=torch.int64)
    for row, length in enumerate(LENGTHS):
        places = slice(max(LENGTHS) - length, None) if left else slice(length)
        ids[row, places] = torch.randint(1, 64, (length,))
        mask[row, places] = 1
    return ids, mask


def gradients(model: Any, logits: torch.Tensor) -> Iterator[torch.Tensor]:
    torch.manual_seed(3)
    loss = (logits * torch.randn(logits.shape)).sum()
    yield from torch.autograd.grad(loss, [each for each in model.parameters() if each.requires_grad])


def row_by_row(model: Any, ids: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    rows = [
        model(input_ids=each[kept.bool()][None], use_cache=False).logits[0]
        for each, kept in zip(ids, mask, strict=True)
    ]
    return torch.cat(rows)


@pytest.mark.parametrize("left", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_have_the_logits_and_gradients_that_they_have_alone(family: str, left: bool) -> None:
    model = model_of(FAMILIES[family])
    ids, mask = batch(left)
    alone = row_by_row(model, ids, mask)
    expected = list(gradients(model, alone))
    assert take_padding_out(model, Lora())
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
    # sums over other shapes of matrix products: a few units in the last place of values around 1
    torch.testing.assert_close(logits, alone, rtol=1e-4, atol=1e-5)
    for found, wanted in zip(gradients(model, logits), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


def test_the_network_sees_no_padding_and_a_row_does_not_see_another() -> None:
    model = model_of(LLAMA)
    assert take_padding_out(model, Lora())
    seen: list[tuple[int, ...]] = []
    layer = model.get_base_model().model.layers[0].mlp
    layer.register_forward_hook(lambda _, given, __: seen.append(tuple(given[0].shape)))
    ids, mask = batch()
    before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert seen == [(1, sum(LENGTHS), SHAPE["hidden_size"])]
    ids[0, 0] = 1 + ids[0, 0] % 62
    after = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert torch.equal(before[1:], after[1:])
    assert not torch.equal(before[0], after[0])


def test_recomputed_activations_keep_the_rows_apart() -> None:
    model = model_of(LLAMA)
    assert take_padding_out(model, Lora())
    ids, mask = batch()
    found = []
    for checkpointing in (False, True):
        model.train()
        if checkpointing:
            model.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
            model.enable_input_require_grads()
        logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits[mask.bool()]
        found.append(list(gradients(model, logits)))
    assert all(torch.equal(*pair) for pair in zip(*found, strict=True))


def test_rows_longer_than_a_window_of_attention_are_computed_as_before() -> None:
    model = model_of(FAMILIES["mistral"])
    ids, mask = batch()
    before = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    assert take_padding_out(model, Lora())
    assert torch.equal(model(input_ids=ids, attention_mask=mask, use_cache=False).logits, before)


@pytest.mark.parametrize("options", [{"use_cache": True}, {"past_key_values": transformers.DynamicCache()}])
def test_generation_is_computed_as_before(options: dict[str, Any]) -> None:
    model = model_of(LLAMA)
    assert take_padding_out(model, Lora())
    network = model.get_base_model().model
    assert isinstance(network.forward, UnpaddedForward)
    ids, mask = batch(left=True)
    output = network(input_ids=ids, attention_mask=mask, **options)
    assert output.past_key_values.get_seq_length() == max(LENGTHS)


def test_hidden_states_have_the_places_of_the_batch() -> None:
    model = model_of(LLAMA)
    ids, mask = batch()
    before = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
    assert take_padding_out(model, Lora())
    after = model(input_ids=ids, attention_mask=mask, use_cache=False, output_hidden_states=True).hidden_states
    for one, other in zip(before, after, strict=True):
        torch.testing.assert_close(one[mask.bool()], other[mask.bool()], rtol=1e-4, atol=1e-5)


def test_models_that_mix_rows_keep_their_padding() -> None:
    eager = model_of(LLAMA)
    eager.get_base_model().config._attn_implementation = "eager"
    assert not take_padding_out(eager, Lora())
    mamba = transformers.MambaConfig(vocab_size=64, hidden_size=32, state_size=4, num_hidden_layers=2)
    recurrent = model_of(mamba, Lora(r=2, target_modules=["in_proj"]))
    assert not take_padding_out(recurrent, Lora())
    assert "forward" not in recurrent.get_base_model().base_model.__dict__
    assert not take_padding_out(model_of(LLAMA), AdaptionPrompt())


def test_a_network_that_ignores_the_places_of_rows_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(LLAMA)
    monkeypatch.setattr(RowPlaces, "marker", torch.ones((1, 1, 1, 1), dtype=torch.bool))
    assert not take_padding_out(model, Lora())


def test_the_trainer_of_a_run_computes_without_padding(base: Path, tmp_path: Path) -> None:
    from tests.training.objectives import encoded

    prepared = encoded.prepare(encoded.settings(base, tmp_path, {"kind": "sft"}, max_steps=2, eval_steps=1000))
    trainer = encoded.trainer_of(prepared, tmp_path / "checkpoints")
    network = trainer.model.get_base_model().base_model
    rows: list[int] = []
    network.layers[0].register_forward_hook(lambda _, given, __: rows.append(given[0].shape[0]))
    trainer.train()
    assert set(rows) == {1}
