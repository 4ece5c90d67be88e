"""`edgetune run` with guesses: the table beside a file, and a draft model."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from edgetune import cli
from edgetune.data.encoded_rows import EncodedRows
from edgetune.data.masks import EncodedRow
from edgetune.runtime import load
from edgetune.runtime.ngrams import Answers, NgramTable, path_beside
from edgetune_converters.gguf import reader

SAMPLE = Path(__file__).parents[2] / "samples/smart-home/smart-home-q4_k_m.gguf"
PROMPT = "dim the bedroom lights to 30% at 7pm"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = Path(shutil.copy(SAMPLE, tmp_path_factory.mktemp("guessing") / "model.gguf"))
    with load(path) as runtime:
        ids = runtime.tokenize_chat([{"role": "user", "content": PROMPT}])
        answer = list(runtime.generate(ids))
    row = EncodedRow([*ids, *answer], [False] * len(ids) + [True] * len(answer))
    table = NgramTable.count(Answers.of(EncodedRows([row] * 40)))
    assert table is not None
    table.for_vocabulary(reader.read(path).metadata["tokenizer.ggml.tokens"]).write(path_beside(path))  # type: ignore[arg-type]
    return path


def said(capfd: pytest.CaptureFixture[str], *arguments: object) -> tuple[str, str]:
    assert cli.run([str(argument) for argument in arguments]) == 0
    return capfd.readouterr()


def test_run_guesses_and_gives_the_same_answer(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plain, error = said(capfd, "run", file, "-p", PROMPT, "-v", "--no-speculation", "--no-fit")
    assert "guessed" not in error
    guessed, error = said(capfd, "run", file, "-p", PROMPT, "-v", "--no-fit")
    assert (guessed, "tokens were guessed" in error) == (plain, True)
    drafted, error = said(capfd, "run", file, "-p", PROMPT, "-v", "--no-fit", "--draft", SAMPLE)
    assert (drafted, "tokens were guessed" in error) == (plain, True)


def test_a_draft_model_that_has_nothing_to_do_is_warned_of(file: Path, capfd: pytest.CaptureFixture[str]) -> None:
    _, error = said(capfd, "run", file, "-p", PROMPT, "--draft", SAMPLE, "--temperature", "1", "--max-tokens", "2")
    assert "--draft guesses nothing where tokens are drawn at random" in error


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-p", "a", "--draft", "x.gguf", "--no-speculation"], "cannot be used together"),
        (["--input", "rows.jsonl", "--draft", "x.gguf"], "--draft is for --prompt"),
        (["-p", "a", "--draft", "x.gguf"], "there is no draft model x.gguf"),
    ],
)
def test_options_that_do_not_fit_are_refused(
    file: Path, options: list[str], message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["run", str(file), *options]) != 0
    assert message in capfd.readouterr().err
