"""A tiny random model with a chat template, and GGUF files and ONNX folders of it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from safetensors.numpy import load_file, save_file

from edgetune_converters.onnx.plan import OnnxSettings
from tests.converters import tiny
from tests.export_requests import export

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
WORDS = "dim the bedroom lights, 把卧室的灯调暗 and say 👍🏽"


def base(directory: Path, name: str = "qwen2", **options: object) -> Path:
    """A Hugging Face directory; every tensor can be stored in q8_0 or q4_0."""
    tiny.base(name, directory, **options)  # type: ignore[arg-type]
    (directory / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    return directory


def endless(directory: Path) -> Path:
    """A base that never stops by itself: its stop tokens have logit 0, and some other token always has more."""
    base(directory)
    file = directory / "model.safetensors"
    tensors = load_file(file)
    tensors["model.embed_tokens.weight"][500:503] = 0
    save_file(tensors, file, {"format": "pt"})
    return directory


def gguf(base_directory: Path, path: Path, type_: str = "f32") -> Path:
    """The model as one GGUF file."""
    for receipt in export(base_directory, {type_: path}, allow_fallback=True, threads=1):
        receipt.write()
    return path


def onnx(base_directory: Path, path: Path, type_: str = "f32", **settings: Any) -> Path:
    """The model as an ONNX folder."""
    for receipt in export(base_directory, {}, onnx={type_: path}, onnx_settings=OnnxSettings(**settings), threads=1):
        receipt.write()
    return path
