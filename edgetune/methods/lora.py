"""LoRA and its variants: rsLoRA, LoRA+, DoRA, and starts from the base or the data (arXiv:2106.09685)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from edgetune.methods.base import (
    Count,
    Dropout,
    Facts,
    LayerMethod,
    Layers,
    Positive,
    Surroundings,
    of_pattern,
)

INITS = ("default", "gaussian", "orthogonal", "pissa", "olora", "corda", "lora_ga", "eva", "loftq")
_PISSA_ITERATIONS = re.compile(r"pissa_niter_[1-9]\d*")
_MOVES_BASE = ("pissa", "olora", "corda", "lora_ga")
_NEEDS_ROWS = ("corda", "eva", "lora_ga")


class Lora(LayerMethod):
    """LoRA: low-rank matrices beside the linear layers of the base (arXiv:2106.09685)."""

    facts: ClassVar[Facts] = Facts("LoRA", "arXiv:2106.09685", "reparametrized", "LORA")
    peft_names: ClassVar[Mapping[str, str]] = {"alpha": "lora_alpha", "dropout": "lora_dropout"}
    not_for_peft: ClassVar[frozenset[str]] = LayerMethod.not_for_peft | {
        *("init", "loraplus_lr_ratio", "calibration_rows", "bias"),
    }
    options_of_biases: ClassVar[tuple[str, ...]] = ("bias",)

    kind: Literal["lora"] = "lora"
    """The PEFT method."""
    r: Count = 16
    """Rank of the update."""
    alpha: Positive = 32
    """The update is scaled by alpha / r, or alpha / sqrt(r) with `use_rslora`."""
    dropout: Dropout = 0.0
    """Dropout before the first low-rank matrix during training."""
    use_rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps high ranks stable (arXiv:2312.03732)."""
    use_dora: bool = False
    """DoRA: also train the magnitude of each row of the changed weights (arXiv:2402.09353)."""
    init: str = "default"
    """First values of the low-rank matrices: `default` and `gaussian` (A random, B zero); `orthogonal`; `pissa`,
    `pissa_niter_N` (the principal part of the base, arXiv:2404.02948) and `olora` (its QR factors, arXiv:2406.01775);
    from training rows `corda` (by the covariance of activations, arXiv:2406.05223), `eva` (their principal directions,
    arXiv:2410.07170) and `lora_ga` (those of the gradients, arXiv:2407.05000); `loftq` (the rounding error of a 4-bit
    base, arXiv:2310.08659)."""
    calibration_rows: Count = 256
    """Training rows whose activations `corda` and `eva` look at, or whose gradients `lora_ga` does."""
    loraplus_lr_ratio: Annotated[float, Field(gt=0)] | None = None
    """LoRA+: learning rate of B over that of A, such as 16 (arXiv:2402.12354). Default: both have the same."""
    bias: Literal["none", "all", "adapted"] = "none"
    """Also train the biases of all layers, or of the adapted ones, where the base has biases."""
    rank_pattern: dict[str, Count] = {}
    """Ranks by the end of the layer's name, or by a regular expression."""
    alpha_pattern: dict[str, Positive] = {}
    """Alphas in the same way."""

    @field_validator("init")
    @classmethod
    def _init_is_known(cls, init: str) -> str:
        if init not in INITS and not _PISSA_ITERATIONS.fullmatch(init):
            raise ValueError(f"choose from {', '.join(INITS)}, pissa_niter_N")
        return init

    def contradictions(self) -> Iterator[str]:
        """Yield what contradicts one another among the options, each a sentence."""
        # run.json states defaults too, so that a stated default is no contradiction
        is_default = self.calibration_rows == type(self).model_fields["calibration_rows"].default
        if not is_default and not self.needs_rows:
            yield f"adapter.calibration_rows is used by adapter.init: {', '.join(_NEEDS_ROWS)}, and init is {self.init}"
        if self.init == "orthogonal" and any(rank % 2 for rank in (self.r, *self.rank_pattern.values())):
            yield "adapter.init: orthogonal needs even ranks; give adapter.r and adapter.rank_pattern even numbers"
        if self.moves_base and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            yield (
                f"adapter.init: {self.init} with adapter.use_rslora and ranks or alphas by pattern cannot be "
                "converted to LoRA on the base as it is; leave out use_rslora or the patterns"
            )
        if self.init == "loftq" and self.use_dora:
            yield "adapter.init: loftq sets LoRA matrices alone; leave out adapter.use_dora"

    @property
    def title(self) -> str:
        """The name of the method with its options."""
        start = {} if self.init == "default" else {f"init {self.init}": True}
        named = {"DoRA": self.use_dora, "rsLoRA": self.use_rslora, "LoRA+": self.loraplus_lr_ratio is not None, **start}
        chosen = ", ".join(name for name, is_used in named.items() if is_used)
        return f"{self.facts.title} ({chosen})" if chosen else self.facts.title

    @property
    def needs_rows(self) -> bool:
        """Whether the first values are computed from training rows."""
        return self.init in _NEEDS_ROWS

    def why_not_on(self, rows: int, columns: int) -> str | None:
        """Return why a linear layer of [rows, columns] cannot be adapted; None if it can."""
        rank, smaller = max((self.r, *self.rank_pattern.values())), min(rows, columns)
        if self.init == "lora_ga" and 2 * rank > smaller:
            return f"adapter.init: lora_ga takes {2 * rank} directions for a rank of {rank}, and it has {smaller}"
        return super().why_not_on(rows, columns)

    @property
    def moves_base(self) -> bool:
        """Whether the first values are taken out of the weights of the base, so that the adapter is converted."""
        return self.init.startswith(_MOVES_BASE)

    def conflicts(self, surroundings: Surroundings) -> Iterator[str]:
        """Yield what contradicts the rest of the configuration."""
        yield from super().conflicts(surroundings)
        bits = surroundings.bits
        if self.use_dora and bits == 8:
            yield (
                "adapter.use_dora cannot be trained with quantization.bits: 8, as PEFT cannot dequantize the weights "
                "for their norms; set quantization.bits: 4 or 16"
            )
        if self.moves_base and bits != 16:
            yield (
                f"adapter.init: {self.init} moves the base, and quantization.bits: {bits} would round the rest once "
                "more; set quantization.bits: 16"
            )
        if self.init == "loftq" and (bits != 4 or surroundings.merge_base != "nf4"):
            yield (
                "adapter.init: loftq corrects the rounding of a 4-bit base, into which it has to be merged; set "
                "quantization.bits: 4 and export.merge_base: nf4"
            )

    def why_not_as(self, format_: str) -> str | None:
        """Return why a trained model cannot be exported in a format; None if it can."""
        if format_ == "gguf-lora" and self.init == "loftq":
            return "adapter.init: loftq is an adapter of the 4-bit base, which no GGUF file holds"
        if format_ == "gguf-lora" and self.bias != "none":
            return "adapter.bias trains biases, which gguf-lora cannot hold"
        return super().why_not_as(format_)

    @property
    def no_low_rank(self) -> str | None:
        """Why the change is no pair of low-rank matrices; None if it is."""
        return "the magnitudes of DoRA scale the base too" if self.use_dora else None

    def peft_options(self) -> dict[str, Any]:
        """Return the options under PEFT's names."""
        init = {"default": True, "eva": True, "loftq": True}.get(self.init, self.init)
        bias = "lora_only" if self.bias == "adapted" else self.bias
        return super().peft_options() | {"init_lora_weights": init, "bias": bias}

    @property
    def reads_base(self) -> bool:
        """Whether the first values are computed from the weights of the base."""
        return self.init not in ("default", "gaussian", "orthogonal", "eva")

    def count_trainable(self, layers: Layers) -> int:
        """Return the parameters of A and B, and with DoRA the magnitudes, of each layer."""
        pairs = sum(of_pattern(self.rank_pattern, name, self.r) * sum(shape) for name, shape in layers.items())
        return pairs + (sum(rows for rows, _ in layers.values()) if self.use_dora else 0)
