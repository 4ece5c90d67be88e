"""A base whose layers have no biases, with those that an adapter brings (BitFit)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.architectures import BoundTensor, Family, ModelConfig
from edgetune_converters.architectures.new_biases import why_no_bias, with_biases, with_switches
from edgetune_converters.errors import AdapterError
from edgetune_converters.reading.checkpoint import Checkpoint


@dataclass(frozen=True)
class NewBiases:
    """The family and the config of the base with the biases, and the modules that have got one."""

    own_family: Family
    family: Family
    config: ModelConfig
    modules: tuple[str, ...]

    def check(self, format_: str) -> None:
        """Raise AdapterError if an output of this format cannot hold the biases."""
        reasons = dict.fromkeys(
            reason for module in self.modules if (reason := why_no_bias(self.own_family, module, format_))
        )
        if reasons:
            raise AdapterError.of_many(
                f"biases of the adapter that {format_} cannot hold",
                [f"{format_}: {reason}, and the adapter has one" for reason in reasons],
                "Export another format (onnx holds any), or train again with adapter.added_to",
            )


def with_biases_of(
    adapter: Adapter,
    family: Family,
    config: ModelConfig,
    checkpoint: Checkpoint,
    bound: Sequence[BoundTensor],
    base: BaseTargets,
) -> NewBiases | None:
    """Return the base with the biases of layers that have none of their own; None where the adapter has no such.

    They become tensors of `checkpoint`.
    """
    stored = {piece.target: piece.source.name for item in bound for piece in item.pieces}
    modules = []
    for name, info in adapter.tensors(base).replacements.items():
        target = base.renamed(name)
        weight = stored.get(target.removesuffix("bias") + "weight")
        if not target.endswith(".bias") or target in base.shapes or weight is None:
            continue
        checkpoint.substitute(weight.removesuffix("weight") + "bias", adapter.file, info)
        modules.append(target.removesuffix(".bias"))
    if not modules:
        return None
    checkpoint.config = with_switches(family, checkpoint.config, modules)
    switched = ModelConfig(with_switches(family, config.raw, modules))
    return NewBiases(family, with_biases(family, modules), switched, tuple(modules))
