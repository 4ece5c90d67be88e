"""Logits of batches are those of the rows one by one, in bounded memory, whatever the model does after its head."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from edgetune.reference.scored_rows import ScoredRows
from edgetune.training import environment
from edgetune.training.capture import forward
from tests.converters import tiny

NOISE = 2e-5
"""Logits of a few units, summed in f32 in another order: some 50 roundings of 1e-7 each, and as many in each layer."""


@pytest.fixture(scope="module")
def rows() -> ScoredRows:
    lengths = [31, 7, 64, 2, 40, 18]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    scored = [np.arange(start + max(1, size // 3), start + size) for start, size in zip(offsets, lengths, strict=False)]
    return ScoredRows(np.array(tiny.random_ids(int(offsets[-1]))), offsets, np.concatenate(scored))


def one_by_one(model: Any, rows: ScoredRows) -> np.ndarray[Any, Any]:
    found = []
    for ids, scored, _ in rows:
        logits = model(input_ids=torch.tensor(ids[None].astype(np.int64))).logits[0]
        found.append(logits[torch.from_numpy(scored) - 1].numpy())
    return np.concatenate(found)


def in_batches(model: Any, rows: ScoredRows, tokens: int, done: int = 0) -> np.ndarray[Any, Any]:
    return np.concatenate(
        [
            logits
            for batch in forward.make_batches(rows, tokens, done)
            for logits in forward.compute_logits(model, batch)
        ]
    )


CAPPED = {"final_logit_softcapping": 3.0, "query_pre_attn_scalar": 24, "sliding_window": 16}
SMALL = {"n_embd": 96, "n_layer": 2, "n_head": 4}
COMMON: dict[str, Any] = {**tiny._COMMON, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}), "qwen3": ("Qwen3Config", {}), "gemma2": ("Gemma2Config", CAPPED),
    "granite": ("GraniteConfig", {"logits_scaling": 7.0}), "gpt2": ("GPT2Config", SMALL),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_logits_of_batches_are_those_of_single_rows(kind: str, rows: ScoredRows) -> None:
    """A cap or a scale after the head is the model's own affair, and is done here too."""
    name, own = KINDS[kind]
    config = getattr(transformers, name)(**COMMON | own)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    with torch.inference_mode():
        wanted = one_by_one(model, rows)
        assert wanted.std() > 0.01
        for tokens in (1, 64, 1000):
            np.testing.assert_allclose(in_batches(model, rows, tokens), wanted, atol=NOISE, rtol=1e-4)


@pytest.fixture(scope="module")
def adapted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    import peft

    with environment.silence_libraries():
        base = tiny.base("llama", tmp_path_factory.mktemp("base"))
        adapter = tiny.adapter(base, tmp_path_factory.mktemp("adapter"))
        model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        return peft.PeftModel.from_pretrained(model, adapter).eval()


def test_an_adapter_takes_part_unless_disabled(adapted: Any, rows: ScoredRows) -> None:
    with torch.inference_mode():
        trained, wanted = in_batches(adapted, rows, 100), one_by_one(adapted, rows)
        np.testing.assert_allclose(trained, wanted, atol=NOISE, rtol=1e-4)
        with adapted.disable_adapter():
            base, plain = in_batches(adapted, rows, 100), one_by_one(adapted, rows)
    np.testing.assert_allclose(base, plain, atol=NOISE, rtol=1e-4)
    assert abs(base - trained).max() > 0.1


def test_no_more_logits_are_alive_than_a_block(adapted: Any, rows: ScoredRows, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forward, "BLOCK_BYTES", 3 * 4 * 523)
    with torch.inference_mode():
        blocks = [
            block for batch in forward.make_batches(rows, 100) for block in forward.compute_logits(adapted, batch)
        ]
        assert max(map(len, blocks)) == 3
        np.testing.assert_allclose(np.concatenate(blocks), one_by_one(adapted, rows), atol=NOISE, rtol=1e-4)


def test_batches_keep_the_order_and_the_limit(rows: ScoredRows) -> None:
    for tokens in (1, 50, 128, 10_000):
        found = list(forward.make_batches(rows, tokens))
        assert [len(ids) for batch in found for ids in batch.ids] == [31, 7, 64, 2, 40, 18]
        padded = [max(map(len, batch.ids)) * len(batch.ids) for batch in found]
        assert all(size <= tokens or len(batch.ids) == 1 for size, batch in zip(padded, found, strict=True))
        np.testing.assert_array_equal(np.concatenate([batch.targets for batch in found]), rows.targets)


def test_rows_that_are_done_are_left_out(rows: ScoredRows) -> None:
    second = next(where.stop for index, (_, _, where) in enumerate(rows) if index == 1)
    left = [len(ids) for batch in forward.make_batches(rows, 1, second) for ids in batch.ids]
    assert left == [64, 2, 40, 18]


def test_a_network_that_is_wrapped_stays_wrapped(adapted: Any, rows: ScoredRows) -> None:
    """accelerate puts its hooks where the stand-in goes for a while."""
    network = adapted.get_base_model().base_model
    before = network.forward
    hook = network.__dict__["forward"] = lambda *args, **kwargs: before(*args, **kwargs)
    try:
        with torch.inference_mode():
            in_batches(adapted, rows, 100)
        assert network.__dict__["forward"] is hook
    finally:
        del network.__dict__["forward"]
