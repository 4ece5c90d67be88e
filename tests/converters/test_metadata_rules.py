"""GGUF files keep the rules of the specification and of an auditor: nothing hidden, no odd sizes, types by the book."""

from __future__ import annotations

import contextlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFWriter

from edgetune.planning.golden_conversations import GOLDEN
from edgetune.reference import golden
from tests.converters import family_models, tiny
from tests.converters.gguf_rules import problems
from tests.export_requests import export

SAMPLE = Path(__file__).parents[2] / "samples/smart-home/smart-home-q4_k_m.gguf"
HIDDEN = "zero\u200bwidth \u202eredro \u2066isolate\u2069 \ufeff \x07 \U000e0041"


def _conversations() -> dict[str, str]:
    """Golden conversations of the size of a real run."""
    entries = [
        {
            "messages": messages,
            "add_generation_prompt": True,
            "text": "".join(f"<|im_start|>{each['role']}\n{each['content']}<|im_end|>\n" for each in messages),
            "ids": list(range(150)),
            "first": {"ids": list(range(20)), "log_probs": [-1.2345678901234567] * 20},
        }
        for messages in GOLDEN
    ]
    return golden.encode(entries, [2])


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("base"))


def auditor(path: Path) -> list[str]:
    """What the auditor `c4nary` finds, without its remarks. Skips the test where it is not installed."""
    scan: Any = pytest.importorskip("c4nary.cli", reason="pip install c4nary").main
    out = _printed(lambda: scan(["scan", str(path), "--json", "--deep-tokenizer"]))
    found = json.loads(out)["findings"]
    return [f"{each['rule_id']} {each['location']}" for each in found if each["severity"].upper() != "INFO"]


def _printed(call: Callable[[], object]) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(io.StringIO()):
        call()
    return out.getvalue()


def _files(base: Path, directory: Path) -> list[Path]:
    """One file of every kind: pure and mixed types, split, with golden conversations, an adapter."""
    adapter = tiny.adapter(base, directory / "adapter")
    extra = {**_conversations(), "edgetune.template.options": json.dumps({"a": HIDDEN})}
    export(
        base,
        {"q8_0": directory / "q8.gguf", "f16": directory / "f16.gguf", "q4_0": directory / "q4.gguf"},
        lora={"f16": directory / "lora.gguf"},
        adapter=adapter,
        metadata=extra,
        name=f"name {HIDDEN}",
    )
    (directory / "split").mkdir()
    export(base, {"q8_0": directory / "split" / "x.gguf"}, split_max_size=100_000)
    return sorted(directory.rglob("*.gguf"))


def test_files_keep_the_rules(base: Path, tmp_path: Path) -> None:
    files = _files(base, tmp_path)
    assert len(files) > 5
    assert {path.name: problems(path) for path in files} == {path.name: [] for path in files}


def test_an_independent_auditor_has_nothing_to_flag(base: Path, tmp_path: Path) -> None:
    files = _files(base, tmp_path)
    found = {path.name: auditor(path) for path in files}
    # the auditor knows no adapters: no sizes of a model, and the names of its tensors with an ending
    found["lora.gguf"] = [text for text in found["lora.gguf"] if not text.startswith(("INT005", "MET005"))]
    assert found == {path.name: [] for path in files}


def test_the_finished_file_of_the_sample_keeps_the_rules(tmp_path: Path) -> None:
    assert problems(SAMPLE) == []
    assert auditor(SAMPLE) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", family_models.CASES)
def test_files_of_every_family_keep_the_rules(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    export(base, {"f16": tmp_path / "x.gguf"})
    assert problems(tmp_path / "x.gguf") == []


CLEAN: dict[str, tuple[str, Any]] = {
    "general.type": ("string", "model"),
    "llama.block_count": ("uint32", 1),
    "llama.embedding_length": ("uint32", 32),
    "llama.feed_forward_length": ("uint32", 64),
    "llama.attention.head_count": ("uint32", 4),
    "llama.attention.head_count_kv": ("uint32", 2),
    "general.file_type": ("uint32", 0),
    "tokenizer.ggml.tokens": ("array", ["a", "b"]),
    "tokenizer.ggml.token_type": ("array", [1, 1]),
}
BROKEN: dict[str, tuple[dict[str, tuple[str, Any]], str]] = {
    "bidi": ({"general.name": ("string", "a\u202eb")}, "general.name holds U+202E"),
    "tags": ({"general.description": ("string", "\U000e0041")}, "holds U+E0041"),
    "control": ({"edgetune.recipe": ("string", "a\x1b[0m")}, "holds U+001B"),
    "long": ({"edgetune.recipe": ("string", "a" * 9000)}, "has 9000 characters"),
    "address": ({"general.name": ("string", "see http://a.example")}, "names an address"),
    "key": ({"general.Recipe": ("string", "a")}, "not a key in lower case"),
    "namespace": ({"other.thing": ("string", "a")}, "in no known namespace"),
    "type": ({"general.file_type": ("int32", 0)}, "file_type is INT32, not UINT32"),
    "flag": ({"tokenizer.ggml.add_bos_token": ("uint32", 0)}, "add_bos_token is UINT32, not BOOL"),
    "file type": ({"general.file_type": ("uint32", 7)}, "file_type says Q8_0"),
    "layers": ({"llama.block_count": ("uint32", 2)}, "block_count is 2"),
    "width": ({"llama.embedding_length": ("uint32", 48)}, "embedding_length is 48"),
    "heads": ({"llama.attention.head_count_kv": ("uint32", 3)}, "4 heads are not groups of 3"),
    "token": ({"tokenizer.ggml.eos_token_id": ("uint32", 2)}, "eos_token_id is 2, of 2 tokens"),
    "kinds": ({"tokenizer.ggml.token_type": ("array", [1, 9])}, "token types"),
    "bos": ({"tokenizer.ggml.add_bos_token": ("bool", True)}, "the token has no number"),
    "rope": ({"llama.rope.freq_base": ("float32", 0.0)}, "freq_base is not positive"),
}


def _written(path: Path, values: dict[str, tuple[str, Any]]) -> Path:
    """A file of gguf-py's own writer."""
    writer = GGUFWriter(path, "llama")
    for key, (kind, value) in values.items():
        getattr(writer, f"add_{kind}")(key, value)
    for name, shape in (("token_embd", (2, 32)), ("blk.0.ffn_up", (64, 32)), ("blk.0.attn_q", (32, 32))):
        writer.add_tensor(f"{name}.weight", np.zeros(shape, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_a_file_of_another_writer_keeps_the_rules(tmp_path: Path) -> None:
    assert problems(_written(tmp_path / "x.gguf", CLEAN)) == []


@pytest.mark.parametrize("name", BROKEN)
def test_every_rule_finds_what_breaks_it(name: str, tmp_path: Path) -> None:
    changes, said = BROKEN[name]
    found = problems(_written(tmp_path / "x.gguf", CLEAN | changes))
    assert len(found) == 1
    assert said in found[0]


def test_tensors_that_overlap_are_found(tmp_path: Path) -> None:
    path = _written(tmp_path / "x.gguf", CLEAN)
    raw = bytearray(path.read_bytes())
    place = raw.index(b"blk.0.attn_q.weight") + len("blk.0.attn_q.weight") + 4 + 16 + 4
    raw[place : place + 8] = (0).to_bytes(8, "little")
    path.write_bytes(raw)
    assert any("the tensor before it ends at" in text for text in problems(path))
