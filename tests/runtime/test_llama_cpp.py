"""llama.cpp behind the Runtime interface, against transformers on the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgetune_native
from edgetune.runtime import Finish, Runtime, RuntimeProblem, Sampling, load
from edgetune.runtime import llama_cpp as implementation
from edgetune.runtime.llama_library import library
from edgetune_converters.errors import ArtifactError
from tests.converters import tiny
from tests.runtime import models

PROMPT = tiny.random_ids(20)


def scored(runtime: Runtime, ids: list[int], positions: list[int]) -> np.ndarray:
    blocks = runtime.score(np.array(ids, np.int32), np.array(positions, np.int64))
    return np.concatenate([block.copy() for block in blocks])


def assert_same(found: np.ndarray, expected: np.ndarray) -> None:
    """Up to what llama.cpp's attention, which adds up in 16 bits, makes of another cut into batches."""
    assert found.shape == expected.shape
    assert tiny.divergence(expected, found)[0] < 1e-4
    np.testing.assert_allclose(found, expected, atol=0.1)


def test_scores_are_the_logits_of_transformers(base: Path, runtime: Runtime) -> None:
    ids = tiny.random_ids(200)
    expected = tiny.torch_logits(base, None, ids)[:-1]
    found = scored(runtime, ids, list(range(1, 200)))
    kld, same_top = tiny.divergence(expected, found)
    assert kld < 1e-5  # the key-value cache is f16
    assert same_top > 0.98
    assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()


def test_only_the_asked_positions_come_back_in_order(runtime: Runtime) -> None:
    ids = tiny.random_ids(200)
    every = scored(runtime, ids, list(range(1, 200)))
    some = [3, 4, 50, 120, 199]
    assert_same(scored(runtime, ids, some), every[[p - 1 for p in some]])


def test_blocks_are_bounded_whatever_is_asked(file: Path, runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> None:
    ids, positions = tiny.random_ids(200), list(range(1, 200))
    whole = scored(runtime, ids, positions)
    monkeypatch.setattr(implementation, "_OUTPUT_BYTES", 7 * 4 * runtime.vocabulary_size)
    monkeypatch.setattr(implementation, "_BATCH", 64)
    with load(file) as bounded:
        blocks = [block.copy() for block in bounded.score(np.array(ids, np.int32), np.array(positions))]
    assert {len(block) for block in blocks} <= {7, 3}
    assert_same(np.concatenate(blocks), whole)


@pytest.mark.parametrize(("wanted", "outputs"), [("1111111", 3), ("0000000", 3), ("0101010", 1), ("1", 1), ("0011", 2)])
def test_pieces_cover_everything_within_the_bound(wanted: str, outputs: int) -> None:
    flags = np.array([int(flag) for flag in wanted], np.int8)
    pieces = list(implementation._pieces(flags, outputs))
    assert [i for start, stop in pieces for i in range(start, stop)] == list(range(len(flags)))
    assert all(flags[start:stop].sum() <= outputs for start, stop in pieces)


def test_greedy_is_the_arg_max_of_transformers(base: Path, runtime: Runtime) -> None:
    ids = list(PROMPT)
    generation = runtime.generate(ids, Sampling(), 12)
    for token in generation:
        logits = tiny.torch_logits(base, None, ids)[-1]
        assert logits[token] > logits.max() - 1e-2
        ids.append(token)
    assert len(ids) == len(PROMPT) + 12
    assert generation.finish is Finish.LENGTH


def test_generation_does_not_depend_on_what_was_before(runtime: Runtime) -> None:
    first = list(runtime.generate(PROMPT, Sampling(), 10))
    scored(runtime, tiny.random_ids(100, seed=9), [50, 99])
    assert list(runtime.generate(PROMPT, Sampling(), 10)) == first


def test_a_seed_makes_sampling_repeatable(runtime: Runtime) -> None:
    def sample(seed: int) -> list[int]:
        return list(
            runtime.generate(PROMPT, Sampling(temperature=1.5, top_k=100, top_p=0.99, min_p=0.001, seed=seed), 15)
        )

    assert sample(7) == sample(7)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


@pytest.mark.parametrize(
    "sampling", [Sampling(1.0, top_k=1, seed=1), Sampling(1.0, top_p=1e-6, seed=1), Sampling(1.0, min_p=1.0, seed=1)]
)
def test_each_filter_alone_can_leave_only_the_likeliest(runtime: Runtime, sampling: Sampling) -> None:
    assert list(runtime.generate(PROMPT, sampling, 8)) == list(runtime.generate(PROMPT, Sampling(), 8))


def test_a_stop_token_ends_the_answer_and_is_not_part_of_it(file: Path) -> None:
    with load(file) as runtime:
        plain = list(runtime.generate(PROMPT, Sampling(), 8))
        runtime.stop_tokens = frozenset({plain[5]})
        generation = runtime.generate(PROMPT, Sampling(), 8)
        assert list(generation) == plain[: plain.index(plain[5])]
        assert generation.finish is Finish.STOP


def test_a_full_context_ends_the_answer(file: Path) -> None:
    with load(file, context=24) as runtime:
        generation = runtime.generate(PROMPT, Sampling(), 100)
        assert len(list(generation)) == 24 - len(PROMPT) + 1  # the last one needs no room of its own
        assert generation.finish is Finish.CONTEXT


def test_a_prompt_longer_than_the_context_says_so(file: Path) -> None:
    with load(file, context=16) as runtime, pytest.raises(RuntimeProblem, match=r"20 tokens.*context is 16") as error:
        runtime.generate(PROMPT, Sampling(), 4)
    assert "--context 24" in str(error.value.hint)


def test_ids_outside_the_vocabulary_never_reach_llama_cpp(runtime: Runtime) -> None:
    with pytest.raises(RuntimeProblem, match="token 523 is outside"):
        runtime.generate([1, 523], Sampling(), 1)
    with pytest.raises(ValueError, match="not a token id"):
        runtime.token_bytes(-1)


def test_no_prompt_no_answer(runtime: Runtime) -> None:
    with pytest.raises(RuntimeProblem, match="empty"):
        runtime.generate([], Sampling(), 1)


def test_text_survives_tokens_and_back(runtime: Runtime) -> None:
    assert runtime.detokenize(runtime.tokenize(models.WORDS)) == models.WORDS
    assert runtime.detokenize(runtime.tokenize("<|im_start|>user\nhi<|im_end|>")) == "user\nhi"


def test_the_template_and_stops_come_from_the_file(runtime: Runtime) -> None:
    assert runtime.chat_template is not None
    assert runtime.chat_template.source == models.TEMPLATE
    assert runtime.chat_template.eos_token == "<|im_end|>"
    assert runtime.tokenize("<|im_end|>")[0] in runtime.stop_tokens


def test_a_closed_runtime_can_be_closed_again(file: Path) -> None:
    runtime = load(file)
    runtime.close()
    runtime.close()


@pytest.mark.parametrize("keep", [3, 40, 1000, -1])
def test_truncated_files_are_refused(file: Path, tmp_path: Path, keep: int) -> None:
    cut = tmp_path / "cut.gguf"
    cut.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(ArtifactError, match=r"cut\.gguf"):
        load(cut)


def test_what_llama_cpp_refuses_is_said_in_its_words(file: Path, tmp_path: Path) -> None:
    other = tmp_path / "other.gguf"
    other.write_bytes(file.read_bytes().replace(b"output_norm.weight", b"output_nurm.weight"))
    with pytest.raises(RuntimeProblem, match="output_norm"):
        load(other)


@pytest.mark.parametrize(
    ("advertised", "usable", "safe"), [(True, False, False), (True, True, True), (False, False, True)]
)
def test_amx_that_faults_is_left_alone_and_said_once(
    file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], advertised: bool, usable: bool,
    safe: bool,
) -> None:  # fmt: skip
    probe = edgetune_native.AmxProbe(advertised, usable, "AMX faults here")
    monkeypatch.setattr(edgetune_native, "probe_amx", lambda: probe)
    asked: list[bool] = []
    loaded = library().llama_model_load_from_file

    def load_and_note(path: bytes, parameters: Any) -> Any:
        asked.append(parameters.use_extra_bufts)
        return loaded(path, parameters)

    monkeypatch.setattr(library(), "llama_model_load_from_file", load_and_note)
    implementation._extra_buffers_are_safe.cache_clear()
    for _ in range(2):
        load(file).close()
    implementation._extra_buffers_are_safe.cache_clear()
    assert asked == [safe, safe]
    assert capsys.readouterr().err.count("AMX faults here") == (0 if safe else 1)


def test_directories_and_missing_files(tmp_path: Path) -> None:
    (tmp_path / "artifacts").mkdir()
    (tmp_path / "artifacts/m.gguf").touch()
    with pytest.raises(RuntimeProblem, match="is a directory") as error:
        load(tmp_path)
    assert "m.gguf" in str(error.value.hint)
    with pytest.raises(RuntimeProblem, match="there is no file"):
        load(tmp_path / "none.gguf")


def test_text_is_normalized_as_in_training(base: Path, tmp_path: Path) -> None:
    tokenizer = json.loads((base / "tokenizer.json").read_text(encoding="utf-8"))
    other = shutil.copytree(base, tmp_path / "base")
    (other / "tokenizer.json").write_text(json.dumps({**tokenizer, "normalizer": {"type": "NFC"}}), encoding="utf-8")
    composed, decomposed = "\u00e9", "e\u0301"
    with load(models.gguf(other, tmp_path / "nfc.gguf")) as normalizing:
        assert normalizing.tokenize(decomposed) == normalizing.tokenize(composed)
    with load(models.gguf(base, tmp_path / "plain.gguf")) as plain:
        assert plain.tokenize(decomposed) != plain.tokenize(composed)
