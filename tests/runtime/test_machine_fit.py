"""`edgetune fit`: what is measured, what is remembered, and who uses it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from edgetune import cli
from edgetune.runtime import load, probing
from edgetune.runtime.machine_fit import MachineFit, find_fit, fit_file, remember_fit
from edgetune.runtime.probing import RequestSpeed
from tests.converters import tiny

SAMPLE = Path(__file__).parents[2] / "samples/smart-home/smart-home-q4_k_m.gguf"
IDS = tiny.random_ids(40, seed=1)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def fixed_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Speeds by rule: without repacking the prompt is twice as fast, a quantized cache is faster than everything."""

    def measure(path: Path, fit: MachineFit) -> RequestSpeed:
        with load(path, context=64, fit=fit):  # the settings are possible
            return RequestSpeed(100.0 if fit.repacks else 200.0, 9.9 if fit.quantizes_cache else 5.0, 0.1)

    monkeypatch.setattr(probing, "_measure", measure)


def test_what_is_remembered_is_found_again(file: Path, cache: Path) -> None:
    assert find_fit(file) is None
    fit = MachineFit(
        2, repacks=False, flash_attention=False, batch=128, costs=(1.0, 1.5, 2.0, 3.0, 5.0, 9.0), measured=7.5
    )
    assert remember_fit(file, fit).is_relative_to(cache)
    assert find_fit(file) == fit
    assert fit.describe() == "2 threads, weights not repacked, no flash attention, batches of 128"


def test_a_copy_has_the_same_settings_and_another_model_none(file: Path, tmp_path: Path) -> None:
    remember_fit(file, MachineFit(1))
    copy = Path(shutil.copy(file, tmp_path / "copy.gguf"))
    assert find_fit(copy) == MachineFit(1)
    data = bytearray(copy.read_bytes())
    data[-1] ^= 1
    copy.write_bytes(data)
    assert find_fit(copy) is None


@pytest.mark.parametrize(
    "change",
    [{"threads": 0}, {"batch": 9999}, {"costs": [1]}, {"version": 9}, {"repacks": 1}, {"quantizes_cache": True}],
)
def test_damaged_settings_are_not_used(file: Path, change: dict[str, object]) -> None:
    path = remember_fit(file, MachineFit(1))
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    assert find_fit(file) is None
    path.write_text("{")
    assert find_fit(file) is None


@pytest.mark.parametrize(
    "fit",
    [MachineFit(repacks=False), MachineFit(flash_attention=False), MachineFit(batch=128), MachineFit(maps_file=False)],
    ids=lambda fit: fit.describe(),
)
def test_settings_do_not_change_answers(file: Path, fit: MachineFit) -> None:
    with load(file) as plain, load(file, fit=fit) as fitted:
        assert list(fitted.generate(IDS, max_tokens=20)) == list(plain.generate(IDS, max_tokens=20))


def test_threads_of_the_user_go_before_the_fitted_ones(artifact: Path) -> None:
    with load(artifact, fit=MachineFit(2)) as fitted, load(artifact, threads=1, fit=MachineFit(2)) as given:
        assert (fitted.threads, given.threads) == (2, 1)


@pytest.mark.usefixtures("fixed_speed")
def test_the_fastest_settings_that_keep_answers_are_remembered(
    file: Path, capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    assert cli.run(["fit", str(file)]) == 0
    output = capfd.readouterr().out
    fit = find_fit(file)
    assert fit is not None
    assert (fit.repacks, fit.quantizes_cache, fit.batch) == (False, False, 512)
    assert fit.costs is not None
    assert fit.costs[0] == 1
    lines = {line.strip().split("  ")[0]: line for line in output.splitlines()}
    assert "chosen" in lines["weights not repacked"]
    assert "refused for this model" in lines["cache in q8_0"], "its heads have 16 values, and a block has 32"
    assert "not faster by 3 %" in lines["no flash attention"]
    assert "weights not repacked" in next(line for line in lines if line.startswith("best: "))


@pytest.mark.usefixtures("fixed_speed")
def test_what_changes_answers_is_not_chosen() -> None:
    trials = {trial.setting: trial for trial in probing.probe(SAMPLE, lambda _, __: None)}
    cache = trials["cache in q8_0"]
    assert cache.speed is not None
    assert cache.speed.seconds < cache.rival.seconds
    assert not cache.is_chosen


def test_a_file_is_measured(artifact: Path) -> None:
    speed = probing._measure(artifact, MachineFit(1))
    assert min(speed.prompt, speed.answer, speed.load, speed.seconds) > 0
    fit = probing.measure_costs(artifact, MachineFit(1))
    assert fit.measured > 0
    assert (fit.costs is None) == artifact.is_dir(), "batches of rows are those of llama.cpp"


@pytest.mark.usefixtures("fixed_speed")
def test_nothing_is_remembered_after_ctrl_c(file: Path, monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(probing, "measure_costs", interrupt)
    assert cli.run(["fit", str(file)]) == 130
    assert not cache.exists()


def test_run_uses_what_is_remembered_unless_told_not_to(
    file: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    remember_fit(file, MachineFit(2))
    threads = []
    for options in ([], ["--no-fit"], ["--threads", "3"]):
        assert cli.run(["run", str(file), "-p", "dim", "--max-tokens", "3", "-v", *options]) == 0
        threads.append(capfd.readouterr().err.rpartition("(")[2].split()[0])
    assert threads == ["2", "1", "3"]
    assert fit_file(file).is_file()
