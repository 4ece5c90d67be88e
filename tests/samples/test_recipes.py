"""The recipes: data as generated, every objective and branch of methods has one, and each runs to a validated file."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from edgetune import cli
from edgetune.config import load_config
from edgetune.methods import METHODS
from edgetune.objectives import OBJECTIVES
from edgetune.runs.directory import RunDirectory
from edgetune.validation.results import ValidationResults
from tests.cli_runner import edgetune
from tests.training import runs

SAMPLE = Path(__file__).parents[2] / "samples/recipes"
RECIPES = sorted(path.stem for path in SAMPLE.glob("*.yaml"))
BRANCHES = ("reparametrized", "selective", "additive")
SHORT = {
    "training.max_steps": "2", "training.batch_size": "4", "training.save_steps": "2", "training.eval_steps": "2",
    "reference.rows": "2", "reference.max_new_tokens": "4", "data.max_rows": "16",
}  # fmt: skip
FAST = {"lora"}


def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes_make_data", SAMPLE / "make_data.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_script_writes_the_committed_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    module = script()
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(module, "HERE", tmp_path)
    module.main()
    written = {path.name: path.read_bytes() for path in (tmp_path / "data").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (SAMPLE / "data").iterdir()}


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_is_valid_and_named_like_its_file(name: str) -> None:
    config = load_config(SAMPLE / f"{name}.yaml")
    assert config.name == name
    assert name in (config.adapter.kind, config.objective.kind) or METHODS["lora"].facts == config.adapter.facts


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_passes_a_dry_run(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As committed: on the base of samples/smart-home, with all rows."""
    assert cli.run(["train", str(SAMPLE / f"{name}.yaml"), "-o", str(tmp_path / "run"), "--dry-run"]) == 0
    assert "nothing was written" in " ".join(capsys.readouterr().err.split())


def test_the_usual_methods_have_recipes() -> None:
    usual = {
        "reparametrized": {"lora", "dora", "pissa", "adalora", "loha", "lokr", "oft", "boft", "vera"},
        "additive": {"ia3", "prompt-tuning", "p-tuning", "multitask-prompt-tuning", "prefix-tuning"},
        "selective": {"bitfit", "layernorm", "freeze", "llama-pro", "full", "trainable-tokens"},
    }
    for branch, names in usual.items():
        assert {load_config(SAMPLE / f"{name}.yaml").adapter.facts.taxonomy for name in names} == {branch}


def test_every_objective_and_every_branch_of_methods_has_a_recipe() -> None:
    configs = [load_config(SAMPLE / f"{name}.yaml") for name in RECIPES]
    assert {config.objective.kind for config in configs} == set(OBJECTIVES)
    assert {config.adapter.facts.taxonomy for config in configs} == set(BRANCHES)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.make_base(tmp_path_factory.mktemp("base") / "hf", "float32")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in FAST else pytest.mark.slow) for name in RECIPES]
)
def test_a_recipe_runs_to_a_validated_file(name: str, base: Path, tmp_path: Path) -> None:
    recipe, run = SAMPLE / f"{name}.yaml", tmp_path / "run"
    settings = SHORT | {"base": str(base)}
    if load_config(recipe).objective.facts.generates:  # a random base never answers with the right number
        settings |= {"objective.max_completion_length": "4", "objective.rewards": "[{regex: '[a-m]'}]"}
    if name == "distillation":
        settings |= {"objective.teacher": str(base)}
    options = [part for key, value in settings.items() for part in ("--set", f"{key}={value}")]
    commands: list[list[str | Path]] = [
        ["train", recipe, "-o", run, *options],
        ["merge-export", run, "--allow-fallback"],
    ]
    for command in commands:
        result = edgetune(*command)
        assert result.returncode == 0, result.stderr.decode()
    file = RunDirectory.open(run).artifacts / f"{name}-q8_0.gguf"
    result = edgetune("validate", run, file, "--json", tmp_path / "v.json")
    assert result.returncode in (0, 3), result.stderr.decode()
    rung = ValidationResults.read(tmp_path / "v.json").files[0]
    assert rung.contract is not None
    assert rung.contract.holds
    assert rung.figures.kld.value < 0.05
