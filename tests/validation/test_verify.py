"""A file is known by what it carries, without the run it came from."""

from __future__ import annotations

import contextlib
import json
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from edgetune.errors import EdgetuneError, RunDirectoryError
from edgetune.reference import golden
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import Runtime, load
from edgetune.validation.verify import Verification, _contract, _first_tokens, limit_for, verify
from edgetune_converters.gguf import reader
from edgetune_converters.gguf.joined import data_hash
from tests.cli_runner import edgetune, edgetune_process, sentence
from tests.export_requests import export


def exported(base: Path, run: RunDirectory, path: Path, type_: str = "f32", **options: Any) -> Path:
    for receipt in export(
        base, {type_: path}, allow_fallback=True, threads=1, metadata=golden.metadata(run), **options,
    ):  # fmt: skip
        receipt.write()
        path = Path(receipt.artifact)
    return path


@pytest.fixture
def file(base: Path, run: RunDirectory, tmp_path: Path) -> Path:
    return exported(base, run, tmp_path / "tiny.gguf")


@pytest.fixture(scope="module")
def opened(whole: Path) -> Iterator[Runtime]:
    with load(whole) as runtime:
        yield runtime


def found(file: Path, **options: Any) -> Verification:
    return verify(file, progress=lambda *_: None, **options)


def failures(file: Path) -> dict[str, str]:
    return {check.name: check.detail for check in found(file).failed}


def test_a_whole_file_passes_every_check(file: Path) -> None:
    verdict = found(file)
    assert verdict.failed == []
    names = ["receipt", "data", "template", "BOS", "tokens", "stop", "first tokens"]
    assert [(check.name, check.passed) for check in verdict.checks] == [(name, True) for name in names]
    assert "same top token in 3 of them" in verdict.checks[-1].detail


def test_quantization_is_no_damage(base: Path, run: RunDirectory, tmp_path: Path) -> None:
    assert failures(exported(base, run, tmp_path / "q8.gguf", "q8_0")) == {}


def test_a_split_file_is_known_by_all_its_parts(base: Path, run: RunDirectory, tmp_path: Path) -> None:
    first = exported(base, run, tmp_path / "tiny.gguf", split_max_size=300_000)
    parts = sorted(tmp_path.glob("*.gguf"))
    assert len(parts) > 2
    assert reader.read(first).metadata["edgetune.data.sha256"] == data_hash(first)
    assert failures(first) == {}
    content = bytearray(parts[-1].read_bytes())
    content[-3] ^= 1
    parts[-1].write_bytes(content)
    assert {"receipt", "data"} <= failures(first).keys()


def test_without_a_receipt_the_file_speaks_for_itself(file: Path) -> None:
    file.with_name(file.name + ".receipt.json").unlink()
    content = bytearray(file.read_bytes())
    content[-1000] ^= 0x10
    file.write_bytes(content)
    assert list(failures(file)) == ["data"]


def test_other_weights_are_noticed_though_every_hash_fits(base: Path, run: RunDirectory, tmp_path: Path) -> None:
    """A file that was made, whole, from weights that are not those of the reference."""
    other = tmp_path / "other"
    shutil.copytree(base, other)
    tensors = load_file(other / "model.safetensors")
    name = "model.layers.1.self_attn.o_proj.weight"
    tensors[name] = np.ascontiguousarray(tensors[name].T)
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    failed = failures(exported(other, run, tmp_path / "tiny.gguf"))
    assert list(failed) == ["first tokens"]
    assert "the limit is 0.1" in failed["first tokens"]


@pytest.mark.parametrize(
    ("old", "new", "name"),
    [
        (b"add_generation_prompt %}<|im_start|>", b"add_generation_prompt %}<|im_stars|>", "template"),
        (b"tokenizer.chat_template", b"tokenizer.chat_templote", "template"),
        (struct.pack("<Q", 1) + b"d", struct.pack("<Q", 1) + b"\x00", "tokens"),
        (
            b"tokenizer.ggml.eos_token_id" + struct.pack("<II", 4, 501),
            b"tokenizer.ggml.eos_token_id" + struct.pack("<II", 4, 7), "stop",
        ),
        (
            b"tokenizer.ggml.add_bos_token" + struct.pack("<IB", 7, 0),
            b"tokenizer.ggml.add_bos_token" + struct.pack("<IB", 7, 1), "BOS",
        ),
    ],
)  # fmt: skip
def test_a_changed_header_breaks_the_contract(file: Path, old: bytes, new: bytes, name: str) -> None:
    content = file.read_bytes()
    assert old in content
    content = content.replace(old, new)
    if name == "stop":  # a token that is called so stops whatever the number says
        content = content.replace(struct.pack("<Q", 10) + b"<|im_end|>", struct.pack("<Q", 10) + b"<|im_ond|>")
    file.write_bytes(content)
    assert name in failures(file)


def test_a_file_that_carries_nothing(whole: Path, tmp_path: Path) -> None:
    file = tmp_path / "plain.gguf"
    file.write_bytes(whole.read_bytes().replace(b"edgetune.data.sha256", b"edgetune.data.sha257"))
    assert found(file).is_empty
    result = edgetune("verify", file)
    assert result.returncode == 3
    assert b"has no embedded data" in result.stderr


def test_the_users_rows_do_not_leave_the_run(run: RunDirectory, tmp_path: Path) -> None:
    copy = RunDirectory(tmp_path / "run")
    shutil.copytree(run.path, copy.path)
    manifest = json.loads((copy.reference / "reference.json").read_text())
    from edgetune.reference.manifest import digest_of

    manifest.pop("digest")
    manifest["contract"][0]["own"] = True
    (copy.reference / "reference.json").write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    carried = "".join(golden.metadata(copy).values())
    assert "dim the lights" not in carried
    assert "two  spaces" in carried
    for entry in manifest["contract"]:
        entry.pop("own")  # a reference of an older version does not say whose they are
    (copy.reference / "reference.json").write_text(json.dumps(manifest | {"digest": digest_of(manifest)}))
    assert golden.metadata(copy) == {}


def test_golden_conversations_are_ascii_in_short_strings(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(golden, "_LONGEST", 1000)
    carried = golden.metadata(run)
    assert list(carried) == ["edgetune.golden", *(f"edgetune.golden.{n}" for n in range(2, len(carried) + 1))]
    assert len(carried) > 1
    assert all(text.isascii() and text.isprintable() and len(text) <= 1000 for text in carried.values())
    found = golden.read(carried, Path("x.gguf"))
    assert found is not None
    whole = json.dumps({"version": 1, "stop_ids": sorted(found.stop_ids), "conversations": found.conversations})
    assert golden.read({"edgetune.golden": whole}, Path("x.gguf")) == found  # files of older versions
    for key in list(carried)[1:]:
        with pytest.raises(RunDirectoryError, match=f"cannot be read: {key} is missing"):
            golden.read({name: text for name, text in carried.items() if name != key}, Path("x.gguf"))


def test_one_conversation_longer_than_a_string_is_a_string_of_its_own() -> None:
    entries = [
        {"messages": [], "text": text, "ids": [], "add_generation_prompt": True} for text in ("a", "ü" * 3000, "b")
    ]
    carried = golden.encode(entries, [2])
    assert [len(json.loads(text)["conversations"]) for text in carried.values()] == [1, 1, 1]
    found = golden.read(carried, Path("x.gguf"))
    assert found is not None
    assert [entry["text"] for entry in found.conversations] == ["a", "ü" * 3000, "b"]


@pytest.mark.parametrize("parts", [0, -1, True, "2", 2**70, None])
def test_a_number_of_parts_that_cannot_be_is_a_sentence(parts: object) -> None:
    text = json.dumps({"version": 1, "stop_ids": [], "conversations": [], "parts": parts})
    with pytest.raises(RunDirectoryError, match="cannot be read: it has"):
        golden.read({"edgetune.golden": text}, Path("x.gguf"))


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9}', '{"version": 1}', '{"version":1,"conversations":[{}]}'])
def test_golden_conversations_that_cannot_be_read(text: str) -> None:
    with pytest.raises(RunDirectoryError, match="cannot be read"):
        golden.read({"edgetune.golden": text}, Path("x.gguf"))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(golden._FIELDS), inner, max_size=4),
    max_leaves=8,
)


@given(field=st.sampled_from(golden._FIELDS), inner=st.sampled_from(["ids", "log_probs", ""]), value=JSON)
@example(field="ids", inner="ids", value=[])
def test_golden_conversations_of_any_shape(
    run: RunDirectory, whole: Path, opened: Runtime, field: str, inner: str, value: object
) -> None:
    """One value of one conversation replaced by anything: a sentence, or figures."""
    content = json.loads(golden.metadata(run)["edgetune.golden"])
    content.pop("parts", None)
    entry = content["conversations"][1]
    if field == "first" and inner:
        entry["first"][inner] = value
    else:
        entry[field] = value
    with contextlib.suppress(EdgetuneError):
        carried = golden.read({"edgetune.golden": json.dumps(content)}, whole)
        assert carried is not None
        checks = [*_contract(opened, carried), _first_tokens(opened, carried, 1.0, lambda *_: None)]
        assert all(check.detail for check in checks)


def test_verify_needs_neither_torch_nor_the_run_directory(file: Path, tmp_path: Path, without_torch: str) -> None:
    """Where there is neither torch nor the run directory."""
    alone = tmp_path / "edge"
    alone.mkdir()
    copy = Path(shutil.copy(file, alone))
    result = edgetune_process("verify", copy, PYTHONPATH=without_torch)
    assert result.returncode == 0, result.stderr
    assert result.stdout.decode().split()[:2] == ["-", "receipt"]
    assert b"ok      first tokens" in result.stdout
    copy.write_bytes(copy.read_bytes()[:-200] + bytes(200))
    result = edgetune("verify", copy, "--json")
    assert result.returncode == 3
    assert json.loads(result.stdout)["passed"] is False
    assert b"are not those that were written" in result.stderr.replace(b"\n", b" ")
    copy.write_bytes(copy.read_bytes()[:1000])
    result = edgetune("verify", copy)
    assert result.returncode == 1
    assert "ends at byte 1000" in sentence(result)


def test_a_stricter_limit(base: Path, run: RunDirectory, tmp_path: Path) -> None:
    file = exported(base, run, tmp_path / "q4.gguf", "q4_0")
    assert [check.name for check in found(file, max_kld=1e-6).failed] == ["first tokens"]
    with load(file) as runtime:
        assert golden.read(runtime.metadata, file) is not None


@pytest.mark.parametrize(
    ("recipe", "limit"), [("f16", 0.1), ("q8_0", 0.107), ("q4_k_m", 0.255), ("q4_0", 0.46), ("q2_k", 2.35), ("", 2.35)]
)
def test_the_limit_is_that_of_the_type(recipe: str, limit: float) -> None:
    assert limit_for({"edgetune.recipe": recipe}) == pytest.approx(limit)
