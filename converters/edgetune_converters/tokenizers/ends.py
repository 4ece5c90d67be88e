"""The tokens at which texts begin and end, for formats that carry the tokenizer's own files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from edgetune_converters.errors import TokenizerError
from edgetune_converters.tokenizers import end_of_turn as turns
from edgetune_converters.tokenizers import files as tokenizer_files
from edgetune_converters.tokenizers import special, templates


class SpecialTokenIds(NamedTuple):
    """The token that begins a text (None: none does), those at which generation stops, and the one that fills up."""

    bos: int | None
    stops: tuple[int, ...]
    pad: int | None


def special_token_ids(
    directory: Path, model_config: Mapping[str, Any], chat_template: str | None, rows: int
) -> SpecialTokenIds:
    """What a tokenizer directory says, for an embedding of `rows` rows. Errors: TokenizerError."""
    files = tokenizer_files.read_tokenizer_files(directory, model_config)
    found = {role: special.token_id(files, role, files.loaded.token_to_id) for role in ("bos", "eos", "pad")}
    for role, number in found.items():
        if number is not None and not 0 <= number < rows:
            raise TokenizerError(f"{role}_token_id is {number}, the embedding has {rows} rows")
    eos = found["eos"]
    if eos is None:
        raise TokenizerError(
            f"the tokenizer in {directory} names no end-of-sequence token: generation would never stop",
            'Set "eos_token" in tokenizer_config.json',
        )
    template = templates.metadata(files, chat_template).get("tokenizer.chat_template")
    stops = special.stop_ids(files, eos, rows, turns.end_of_turn(files, template))
    return SpecialTokenIds(found["bos"], tuple(stops), found["pad"])
