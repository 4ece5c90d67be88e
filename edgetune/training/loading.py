"""Load the base, quantized or not, and its tokenizer, by the same code on a CUDA GPU and on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from edgetune import console
from edgetune.config import Config, QuantizationConfig
from edgetune.errors import ConfigError, DataError
from edgetune.planning.base_model import Base, base_loading_error
from edgetune.planning.memory import Arithmetic
from edgetune.planning.prepare import PreparedRun
from edgetune.training.adapters.tokens import add_rows
from edgetune.training.environment import emulates_bfloat16
from edgetune_converters.exporting import export
from edgetune_converters.files.atomic import temporary_directory
from edgetune_converters.request import ExportRequest, Target

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
STORED_TYPES = {"bf16": torch.bfloat16, "f16": torch.float16, "f32": torch.float32}
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def compute_dtype(config: Config) -> torch.dtype:
    """Return the type of matrix products: that of the configuration, or float32 where the CPU emulates bfloat16.

    Raises ConfigError if the device cannot train in it.
    """
    name = config.quantization.compute_dtype
    if name == "float16" and not torch.cuda.is_available():
        raise ConfigError("quantization.compute_dtype: float16 needs a CUDA GPU", "Use bfloat16, or float32")
    return torch.float32 if name == "bfloat16" and emulates_bfloat16() else DTYPES[name]


def arithmetic(config: Config) -> Arithmetic:
    """Return how this device stores and computes numbers in a training.

    Raises ConfigError if the device cannot train in the compute type.
    """
    products = compute_dtype(config)
    on_gpu = torch.cuda.is_available()
    stored = products if on_gpu else torch.float32
    return Arithmetic(stored.itemsize, products.itemsize, on_gpu)


def load_model(base: Base, config: Config, scratch: Path | None = None) -> Any:
    """Load the base as a transformers model, with linear layers in the bits of `quantization.bits`.

    The layers that are not quantized (embedding, head, norms) are in the compute type on a GPU, where memory is short,
    and in float32 on the CPU. The weights of a GGUF, GPTQ or AWQ base are first written to a temporary directory beside
    `scratch`, which it requires, in the type in which they are loaded.
    """
    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    products = compute_dtype(config)
    dtype = products if on_gpu else torch.float32
    try:
        with _weights_directory(base, dtype, scratch) as directory:
            model, info = AutoModelForCausalLM.from_pretrained(
                directory,
                dtype=dtype,
                quantization_config=_bitsandbytes(config.quantization, products),
                device_map={"": 0 if on_gpu else "cpu"},
                use_safetensors=True,
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **_config_without_quantization(base, config),
            )
    except (ValueError, KeyError, AssertionError) as error:
        raise base_loading_error(base.name, error) from None
    if base.checkpoint.is_packed:
        _check_all_loaded(base, info)
        model.name_or_path = str(base.path)  # which PEFT stores in the adapter
    _keep_weights_as_quantized(model)
    _keep_results_whole(model)
    if base.added_tokens:
        add_rows(model, base.own_directory, base.directory, base.added_tokens)
    return model


@contextmanager
def _weights_directory(base: Base, dtype: torch.dtype, scratch: Path | None) -> Iterator[Path]:
    """Yield the directory of the base; of packed weights or a GGUF file, one that is deleted after loading."""
    if not base.checkpoint.is_packed:
        yield base.path
        return
    assert scratch is not None
    type_ = next(name for name, each in STORED_TYPES.items() if each == dtype)
    with temporary_directory(scratch) as folder:
        with console.byte_progress("dequantize the base") as progress:
            export(ExportRequest(base.path, (Target("safetensors", type_, folder),)), progress=progress)
        yield folder


def _check_all_loaded(base: Base, info: Any) -> None:
    """Raise DataError unless transformers' model has the very tensors of the base."""
    found = {kind: sorted(str(name) for name in info[kind]) for kind in ("missing_keys", "unexpected_keys")}
    for kind, names in found.items():
        if names:
            what = "lacks" if kind == "missing_keys" else "has, and transformers' model has not,"
            raise DataError(
                f"the quantized base {base.name} {what} {len(names)} tensors, such as {names[0]}",
                "Give the unquantized model that it was made from",
            )


def load_empty_model(base: Base, config: Config) -> Any:
    """Build the modules of the base without weights, for checks of names and shapes before the slow loading."""
    options = {"trust_remote_code": config.trust_remote_code}
    try:
        with torch.device("meta"):
            stated = _config_without_quantization(base, config, empty=True).get("config")
            stated = stated or AutoConfig.from_pretrained(base.directory, **options)
            return AutoModelForCausalLM.from_config(stated, **options)
    except (ValueError, KeyError, AssertionError) as error:
        raise base_loading_error(base.name, error) from None


def _config_without_quantization(base: Base, config: Config, *, empty: bool = False) -> dict[str, Any]:
    """Return `config` for transformers where config.json declares a quantization that the weights do not have.

    An `empty` model is also built of the config of packed weights, which are loaded dequantized.

    transformers would take them for quantized and put 16-bit weights into 4-bit layers as they are.
    """
    if not (base.checkpoint.has_outdated_quantization or (empty and base.checkpoint.is_packed)):
        return {}
    stated = AutoConfig.from_pretrained(base.directory, trust_remote_code=config.trust_remote_code)
    if hasattr(stated, "quantization_config"):
        del stated.quantization_config
    return {"config": stated}


def _bitsandbytes(config: QuantizationConfig, products: torch.dtype) -> BitsAndBytesConfig | None:
    if config.bits == 16:
        return None
    if config.bits == 8:
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=config.type,
        bnb_4bit_use_double_quant=config.double_quant,
        bnb_4bit_compute_dtype=products,
    )


def four_bit_layers(model: Any) -> list[Any]:
    """List the 4-bit layers of bitsandbytes in a model, also those inside adapters."""
    from bitsandbytes.nn import Linear4bit

    return [module for module in model.modules() if isinstance(module, Linear4bit)]


def _keep_results_whole(model: Any) -> None:
    """Let 8-bit layers return no views: PEFT adds to results in place (GraLoRA, C3A), which autograd forbids."""
    from bitsandbytes.nn import Linear8bitLt

    def copied(_: Any, __: Any, result: torch.Tensor) -> torch.Tensor:
        return result.clone() if result._is_view() else result

    for module in model.modules():
        if isinstance(module, Linear8bitLt):
            module.register_forward_hook(copied)


def _keep_weights_as_quantized(model: Any) -> None:
    """Keep bitsandbytes from repacking weights.

    On CPUs with AVX512-BF16, bitsandbytes 0.50 repacks weights in the first evaluation and rounds the block scales to
    bfloat16: the model would change during training, and differ from the exported one.
    """
    for layer in four_bit_layers(model):
        layer.support_avx512bf16_for_cpu = False


def load_tokenizer(prepared: PreparedRun) -> Any:
    """Return the base's tokenizer.json, its named special tokens and the chosen pad token for transformers."""
    named = {name: text for name, text in prepared.tokenizer.named.items() if name in _NAMED_TOKENS}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=prepared.tokenizer.backend, **named)
    tokenizer.pad_token_id = prepared.pad_id
    return tokenizer
