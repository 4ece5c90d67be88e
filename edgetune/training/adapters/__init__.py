"""The methods of `edgetune.methods` on a model: attach a new adapter, load a trained one, count what is trained."""

from edgetune.training.adapters.attach import (
    add_adapter,
    cast_trainable_to_float32,
    check_gguf_head,
    check_head,
    check_lora_places,
    check_saved_modules,
    count_trainable,
    fingerprint_trainable,
    has_adapted_head,
    lay_out_in_order,
    load_adapter,
    sort_stored_names,
)
from edgetune.training.adapters.learning_rates import set_optimizer
from edgetune.training.adapters.linear_layers import has_rounded_layers, linear_layer_names
from edgetune.training.adapters.ranks import RankCallback
from edgetune.training.adapters.starts import Start, StartSources, convert_stored, start_of

__all__ = [
    "RankCallback",
    "Start",
    "StartSources",
    "add_adapter",
    "cast_trainable_to_float32",
    "check_gguf_head",
    "check_head",
    "check_lora_places",
    "check_saved_modules",
    "convert_stored",
    "count_trainable",
    "fingerprint_trainable",
    "has_adapted_head",
    "has_rounded_layers",
    "lay_out_in_order",
    "linear_layer_names",
    "load_adapter",
    "set_optimizer",
    "sort_stored_names",
    "start_of",
]
