"""IA3: trained factors of the inputs of a layer (feed-forward modules), or of its outputs, bias included.

Source: PEFT, tuners/ia3/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold
from edgetune_converters.adapters.change import scaled
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.state_dict import RoleNames


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    """The shape tells what is scaled: [1, inputs] or [outputs, 1]."""
    factors = module.tensor("ia3_l", (1, module.columns), (module.rows, 1))
    of_inputs = module.shape("ia3_l") == (1, module.columns)

    def changes_nothing() -> bool:
        return bool((factors() == 1).all())

    yield Fold(scaled(factors, of_columns=of_inputs), changes_nothing=changes_nothing)
    if module.has_bias and not of_inputs:
        yield Fold(scaled(factors, of_columns=False), part="bias", changes_nothing=changes_nothing)


IA3 = Kind(RoleNames("IA3", ("ia3_l",)), _fold, fields=frozenset({"feedforward_modules", "init_ia3_weights"}))
