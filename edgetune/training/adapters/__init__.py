"""PEFT adapters: a module for each family of methods, a row in the table FAMILIES, and what all of them share.

To add a family: add its name to `AdapterConfig.kind`, its options to that section, a module here, and a row in
`families.py`.
"""

from edgetune.training.adapters.attach import (
    add_adapter,
    cast_trainable_to_float32,
    check_lora_places,
    count_trainable,
    is_adapter_zero,
    linear_layer_names,
    load_adapter,
)

__all__ = [
    "add_adapter",
    "cast_trainable_to_float32",
    "check_lora_places",
    "count_trainable",
    "is_adapter_zero",
    "linear_layer_names",
    "load_adapter",
]
