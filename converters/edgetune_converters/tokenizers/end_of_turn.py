"""Find the token that ends an assistant's turn by rendering the chat template."""

from __future__ import annotations

from edgetune_converters.errors import ChatTemplateError
from edgetune_converters.tokenizers.chat_files import special_tokens
from edgetune_converters.tokenizers.files import TokenizerFiles

_ANSWER = "4e1f83"  # hexadecimal, so that no template changes it
_CONVERSATION = [{"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}]


def end_of_turn(files: TokenizerFiles, template: str | None) -> int | None:
    """Return the id of the special token right after an assistant's answer, None without one.

    A template that cannot be rendered becomes a note of the conversion.
    """
    if template is None:
        return None
    from edgetune_converters import chat_template  # Jinja takes as long to load as all modules of this package

    try:
        text = chat_template.render(template, _CONVERSATION, special_tokens(files.config, files.special))
    except ChatTemplateError as error:
        files.notes.append(
            f"the chat template does not render a question and its answer ({error.message}): the token that ends an "
            "assistant's turn is not known from it"
        )
        return None
    _, answered, after = text.partition(_ANSWER)
    if not answered or not after:
        return None
    first = files.encode([after.lstrip()])[0][:1]
    special = first and (files.added.get(first[0], {}).get("special") or first[0] in files.beyond)
    return first[0] if special else None
