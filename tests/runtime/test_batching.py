"""Continuous batching: the result for a sequence must not depend on the others in its batch."""

from __future__ import annotations

import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgetune.runtime import Completion, Finish, Runtime, RuntimeProblem, Sampling, load
from edgetune.runtime.batching import SequenceBatch, SingleSequence
from edgetune.runtime.llama import runtime as llama_cpp
from edgetune.runtime.llama.batch import LlamaSequences
from edgetune.runtime.onnx import batch
from edgetune.runtime.onnx.batch import PaddedScoring, ScoreRequest
from edgetune.runtime.onnx.runtime import OnnxRuntime
from edgetune.runtime.sampling import Sampler
from tests.converters import family_models, tiny
from tests.profiles import scaled
from tests.runtime import models
from tests.runtime.scores import PROMPT

LENGTHS = (1, 3, 60, 17, 17, 2, 140, 33, 5, 90)
PROMPTS = [tiny.random_ids(length, seed=length + place) for place, length in enumerate(LENGTHS)]
LIMITS = [9, 1, 30, 12, 0, 40, 5, 25, 2, 17]
CLOSE = {
    # The same sums in f32, at most in another order: some 300 of them follow one another in the model (2 layers of 7
    # products of 64 and 172 terms, vocabulary, norms, softmax), each with a relative error of 2^-24 of the largest.
    "OnnxRuntime": 300 * 2.0**-24,
    # keys and values in f16 (2^-11), and an attention whose sums are in f16 where the rows are cut otherwise
    "LlamaRuntime": 16 * 2.0**-11,
}


def alone(runtime: Runtime, sampling: Sampling, limits: list[int] = LIMITS) -> list[Completion]:
    found = []
    for ids, most in zip(PROMPTS, limits, strict=True):
        generation = runtime.generate(ids, sampling, most)
        tokens = list(generation)
        assert generation.finish is not None
        found.append(Completion(tokens, generation.finish))
    return found


def test_an_answer_in_a_batch_is_the_answer_alone(runtime: Runtime) -> None:
    assert list(runtime.generate_batch(PROMPTS, Sampling(), LIMITS)) == alone(runtime, Sampling())


def test_a_seed_applies_to_each_prompt_anew(runtime: Runtime) -> None:
    sampling = Sampling(1.2, top_k=20, top_p=0.95, seed=5)
    limits = [min(limit, 10) for limit in LIMITS]  # what is drawn can turn on the last bits of llama.cpp's f16
    assert list(runtime.generate_batch(PROMPTS, sampling, limits)) == alone(runtime, sampling, limits)


def decoded_by_hand(runtime: Runtime, ids: list[int], sampling: Sampling, limit: int) -> Completion:
    """The rules of an answer, written down once more: choose, stop, append, context, length."""
    tokens: list[int] = []
    sampler = Sampler(sampling, runtime.sampler_vocabulary)
    logits = runtime._prefill(np.array(ids, np.int32)) if limit else None
    while logits is not None:
        token = sampler.choose(logits)
        if token in runtime.stop_tokens:
            return Completion(tokens, Finish.STOP)
        tokens.append(token)
        if len(ids) + len(tokens) > runtime.context:
            return Completion(tokens, Finish.CONTEXT)
        if len(tokens) == limit:
            break
        logits = runtime._step(token, len(ids) + len(tokens) - 1)
    sampler.close()
    return Completion(tokens, Finish.LENGTH)


@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, top_k=20, top_p=0.95, seed=5)], ids=["greedy", "seed"])
def test_a_single_answer_is_that_of_a_loop_written_by_hand(runtime: Runtime, sampling: Sampling) -> None:
    expected = [decoded_by_hand(runtime, ids, sampling, limit) for ids, limit in zip(PROMPTS, LIMITS, strict=True)]
    assert alone(runtime, sampling) == expected
    batches_of_one = [
        list(runtime.generate_batch([ids], sampling, [limit])) for ids, limit in zip(PROMPTS, LIMITS, strict=True)
    ]
    assert batches_of_one == [[completion] for completion in expected]


@pytest.mark.parametrize("most", [1, 2, 3, 16])
def test_the_size_of_the_batch_does_not_change_the_answers(
    runtime: Runtime, monkeypatch: pytest.MonkeyPatch, most: int
) -> None:
    expected = alone(runtime, Sampling())
    monkeypatch.setattr(llama_cpp, "MAX_SEQUENCES", most)
    monkeypatch.setattr(batch, "MAX_SEQUENCES", most)
    assert list(runtime.generate_batch(PROMPTS, Sampling(), LIMITS)) == expected


def test_answers_in_a_batch_end_at_stop_tokens_and_at_the_context(artifact: Path) -> None:
    with load(artifact, context=100) as runtime:
        fitting = [ids[:99] for ids in PROMPTS]
        runtime.stop_tokens = frozenset()
        plain = [list(runtime.generate(ids, Sampling(), 40)) for ids in fitting]
        runtime.stop_tokens = frozenset({plain[0][4], plain[5][20]})
        expected = [runtime.generate(ids, Sampling(), 40) for ids in fitting]
        tokens = [list(generation) for generation in expected]
        found = list(runtime.generate_batch(fitting, Sampling(), [40] * len(fitting)))
        assert [row.tokens for row in found] == tokens
        assert [row.finish for row in found] == [generation.finish for generation in expected]
        assert {row.finish for row in found} == {Finish.STOP, Finish.CONTEXT, Finish.LENGTH}


def test_an_answer_is_returned_as_soon_as_it_and_all_before_it_are_finished(runtime: Runtime) -> None:
    rows = runtime.generate_batch([PROMPT, PROMPTS[2]], Sampling(), [1, 200])
    assert len(next(rows).tokens) == 1
    rows.close()  # type: ignore[attr-defined]
    assert list(runtime.generate_batch([], Sampling(), [])) == []


def test_one_bad_prompt_is_an_error_before_anything_is_evaluated(artifact: Path) -> None:
    with load(artifact, context=64) as runtime:
        for wrong, said in (([], "empty"), ([1, 523], "outside"), (PROMPTS[6], "140 tokens")):
            with pytest.raises(RuntimeProblem, match=said):
                runtime.generate_batch([PROMPT, wrong], Sampling(), [3, 3])
        with pytest.raises(ValueError, match="shorter"):
            runtime.generate_batch([PROMPT, PROMPT], Sampling(), [3])


def test_the_number_of_sequences_is_bounded_by_their_memory(
    folder: Path, portable: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    per_token = 3 * 2 * 2 * 24 * 4  # layers, key and value, heads, their size, bytes
    for path, buffers in ((folder, 1), (portable, 2)):
        with load(path) as runtime:
            interface = runtime._interface  # type: ignore[attr-defined]
            monkeypatch.setattr(batch, "_CACHE_BYTES", 5 * 100 * per_token * buffers)
            assert batch.sequence_capacity(interface, 50, 100) == 5
            assert batch.sequence_capacity(interface, 3, 100) == 3
            assert batch.sequence_capacity(interface, 50, 10_000) == 1
            monkeypatch.undo()
            assert batch.sequence_capacity(interface, 50, 100) == 16


# -- logits ------------------------------------------------------------------------------------------------------------


def stepped(runtime: Runtime, prompts: list[list[int]], tokens: NDArray[np.int64]) -> NDArray[np.float32]:
    """[steps, rows, V]: the logits after each of `tokens` [steps, rows], a row at a time."""
    found = []
    for ids, own in zip(prompts, tokens.T, strict=True):
        runtime._prefill(np.array(ids, np.int32))
        found.append([runtime._step(int(token), len(ids) + i).copy() for i, token in enumerate(own)])
    return np.array(found).swapaxes(0, 1)


def made(runtime: Runtime, count: int) -> SequenceBatch:
    rows = runtime._make_batch(count, 200)
    assert isinstance(rows, batch.OnnxSequences | LlamaSequences)
    return rows


def test_the_logits_of_a_batch_are_those_of_each_sequence_alone(runtime: Runtime) -> None:
    prompts = [PROMPTS[2], PROMPTS[0], PROMPTS[6], PROMPTS[3]]
    tokens = np.random.default_rng(0).integers(0, 500, (6, 4))
    expected = stepped(runtime, prompts, tokens)
    rows = made(runtime, 4)
    for ids in prompts:
        rows.admit(np.array(ids, np.int32))
    found = np.array([rows.step(own.tolist()).copy() for own in tokens])
    rows.close()
    bound = CLOSE[type(runtime).__name__] * np.abs(expected).max()
    assert np.abs(found - expected).max() <= bound
    others = np.abs(expected[:, 1:] - expected[:, :-1]).max(axis=-1)
    assert others.min() > 10 * bound, "another row's logits would not pass"


@settings(max_examples=scaled(0.25), suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20)), max_size=12))
def test_sequences_keep_their_state_while_others_are_admitted_and_retired(
    runtime: Runtime, changes: list[tuple[bool, int]]
) -> None:
    """Whatever comes and goes: the greedy continuation of each row that is there is the one it has alone."""
    rows = made(runtime, 3)
    there: list[list[int]] = []
    for comes, number in changes:
        if comes and len(there) < 3:
            ids = PROMPTS[number % len(PROMPTS)][:50]
            there.append([*ids, int(rows.admit(np.array(ids, np.int32)).argmax())])
        elif there:
            rows.retire(number % len(there))
            there[number % len(there)] = there[-1]
            there.pop()
        if there:
            for row, logits in zip(there, rows.step([row[-1] for row in there]), strict=True):
                row.append(int(logits.argmax()))
    rows.close()
    for row in there:
        start = next(len(ids[:50]) for ids in PROMPTS if row[: len(ids[:50])] == ids[:50])
        assert row[start:] == list(runtime.generate(row[:start], Sampling(), len(row) - start))


# -- scores ------------------------------------------------------------------------------------------------------------


def every_row(runtime: Runtime, rows: list[tuple[NDArray[np.int32], NDArray[np.int64]]]) -> list[NDArray[np.float32]]:
    found: list[list[NDArray[np.float32]]] = [[] for _ in rows]
    for number, block in runtime.score_batch(rows):
        found[number].append(block.copy())
    empty = np.empty((0, runtime.vocabulary_size), np.float32)
    return [np.concatenate([empty, *blocks]) for blocks in found]


def assert_scores_are_those_of_rows_alone(
    runtime: Any, rows: list[tuple[NDArray[np.int32], NDArray[np.int64]]]
) -> None:
    bound = CLOSE[type(runtime).__name__]
    for (ids, positions), found in zip(rows, every_row(runtime, rows), strict=True):
        expected = [block.copy() for block in runtime.score(ids, positions)]
        assert len(found) == len(positions)
        if expected:
            alone = np.concatenate(expected)
            assert np.abs(found - alone).max() <= bound * np.abs(alone).max()


@st.composite
def scorings(draw: st.DrawFn) -> list[tuple[NDArray[np.int32], NDArray[np.int64]]]:
    rows = []
    for seed in range(draw(st.integers(0, 24))):
        length = draw(st.sampled_from([2, 3, 5, 16, 17, 18, 40, 41, 90, 200]))
        wanted = draw(st.sets(st.integers(1, length - 1)))
        rows.append((np.array(tiny.random_ids(length, seed=seed), np.int32), np.array(sorted(wanted), np.int64)))
    return rows


@settings(max_examples=scaled(0.25), suppress_health_check=list(HealthCheck))
@given(scorings())
def test_the_scores_of_a_batch_are_those_of_each_text_alone(
    runtime: Any, rows: list[tuple[NDArray[np.int32], NDArray[np.int64]]]
) -> None:
    assert_scores_are_those_of_rows_alone(runtime, rows)


def test_texts_that_share_a_pass_may_have_different_positions(runtime: Runtime) -> None:
    rows = [
        (np.array(tiny.random_ids(30 + i % 4, seed=i), np.int32), np.arange(1 + i % 3, 28 + i % 4)) for i in range(9)
    ]
    if isinstance(runtime, OnnxRuntime):
        requests = [ScoreRequest.at(index, *row) for index, row in enumerate(rows)]
        assert any(len({int(each.outputs[0]) for each in group}) > 1 for group in padded(runtime).groups(requests))
    assert_scores_are_those_of_rows_alone(runtime, rows)


def padded(runtime: OnnxRuntime) -> PaddedScoring:
    return PaddedScoring(runtime._session, runtime._interface, runtime._outputs)


@pytest.mark.parametrize("kind", ["onnx", "portable"])
def test_short_texts_share_a_pass_in_onnx(artifacts: dict[str, Path], kind: str) -> None:
    with load(artifacts[kind]) as runtime:
        assert isinstance(runtime, OnnxRuntime)
        rows = [ScoreRequest.at(i, np.array(tiny.random_ids(20), np.int32), np.arange(1, 20)) for i in range(6)]
        assert [len(group) for group in padded(runtime).groups(rows)] == [6]
        long = [ScoreRequest.at(i, np.array(tiny.random_ids(200), np.int32), np.arange(1, 200)) for i in range(6)]
        assert [[row.index for row in group] for group in padded(runtime).groups(long)] == [[i] for i in range(6)]


def test_llama_cpp_scores_a_text_exactly_as_if_it_were_alone(file: Path) -> None:
    """The cuts of a shared batch would change the 16-bit sums."""
    rows = [(np.array(tiny.random_ids(20 + i, seed=i), np.int32), np.arange(1, 20 + i)) for i in range(6)]
    with load(file) as runtime:
        together = every_row(runtime, rows)
        for (ids, positions), found in zip(rows, together, strict=True):
            np.testing.assert_array_equal(found, np.concatenate([b.copy() for b in runtime.score(ids, positions)]))


@pytest.mark.parametrize("outputs", [1, 7, 50])
def test_a_pass_has_no_more_logits_than_fit(folder: Path, outputs: int) -> None:
    rows = [
        ScoreRequest.at(i, np.array(tiny.random_ids(12), np.int32), np.arange(first, 12))
        for i, first in enumerate([1, 11, 5, 11, 11, 2, 11])
    ]
    with load(folder) as runtime:
        assert isinstance(runtime, OnnxRuntime)
        groups = PaddedScoring(runtime._session, runtime._interface, outputs).groups(rows)
    assert sorted(row.index for group in groups for row in group) == list(range(7))
    assert all(len(group) == 1 or sum(len(row.outputs) for row in group) <= outputs for group in groups)


def test_all_ids_are_checked_before_any_text_is_scored(runtime: Runtime) -> None:
    good, bad = np.array([1, 2, 3], np.int32), np.array([1, 523, 3], np.int32)
    with pytest.raises(RuntimeProblem, match="outside"):
        next(runtime.score_batch([(good, np.array([1])), (bad, np.array([2]))]))


# -- graphs that take one row ------------------------------------------------------------------------------------------


def test_a_graph_for_one_row_evaluates_one_sequence_at_a_time(folder: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(folder, tmp_path / "one")
    proto = onnx.load_model(copy / "model.onnx", load_external_data=False)
    for entry in proto.graph.input:
        if entry.name == "input_ids":
            entry.type.tensor_type.shape.dim[0].dim_value = 1
    (copy / "model.onnx").write_bytes(proto.SerializeToString())
    with load(copy) as one, load(folder) as runtime:
        assert isinstance(one._make_batch(4, 50), SingleSequence)
        assert list(one.generate_batch(PROMPTS, Sampling(), LIMITS)) == alone(runtime, Sampling())


@pytest.mark.parametrize("portable", [False, True])
@pytest.mark.parametrize("family", ["phi3-long", "gemma3", "qwen3", "gpt2", "mixtral", "stablelm"])
def test_batches_agree_with_single_texts_in_every_kind_of_graph(tmp_path: Path, family: str, portable: bool) -> None:
    """Two rotary tables (of which the longest row chooses), windows, norms of heads, positions that are looked up."""
    family_models.base(family, tmp_path / "hf")
    prompts = [tiny.random_ids(length, seed=length) for length in (250, 4, 300, 90, 12)]
    with load(models.onnx(tmp_path / "hf", tmp_path / "model", portable=portable), context=400) as runtime:
        runtime.stop_tokens = frozenset()
        expected = [list(runtime.generate(ids, Sampling(), 20)) for ids in prompts]
        assert [row.tokens for row in runtime.generate_batch(prompts, Sampling(), [20] * 5)] == expected
        rows = [(np.array(ids, np.int32), np.arange(1, len(ids))) for ids in (*prompts, *(ids[:14] for ids in prompts))]
        assert_scores_are_those_of_rows_alone(runtime, rows)
        assert isinstance(runtime._make_batch(5, 300), SingleSequence) is (family == "phi3-long")


def test_the_answers_are_in_the_order_of_the_prompts(runtime: Runtime) -> None:
    limits = [30, 1, 20, 2, 10]
    found = runtime.generate_batch([PROMPT] * 5, Sampling(), limits)
    lengths = [len(row.tokens) for row in found]
    assert lengths == limits
    assert any(a > b for a, b in pairwise(lengths))
