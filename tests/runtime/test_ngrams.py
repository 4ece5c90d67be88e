"""The table of n-grams of training answers: what is in it, its file, and that guesses from it do not change answers."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow
from edgetune.errors import RuntimeNotice, RuntimeProblem
from edgetune.runtime import GenerationRequest, Sampling, load
from edgetune.runtime.engine import Engine
from edgetune.runtime.ngrams import Answers, NgramTable, path_beside, vocabulary_hash
from edgetune.runtime.slots import NO_SPECULATION, Speculation
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import reader
from tests.converters import tiny

PROMPTS = [tiny.random_ids(12, seed=seed) for seed in range(8)]
FAVORABLE = (1.0, 1.0, 1.0, 1.0, 1.0, 1.0)  # drafts cost nothing, so that all are tried


def rows(*answers: list[int], prompt: int = 3) -> EncodedRows:
    supervised = [[False] * prompt + [True] * (len(ids) - prompt) for ids in answers]
    return EncodedRows(EncodedRow(ids, marks) for ids, marks in zip(answers, supervised, strict=True))


def guesses(table: NgramTable) -> list[tuple[int, int]]:
    """(token, share of 255) of all cells."""
    cells = table.cells[table.cells > 0]
    return sorted((int(cell & np.uint64(0xFFFFFFFF)), int(cell >> np.uint64(32)) & 255) for cell in cells)


def answer(engine: Engine, ids: list[int], **options: object) -> tuple[list[int], int]:
    ticket = engine.submit(GenerationRequest(ids, max_tokens=60, ignore_eos=True, **options))  # type: ignore[arg-type]
    return [event.token for event in ticket], ticket.usage.guessed_tokens


@pytest.fixture(scope="module")
def learned(file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with a table of its own answers beside it."""
    path = Path(shutil.copy(file, tmp_path_factory.mktemp("learned") / "model.gguf"))
    with load(path) as runtime, Engine(runtime, slots=1) as engine:
        answers = [[*ids, *answer(engine, ids)[0]] for ids in PROMPTS[:6]]
    table = NgramTable.count(Answers.of(rows(*answers, *answers, prompt=12)))
    assert table is not None
    table.for_vocabulary(reader.read(path).metadata["tokenizer.ggml.tokens"]).write(path_beside(path))  # type: ignore[arg-type]
    return path


def test_what_comes_once_is_not_in_the_table() -> None:
    assert NgramTable.count(Answers.of(rows([1, 2, 3, 40, 50], [4, 5, 6, 60, 70]))) is None
    assert NgramTable.count(Answers.of(EncodedRows())) is None


def test_the_most_frequent_next_token_is_in_the_table() -> None:
    table = NgramTable.count(Answers.of(rows(*[[1, 2, 3, 9, 10]] * 6, *[[1, 2, 3, 9, 11]] * 2)))
    assert table is not None
    assert guesses(table) == [(9, round(8 / 9 * 255)), (10, round(6 / 9 * 255))], "longer contexts would say the same"


def test_prompts_are_contexts_but_are_not_guessed() -> None:
    table = NgramTable.count(Answers.of(rows([1, 2, 3, 9], [1, 2, 3, 9])))
    assert table is not None
    assert guesses(table) == [(9, round(2 / 3 * 255))]


def test_a_context_does_not_reach_into_the_row_before() -> None:
    table = NgramTable.count(Answers.of(rows(*[[5, 6, 7], [8, 9]] * 3, prompt=0)))
    assert table is not None
    assert [token for token, _ in guesses(table)] == [6, 7, 9]


def test_a_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    table = NgramTable.count(Answers.of(rows(*[[1, 2, 3, 9, 10]] * 2)))
    assert table is not None
    table.for_vocabulary(["a", "b"]).write(tmp_path / "x.ngrams")
    found = NgramTable.read(tmp_path / "x.ngrams")
    assert (found.cells.tolist(), found.longest) == (table.cells.tolist(), table.longest)
    assert found.vocabulary == vocabulary_hash(["a", "b"])


@pytest.mark.parametrize("damage", ["cut", "magic", "version", "count"])
def test_a_damaged_file_is_refused(tmp_path: Path, damage: str) -> None:
    table = NgramTable.count(Answers.of(rows(*[[1, 2, 3, 9, 10]] * 2)))
    assert table is not None
    path = tmp_path / "x.ngrams"
    table.write(path)
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[-1]
    else:
        data[{"magic": 0, "version": 8, "count": 16}[damage]] ^= 3
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match=r"x\.ngrams"):
        NgramTable.read(path)


def test_answers_with_a_table_are_those_without(learned: Path) -> None:
    with load(learned) as runtime:
        with Engine(runtime, slots=2, speculation=NO_SPECULATION) as engine:
            plain = [answer(engine, ids) for ids in PROMPTS]
        with Engine(runtime, slots=2, speculation=Speculation(costs=FAVORABLE, adapts=False)) as engine:
            guessed = [answer(engine, ids) for ids in PROMPTS]
            assert engine.status.drafted_tokens >= sum(count for _, count in guessed)
            assert [answer(engine, ids, speculate=False) for ids in PROMPTS] == plain
            tickets = [engine.submit(GenerationRequest(ids, max_tokens=60, ignore_eos=True)) for ids in PROMPTS]
            assert [[event.token for event in ticket] for ticket in tickets] == [tokens for tokens, _ in plain]
    assert [tokens for tokens, _ in guessed] == [tokens for tokens, _ in plain]
    assert [count for _, count in plain] == [0] * len(PROMPTS)
    assert sum(count for _, count in guessed[:6]) > 200, "the table knows these answers"


def test_nothing_is_guessed_where_tokens_are_drawn(learned: Path) -> None:
    sampling = Sampling(temperature=0.4, seed=5)
    with load(learned) as runtime:
        with Engine(runtime, slots=1, speculation=NO_SPECULATION) as engine:
            plain = [answer(engine, ids, sampling=sampling) for ids in PROMPTS]
        with Engine(runtime, slots=1, speculation=Speculation(costs=FAVORABLE, adapts=False)) as engine:
            assert [answer(engine, ids, sampling=sampling) for ids in PROMPTS] == plain


def test_an_exact_engine_guesses_nothing(learned: Path) -> None:
    with load(learned) as runtime, Engine(runtime, slots=2, is_exact=True) as engine:
        assert answer(engine, PROMPTS[0])[1] == engine.status.drafted_tokens == 0


def test_a_table_of_another_vocabulary_is_not_used(learned: Path, tmp_path: Path) -> None:
    path = Path(shutil.copy(learned, tmp_path / "model.gguf"))
    NgramTable.read(path_beside(learned)).for_vocabulary(["a"]).write(path_beside(path))
    opening = pytest.warns(RuntimeNotice, match="another vocabulary")
    with load(path) as runtime, opening, Engine(runtime, slots=1) as engine:
        assert answer(engine, PROMPTS[0])[1] == 0


@pytest.mark.parametrize("uses_table", [False, True])
def test_answers_with_a_draft_model_are_those_without(learned: Path, uses_table: bool) -> None:
    with load(learned) as runtime:
        with Engine(runtime, slots=2, speculation=NO_SPECULATION) as engine:
            plain = [answer(engine, ids)[0] for ids in PROMPTS]
        with Engine(runtime, slots=2, speculation=Speculation(uses_table, learned, FAVORABLE, adapts=False)) as engine:
            tickets = [engine.submit(GenerationRequest(ids, max_tokens=60, ignore_eos=True)) for ids in PROMPTS]
            assert [[event.token for event in ticket] for ticket in tickets] == plain
            assert sum(ticket.usage.guessed_tokens for ticket in tickets) > 250, "the model guesses all that it says"
            assert answer(engine, PROMPTS[3])[0] == plain[3]


def test_a_draft_model_of_another_vocabulary_is_refused(learned: Path, file: Path) -> None:
    other = Path(__file__).parents[2] / "samples/smart-home/smart-home-q4_k_m.gguf"
    with load(file) as runtime:
        with pytest.raises(RuntimeProblem, match="another vocabulary"):
            Engine(runtime, speculation=Speculation(draft=other))
        with pytest.raises(RuntimeProblem, match="there is no draft model"):
            Engine(runtime, speculation=Speculation(draft=file.with_name("missing.gguf")))


def test_an_onnx_folder_takes_no_draft_model(folder: Path, file: Path) -> None:
    with load(folder) as runtime, pytest.raises(RuntimeProblem, match="takes no draft model"):
        Engine(runtime, speculation=Speculation(draft=file))
