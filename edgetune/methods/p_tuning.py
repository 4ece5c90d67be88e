"""P-tuning: virtual tokens made by a small network (arXiv:2103.10385)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from edgetune.methods.base import Facts
from edgetune.methods.virtual_tokens import NO_LORA, VirtualTokenMethod


class PTuning(VirtualTokenMethod):
    """P-tuning: vectors before every text that an MLP or an LSTM makes during training (arXiv:2103.10385)."""

    facts: ClassVar[Facts] = Facts("P-tuning", "arXiv:2103.10385", "additive", "P_TUNING", not_as=NO_LORA)
    used_with: ClassVar[Mapping[str, tuple[str, Any]]] = {
        "encoder_layers": ("encoder", "lstm"),
        "encoder_dropout": ("encoder", "lstm"),
    }

    kind: Literal["p-tuning"] = "p-tuning"
    """The PEFT method."""
    encoder: Literal["mlp", "lstm"] = "mlp"
    """Network that makes the vectors: three linear layers, or a bidirectional LSTM and two linear layers."""
    encoder_hidden_size: Annotated[int, Field(ge=1)] = 128
    """Width of the network."""
    encoder_layers: Annotated[int, Field(ge=1)] = 2
    """Layers of the LSTM."""
    encoder_dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout between the layers of the LSTM."""

    def unused_options(self) -> Iterator[str]:
        """Yield the options that have no effect beside the others."""
        yield from super().unused_options()
        if self.encoder == "lstm" and self.encoder_dropout and self.encoder_layers == 1:
            yield (
                f"adapter.encoder_dropout is {self.encoder_dropout:g}, and it acts between layers, of which "
                "adapter.encoder_layers: 1 leaves one; set 2 or more, or leave out adapter.encoder_dropout"
            )

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        own = {"encoder_num_layers": self.encoder_layers, "encoder_dropout": self.encoder_dropout}
        return {
            **super().peft_options(),
            "encoder_reparameterization_type": self.encoder.upper(),
            "encoder_hidden_size": self.encoder_hidden_size,
            **(own if self.encoder == "lstm" else {}),
        }
