"""The token that ends an assistant's turn, found by rendering the chat template."""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_converters.gguf.values import Value
from edgetune_converters.tokenizers.files import TokenizerFiles

_ANSWER = "4e1f83"  # hexadecimal, so that no template changes it
_TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]
_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")


def end_of_turn(files: TokenizerFiles, template: Value | None) -> int | None:
    """The special token right after an assistant's answer; None without one, or when the template cannot be asked."""
    if template is None:
        return None
    from jinja2.sandbox import ImmutableSandboxedEnvironment  # takes as long to load as all tokenizers modules together

    try:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
        )
        text = environment.from_string(str(template.data)).render(
            messages=_TALK, add_generation_prompt=False, **_named(files.config)
        )
    except Exception:  # noqa: BLE001 - a template may fail in any way; it is judged where it is used
        return None
    _, answered, after = text.partition(_ANSWER)
    if not answered or not after:
        return None
    first = files.encode([after.lstrip()])[0][:1]
    return first[0] if first and files.added.get(first[0], {}).get("special") else None


def _named(config: Mapping[str, object]) -> dict[str, str]:
    found = {name: config.get(name) for name in _NAMES}
    texts = {name: value.get("content") if isinstance(value, dict) else value for name, value in found.items()}
    return {name: text for name, text in texts.items() if isinstance(text, str)}
