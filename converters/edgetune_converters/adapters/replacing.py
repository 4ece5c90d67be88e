"""Kinds that hold new values of tensors of the base: layer norms (LN tuning), and rows of an embedding."""

from __future__ import annotations

from collections.abc import Iterator

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.state_dict import RoleNames


def _no_tensors(module: AdaptedModule) -> Iterator[Fold]:
    yield from ()


LN_TUNING = Kind(RoleNames("LN tuning", replacing=("ln_tuning_layers",)), _no_tensors)
TRAINABLE_TOKENS = Kind(RoleNames("trainable tokens"), _no_tensors, fields=frozenset({"token_indices", "init_weights"}))
