"""Padding-free batches: the network computes the tokens of all rows of a batch as one row, and attention row by row.

The collators of all trainers pad. Here the network takes the tokens out of a padded batch, and puts its hidden states
back into the places of the batch. Only attention, which must not mix rows, gets them padded: behind the tokens of a
row, where a causal model does not look, so that it needs no mask.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from edgetune.methods.base import Method

_SDPA = "sdpa"
_WINDOWS = ("sliding_window", "attention_chunk_size")
"""Fields of config.json with the length from which on attention is not that of all tokens before."""
_IGNORED = {
    "use_cache",
    "return_dict",
    "output_hidden_states",
    "output_attentions",
    "output_router_logits",
    "num_items_in_batch",
}
"""Arguments of a network that concern all rows alike."""
TOLERANCE = 1e-3
"""Largest difference of hidden states with and without padding, relative to their largest value, in float32. Rounding
stays far below it, and a network that mixes rows far above."""


class RowPlaces:
    """The places of the tokens of a padded batch."""

    def __init__(self, mask: torch.Tensor) -> None:
        """Find them in an attention mask [rows, columns], whose rows are padded on either side."""
        attended = mask.bool()
        lengths = attended.sum(1)
        self.shape = tuple(mask.shape)
        self.longest = int(lengths.max())
        self.tokens = attended.flatten().nonzero().flatten()
        """Where each token is in the batch, int64 [tokens]."""
        self.positions = (attended.cumsum(1) - 1).flatten()[self.tokens][None]
        """Its position in its row, int64 [1, tokens]."""
        rows = torch.arange(len(lengths), device=mask.device)
        self._aligned = rows.repeat_interleave(lengths) * self.longest + self.positions[0]

    @property
    def marker(self) -> torch.Tensor:
        """A mask with four axes, which transformers hands to attention as it is, and from which that reads this."""
        marker = torch.zeros((1, 1, 1, 1), dtype=torch.bool, device=self.tokens.device)
        marker.row_places = self  # type: ignore[attr-defined]
        return marker

    def take(self, values: torch.Tensor) -> torch.Tensor:
        """Return the tokens [1, tokens, ...] of values [rows, columns, ...]."""
        return values.flatten(0, 1).index_select(0, self.tokens)[None]

    def put(self, values: torch.Tensor) -> torch.Tensor:
        """Return values [rows, columns, ...] of tokens [1, tokens, ...], with zeros as padding."""
        rows, columns = self.shape
        return _scatter(values[0], self.tokens, rows * columns).view(rows, columns, *values.shape[2:])

    def align(self, heads: torch.Tensor) -> torch.Tensor:
        """Return heads [rows, heads, longest, size] of [1, heads, tokens, size], each row from its first token on."""
        rows = self.shape[0]
        padded = _scatter(heads[0].transpose(0, 1), self._aligned, rows * self.longest)
        return padded.view(rows, self.longest, *padded.shape[1:]).transpose(1, 2)

    def join(self, aligned: torch.Tensor) -> torch.Tensor:
        """Return [1, tokens, heads, size] of [rows, longest, heads, size]."""
        return aligned.flatten(0, 1).index_select(0, self._aligned)[None]


def _scatter(values: torch.Tensor, places: torch.Tensor, count: int) -> torch.Tensor:
    return values.new_zeros((count, *values.shape[1:])).index_copy(0, places, values)


def _attend(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute attention as transformers does, of a batch without padding row by row."""
    places = getattr(attention_mask, "row_places", None)
    if places is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, *args, **kwargs)
    aligned = (places.align(each) for each in (query, key, value))
    output, weights = sdpa_attention_forward(module, *aligned, None, *args, **kwargs)
    return places.join(output), weights


class UnpaddedForward:
    """The forward of a network that takes the padding out of its batches."""

    def __init__(self, forward: Callable[..., Any], window: int | None) -> None:
        self._forward = forward
        self._window = window

    def __call__(
        self, input_ids: Any = None, attention_mask: Any = None, *args: Any, inputs_embeds: Any = None, **options: Any
    ) -> Any:
        """Compute hidden states [rows, columns, width] of a padded batch."""
        given = {"input_ids": input_ids, "inputs_embeds": inputs_embeds}
        given = {name: value for name, value in given.items() if value is not None}
        places = self._places(attention_mask, options) if len(given) == 1 and not args else None
        if places is None:
            return self._forward(*args, attention_mask=attention_mask, **given, **options)
        taken = {name: places.take(value) for name, value in given.items()}
        known = {name: value for name, value in options.items() if name in _IGNORED}
        output = self._forward(**taken, attention_mask=places.marker, position_ids=places.positions, **known)
        output["last_hidden_state"] = places.put(output["last_hidden_state"])
        if output.get("hidden_states") is not None:
            output["hidden_states"] = tuple(map(places.put, output["hidden_states"]))
        return output

    def _places(self, mask: Any, options: Mapping[str, Any]) -> RowPlaces | None:
        """Return the places of the tokens; None for a batch that is computed as it is."""
        others = [name for name, value in options.items() if name not in _IGNORED and value is not None]
        if mask is None or mask.ndim != 2 or others or options.get("use_cache") or options.get("output_router_logits"):
            return None
        if bool(mask.all()) or not bool(mask.any(1).all()):
            return None
        places = RowPlaces(mask)
        return None if self._window is not None and places.longest > self._window else places


def take_padding_out(model: Any, method: Method) -> bool:
    """Let a model compute batches without padding, and return whether it does.

    It does if the network attends by SDPA, and computes the same hidden states without padding: this is tried.
    """
    causal = model.get_base_model()
    network = causal.base_model
    config = causal.config.get_text_config()
    if network is causal or getattr(config, "_attn_implementation", None) != _SDPA or not method.is_per_token:
        return False
    if getattr(config, "output_router_logits", False):  # the loss of the routers needs the mask of the batch
        return False
    ALL_ATTENTION_FUNCTIONS.register(_SDPA, _attend)
    before = network.__dict__.get("forward")
    forward = network.forward
    windows = [getattr(config, name, None) for name in _WINDOWS]
    network.forward = UnpaddedForward(forward, min(filter(None, windows), default=None))
    if _computes_the_same(network, forward, config.vocab_size):
        return True
    if before is None:
        del network.forward
    else:
        network.forward = before
    return False


@torch.no_grad()
def _computes_the_same(network: Any, forward: Callable[..., Any], vocabulary: int) -> bool:
    """Whether the network computes what it does with padding, of rows that would show a mixture."""
    device = next(network.parameters()).device
    mask = torch.tensor([[1] * 3 + [0] * 4, [1] * 7, [1] * 5 + [0] * 2], device=device)
    ids = (torch.arange(mask.numel(), device=device) * 7919 % vocabulary).view(mask.shape)
    training = network.training
    network.eval()
    try:
        with torch.random.fork_rng(devices=[]):
            plain, packed = (
                each(input_ids=ids, attention_mask=mask, use_cache=False).last_hidden_state
                for each in (forward, network.forward)
            )
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    finally:
        network.train(training)
    difference = (plain - packed)[mask.bool()].float().abs().max()
    allowed = TOLERANCE * max(1, torch.finfo(plain.dtype).eps / torch.finfo(torch.float32).eps)
    return bool(difference <= allowed * plain.float().abs().max())
