"""AdaLoRA: B @ diag(E) @ A, whose rank each module has of its own.

The scale is alpha over the rank at the beginning of training, whatever ranks remain: PEFT, tuners/adalora/layer.py.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.matching import MERGE_FIRST, Kind
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.errors import AdapterError
from edgetune_converters.tensors import F32


def _fold(module: AdaptedModule) -> Iterator[Fold]:
    rank = module.shape("lora_A")[0]
    most = module.config.integer("init_r", 12)
    if rank > most:
        raise Misfit(f"{module.name} has the rank {rank}, and training began with init_r {most}")
    a = module.tensor("lora_A", (rank, module.columns))
    e = module.tensor("lora_E", (rank, 1))
    b = module.tensor("lora_B", (module.rows, rank))
    scale = module.config.number("lora_alpha", 8) / (most + 1e-5)

    def factors() -> tuple[F32, F32]:
        return b() * np.float32(scale), a() * e()

    if rank:
        yield Fold(factors=factors)


def _check(config: PeftConfig) -> None:
    if config.number("lora_alpha", 8) <= 0:
        raise AdapterError(
            f"{config.path}: lora_alpha is {config.raw['lora_alpha']}: PEFT then scales by ranks that are not stored",
            MERGE_FIRST,
        )


ADALORA = Kind(
    RoleNames("AdaLoRA", ("lora_A", "lora_B", "lora_E"), may_be_empty=True),
    _fold,
    fields=frozenset(
        {
            *("r", "lora_alpha", "init_r", "target_r", "rank_pattern", "lora_dropout", "bias", "init_lora_weights"),
            *("tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"),
            *("loftq_config", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size"),
        }
    ),
    refused={"use_dora": "DoRA (use_dora)", "layer_replication": "layer replication (layer_replication)"},
    check=_check,
)
