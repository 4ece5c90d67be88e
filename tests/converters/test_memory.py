"""The memory of an export does not grow with the model: whole processes, on bases whose weights are holes in a file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import save_file

from tests.converters import vocabularies

HIDDEN, FEED_FORWARD, HEADS, ROWS = 1024, 4096, 16, 600
_LINEAR = {
    **dict.fromkeys(("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"), (HIDDEN, HIDDEN)),
    **dict.fromkeys(("mlp.gate_proj", "mlp.up_proj"), (FEED_FORWARD, HIDDEN)),
    "mlp.down_proj": (HIDDEN, FEED_FORWARD),
}
_EXPORT = """
import sys
from pathlib import Path
from edgetune_converters import ExportRequest, Target, export
base, adapter, out = map(Path, sys.argv[1:])
targets = (
    Target("gguf", "q4_k_m", out / "a.gguf"), Target("gguf", "q8_0", out / "b.gguf"),
    Target("safetensors", "bf16", out / "m"), Target("gguf-lora", "f16", out / "l.gguf"),
)
export(ExportRequest(base, targets, adapter=adapter, threads=2))
"""


def _base(directory: Path, layers: int) -> Path:
    """A Llama model whose weights are all zero and take no room on the disk."""
    vocabularies.byte_level(directory)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    for layer in range(layers):
        name = f"model.layers.{layer}."
        norms = (f"{name}input_layernorm.weight", f"{name}post_attention_layernorm.weight")
        shapes |= dict.fromkeys(norms, (HIDDEN,))
        shapes |= {f"{name}{module}.weight": shape for module, shape in _LINEAR.items()}
    header, position = {}, 0
    for name, shape in shapes.items():
        offsets = [position, position + 2 * math.prod(shape)]
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": offsets}
        position = offsets[1]
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + position)
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": HIDDEN, "vocab_size": ROWS,
        "intermediate_size": FEED_FORWARD, "num_hidden_layers": layers, "num_attention_heads": HEADS,
        "num_key_value_heads": HEADS, "rms_norm_eps": 1e-5, "max_position_embeddings": 512, "hidden_act": "silu",
        "tie_word_embeddings": True,
    }  # fmt: skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def _adapter(directory: Path, layers: int) -> Path:
    directory.mkdir()
    tensors: dict[str, NDArray[np.float32]] = {}
    for layer in range(layers):
        for module, (rows, columns) in _LINEAR.items():
            name = f"base_model.model.model.layers.{layer}.{module}.lora"
            tensors |= {f"{name}_A.weight": np.ones((2, columns), np.float32)}
            tensors |= {f"{name}_B.weight": np.full((rows, 2), 0.01, np.float32)}
    save_file(tensors, directory / "adapter_model.safetensors")
    modules = sorted({module.split(".")[1] for module in _LINEAR})
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def _peak(*arguments: str) -> float:
    """Megabytes of a process at its largest."""
    child = subprocess.Popen([sys.executable, "-c", *arguments])
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    assert status == 0
    return usage.ru_maxrss / 1024


@pytest.mark.slow
def test_four_times_the_weights_take_no_more_memory(tmp_path: Path) -> None:
    """Four outputs of one pass; a layer more is 34 MB of weights, of which nothing but its adapter is kept."""
    imported = _peak("import edgetune_converters.exporting")
    peaks = []
    for layers in (4, 16):
        folder = tmp_path / str(layers)
        arguments = _base(folder / "base", layers), _adapter(folder / "adapter", layers), folder / "out"
        peaks.append(_peak(_EXPORT, *map(str, arguments)))
    print(f"{imported:.0f} MB after the imports, {peaks[0]:.0f} and {peaks[1]:.0f} MB")
    assert max(peaks) < imported + 400
    assert peaks[1] - peaks[0] < 40
