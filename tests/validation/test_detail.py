"""The spread of a file's KL divergences and its worst rows, against the arrays that they were taken from."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from edgetune import console
from edgetune.reference.scored_rows import ScoredRows
from edgetune.reference.store import Reference
from edgetune.runs.directory import RunDirectory
from edgetune.runtime import Runtime, load
from edgetune.validation import detail
from edgetune.validation.metrics import TokenScores
from edgetune.validation.results import KldDetail
from edgetune.validation.scoring import score
from tests.validation.runs import held_out, make_run


def measured(run: RunDirectory, file: Path) -> tuple[Runtime, Reference, TokenScores]:
    reference = Reference.open(run.reference)
    runtime = load(file)
    with console.count_progress("score") as progress:
        return runtime, reference, score(runtime, reference, reference.rows, progress)


@pytest.fixture(scope="module", params=["u16", "top_k"])
def found(
    request: pytest.FixtureRequest, base: Path, whole: Path, coarse: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[KldDetail, Reference, TokenScores]:
    limit = 8192 if request.param == "u16" else 10
    rows = held_out(7, 225)
    run = make_run(tmp_path_factory.mktemp("detail") / "run", base, whole, rows=rows, full_vocabulary_limit=limit)
    runtime, reference, scored = measured(run, coarse)
    with runtime:
        return detail.measure_detail(runtime, reference, reference.rows, scored), reference, scored


def test_the_histogram_counts_every_token(
    found: tuple[KldDetail, Reference, TokenScores],
) -> None:
    histogram, kld = found[0].kld_histogram, found[2].kld
    assert histogram is not None
    assert sum(histogram.counts) == len(kld)
    for low, high, count in zip(*itertools.tee(histogram.edges), histogram.counts, strict=False):
        assert low <= high
        assert count >= 0
    middle = len(detail.EDGES) // 2
    below = sum(histogram.counts[:middle])
    assert below == int((kld < detail.EDGES[middle]).sum())


@pytest.mark.parametrize("value", [0.0, 1e-12, 1e3, math.inf])
def test_the_histogram_has_room_for_everything(value: float) -> None:
    counts = detail.histogram(np.array([value, 1e-3, math.nan])).counts
    assert sum(counts) == 2
    assert counts[0] + counts[-1] == 1


@pytest.mark.parametrize(
    ("kld", "share"),
    [([1.0] * 200, 0.01), ([0.0] * 99 + [5.0], 1.0), ([3.0, 1.0], 0.75), ([0.0, 0.0], None), ([math.inf, 1.0], None)],
)
def test_the_share_of_the_worst_hundredth(kld: list[float], share: float | None) -> None:
    assert detail.worst_percent_share(np.array(kld)) == share


def test_the_worst_rows_come_first(found: tuple[KldDetail, Reference, TokenScores]) -> None:
    means = [float(found[2].kld[scored].mean()) for _, _, scored in found[1].rows]
    shown = [int(row.row) for row in found[0].worst_rows]
    assert shown == sorted(range(len(means)), key=lambda row: -means[row])[: detail.WORST_ROWS]
    assert [row.mean_kld for row in found[0].worst_rows] == pytest.approx([means[r] for r in shown], rel=5e-3)


def test_a_row_holds_its_worst_token_and_what_was_measured(
    found: tuple[KldDetail, Reference, TokenScores],
) -> None:
    content, reference, scored = found
    rows = list(reference.rows)
    for row in content.worst_rows:
        ids, positions, part = rows[row.row]
        columns: list[Sequence[object]] = [row.texts, row.kld, row.p_trained, row.p_file]
        assert {len(column) for column in columns} == {min(len(ids), detail.WINDOW)}
        exact = dict(zip(positions - row.first, scored.kld[part], strict=True))
        scored_places = [place for place, value in enumerate(row.kld) if not math.isnan(value)]
        assert scored_places == [int(place) for place in exact if 0 <= place < len(row.kld)]
        assert max(row.kld[place] for place in scored_places) == row.max_kld
        assert all(row.kld[place] == pytest.approx(exact[place], rel=5e-3) for place in scored_places)


def test_the_candidates_are_both_models_likeliest_tokens(
    found: tuple[KldDetail, Reference, TokenScores], coarse: Path
) -> None:
    content, reference, scored = found
    rows = list(reference.rows)
    with load(coarse) as runtime:
        for row in content.worst_rows:
            ids, positions, part = rows[row.row]
            logits = np.concatenate([block.copy() for block in runtime.score(ids, positions)]).astype(np.float64)
            assert len(row.candidates) == detail.POSITIONS
            for place, each in row.candidates.items():
                index = int(np.searchsorted(positions, int(place) + row.first))
                tops = [int(reference.trained_top[part][index]), int(scored.top[part][index])]
                assert [each.trained[0][0], each.file[0][0]] == list(detail.token_texts(runtime, tops))
                expected = np.sort(np.exp(logits[index] - np.logaddexp.reduce(logits[index])))[::-1]
                assert [share for _, share in each.file] == pytest.approx(expected[: detail.CANDIDATES], abs=6e-5)
                shares = [share for _, share in each.trained]
                assert shares == sorted(shares, reverse=True)
                assert shares[0] >= row.p_trained[int(place)] - 6e-4


def test_a_row_of_one_scored_token(base: Path, whole: Path, coarse: Path, tmp_path: Path) -> None:
    rows = ScoredRows(held_out(1).tokens, held_out(1).row_offsets, np.array([5]))
    runtime, reference, scored = measured(make_run(tmp_path / "run", base, whole, rows=rows), coarse)
    with runtime:
        (row,) = detail.measure_detail(runtime, reference, reference.rows, scored).worst_rows
    assert list(row.candidates) == ["5"]


def test_bytes_that_are_no_character_are_shown_in_hexadecimal(coarse: Path) -> None:
    with load(coarse) as runtime:
        ids = runtime.tokenize("把👍🏽")
        texts = list(detail.token_texts(runtime, ids))
    assert any(text.startswith("⟨") for text in texts)
    assert all(text == text.encode("utf-8").decode() for text in texts)
