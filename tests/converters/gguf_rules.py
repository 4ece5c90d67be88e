"""Rules for GGUF files, from the specification and from an auditor of such files, checked with gguf-py's reader."""

from __future__ import annotations

import re
import struct
import unicodedata
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType

LONGEST_STRING = 8192
_KEY = re.compile(r"[a-z0-9_]+([-.][a-z0-9_]+)+|[a-z0-9_-]+(\.[a-z0-9_-]+)+")
_STANDARD = ("general.", "tokenizer.", "quantize.", "split.", "adapter.", "edgetune.")
_ADDRESS = re.compile(r"https?://|\b\d{1,3}(\.\d{1,3}){3}\b")
_USERS_OWN = re.compile(r"tokenizer\.chat_template(\..*)?|tokenizer\.chat_templates")
_JOINERS = "\u200c\u200d"
_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Zl", "Zp")
# pure file types -> the type of most of their matrices
_PURE = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 7: "Q8_0", 8: "Q5_0", 9: "Q5_1", 32: "BF16"}
# standard keys -> their types, by the specification and llama.cpp
_TYPES = {
    **dict.fromkeys(("general.architecture", "general.name", "general.type", "general.size_label"), "STRING"),
    **dict.fromkeys(("tokenizer.ggml.model", "tokenizer.ggml.pre", "tokenizer.chat_template"), "STRING"),
    **dict.fromkeys(("general.alignment", "general.file_type", "general.quantization_version"), "UINT32"),
    **dict.fromkeys(("tokenizer.ggml.tokens", "tokenizer.ggml.merges"), "STRING[]"),
    "tokenizer.ggml.scores": "FLOAT32[]",
    "tokenizer.ggml.token_type": "INT32[]",
    **dict.fromkeys((f"split.{part}" for part in ("no", "count")), "UINT16"),
    "split.tensors.count": "INT32",
}


def problems(path: Path) -> list[str]:
    """Return every violation in a GGUF file, [] for a clean one."""
    reader = GGUFReader(path)
    values = {key: field for key, field in reader.fields.items() if not key.startswith("GGUF.")}
    contents: dict[str, Any] = {key: field.contents() for key, field in values.items()}
    found = [*_duplicates(path), *_keys(contents), *_types(values), *_strings(contents)]
    if contents.get("general.type") == "model" and contents.get("split.count", 1) == 1:
        found += [*_sizes(contents, reader), *_vocabulary(contents, reader)]
    return [*found, *_tensors(contents, reader)]


def _duplicates(path: Path) -> Iterator[str]:
    """The keys are counted in the bytes: readers keep one of two equal ones."""
    raw = path.read_bytes()
    count = struct.unpack_from("<Q", raw, 16)[0]
    stated = len([key for key in GGUFReader(path).fields if not key.startswith("GGUF.")])
    if count != stated:
        yield f"the header has {count} keys, of which {stated} are different"


def _keys(contents: dict[str, Any]) -> Iterator[str]:
    prefixes = (*_STANDARD, f"{contents.get('general.architecture')}.")
    for key in contents:
        if not key.isascii() or not _KEY.fullmatch(key) or len(key) > 64:
            yield f"{key!r} is not a key in lower case, with dots between its parts"
        if not key.startswith(prefixes):
            yield f"{key} is in no known namespace"
    if "general.architecture" not in contents and not contents.get("split.no"):  # the first part has it
        yield "general.architecture is missing"


def _types(values: dict[str, Any]) -> Iterator[str]:
    for key, field in values.items():
        is_array = field.types[0] == GGUFValueType.ARRAY
        stated = field.types[-1].name + ("[]" if is_array else "")
        wanted = _TYPES.get(key) or ("UINT32" if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key) else None)
        wanted = wanted or ("BOOL" if re.fullmatch(r"tokenizer\.ggml\.add_\w+", key) else None)
        if wanted and stated != wanted:
            yield f"{key} is {stated}, not {wanted}"


def _strings(contents: dict[str, Any]) -> Iterator[str]:
    """Free text that hides something, is very long, or names an address; templates and tokens are the user's own."""
    for key, value in contents.items():
        if not isinstance(value, str) or _USERS_OWN.fullmatch(key):
            continue
        hidden = {each for each in value if each not in _JOINERS and unicodedata.category(each) in _HIDDEN}
        if hidden:
            yield f"{key} holds {', '.join(f'U+{ord(each):04X}' for each in sorted(hidden))}"
        if len(value) > LONGEST_STRING:
            yield f"{key} has {len(value)} characters"
        if _ADDRESS.search(value) and "url" not in key and not key.startswith("edgetune."):
            yield f"{key} names an address: {value[:80]}"


def _sizes(contents: dict[str, Any], reader: Any) -> Iterator[str]:
    arch = contents["general.architecture"]
    shapes = {tensor.name: [int(length) for length in tensor.shape] for tensor in reader.tensors}
    layers = {int(match[1]) for name in shapes if (match := re.match(r"blk\.(\d+)\.", name))}
    if layers != set(range(contents[f"{arch}.block_count"])):
        yield f"block_count is {contents[f'{arch}.block_count']}, the layers are {sorted(layers)}"
    if contents[f"{arch}.embedding_length"] != shapes["token_embd.weight"][0]:
        yield f"embedding_length is {contents[f'{arch}.embedding_length']}, token_embd {shapes['token_embd.weight']}"
    heads, shared = (contents.get(f"{arch}.attention.{name}") for name in ("head_count", "head_count_kv"))
    if isinstance(heads, int) and isinstance(shared, int) and heads % shared:
        yield f"{heads} heads are not groups of {shared}"
    wide = contents.get(f"{arch}.feed_forward_length")
    up = shapes.get("blk.0.ffn_up.weight")
    if isinstance(wide, int) and up is not None and wide not in (up[1], up[1] // 2):
        yield f"feed_forward_length is {wide}, blk.0.ffn_up {up}"
    if contents.get(f"{arch}.rope.freq_base", 1) <= 0:
        yield "rope.freq_base is not positive"
    matrices = [t for t in reader.tensors if len(t.shape) > 1 and re.fullmatch(r"blk\..*\.weight", t.name)]
    types = [tensor.tensor_type.name for tensor in matrices]
    pure = _PURE.get(contents.get("general.file_type", -1))
    if pure and types and max(set(types), key=types.count) != pure:
        yield f"file_type says {pure}, most matrices are {max(set(types), key=types.count)}"


def _vocabulary(contents: dict[str, Any], reader: Any) -> Iterator[str]:
    tokens = contents["tokenizer.ggml.tokens"]
    rows = {tensor.name: int(tensor.shape[1]) for tensor in reader.tensors if len(tensor.shape) == 2}
    for name in ("token_embd.weight", "output.weight"):
        if rows.get(name, len(tokens)) != len(tokens):
            yield f"{len(tokens)} tokens, {rows[name]} rows in {name}"
    for name in ("scores", "token_type"):
        found = contents.get(f"tokenizer.ggml.{name}")
        if found is not None and len(found) != len(tokens):
            yield f"tokenizer.ggml.{name} has {len(found)} entries for {len(tokens)} tokens"
    if bad := sorted(set(contents["tokenizer.ggml.token_type"]) - set(range(1, 7))):
        yield f"token types {bad}"
    for key, value in contents.items():
        if re.fullmatch(r"tokenizer\.ggml\.\w+_token_id", key) and not 0 <= value < len(tokens):
            yield f"{key} is {value}, of {len(tokens)} tokens"
        match = re.fullmatch(r"tokenizer\.ggml\.add_(bos|eos)_token", key)
        if match and value and f"tokenizer.ggml.{match[1]}_token_id" not in contents:
            yield f"{key} is set, and the token has no number"


def _tensors(contents: dict[str, Any], reader: Any) -> Iterator[str]:
    alignment = contents.get("general.alignment", 32)
    if alignment & (alignment - 1) or not 8 <= alignment <= 65536:
        yield f"general.alignment is {alignment}"
    end = 0
    for tensor in sorted(reader.tensors, key=lambda tensor: int(tensor.data_offset)):
        start = int(tensor.data_offset)
        if start % alignment or start < end:
            yield f"{tensor.name} begins at {start}, the tensor before it ends at {end}"
        end = start + int(tensor.n_bytes)
        if len(tensor.name.encode()) > 63 or not re.fullmatch(r"[\w.-]+", tensor.name, re.ASCII):
            yield f"{tensor.name!r} is not the name of a tensor"
        if not isinstance(tensor.tensor_type, GGMLQuantizationType) or not all(tensor.shape) or len(tensor.shape) > 4:
            yield f"{tensor.name} has the shape {list(tensor.shape)}"
    if len({tensor.name for tensor in reader.tensors}) != len(reader.tensors):
        yield "two tensors have one name"
