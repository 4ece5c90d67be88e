"""The configuration: every problem at once, nearest matches, overrides, paths."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from edgetune.config import Config, load_config, parse_config
from edgetune.errors import ConfigError
from edgetune.methods import METHODS
from edgetune.objectives import OTHER_NAMES
from edgetune.section import alternatives, option_names
from tests.project.import_graph import modules, tree

MINIMAL = {"base": "b", "data": {"train": "t.jsonl"}}


def write(folder: Path, text: str) -> Path:
    path = folder / "config.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_minimal_configuration_has_the_documented_defaults() -> None:
    config = parse_config(MINIMAL)
    assert config.quantization.type == "nf4"
    assert config.quantization.double_quant
    assert config.training.optimizer == "paged_adamw_8bit"
    assert config.export.types == ["q4_k_m"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"training": {"epoch": 2}}, "unknown key training.epoch, did you mean training.epochs?"),
        ({"quantisation": {}}, "unknown key quantisation, did you mean quantization?"),
        ({"learning_rate": 1}, "unknown key learning_rate, did you mean training.learning_rate?"),
        ({"zzz": 1}, "known here: adapter, base"),
        (
            {"data": {"train": "t.jsonl", "columns": {"question": "Frage"}}},
            "unknown key data.columns.question (known here: assistant, chosen, content, input, label, messages, ",
        ),
        ({"training": {"learning_rate": -1}}, "training.learning_rate is -1: input should be greater than 0"),
        ({"training": {"optimizer": "adam"}}, "training.optimizer is 'adam'"),
        ({"base": ""}, "base is empty"),
        ({"training": 1}, "training is 1: it is a section of options, such as training.epochs"),
        ({"training": {"epochs": "two"}}, "training.epochs is 'two': give a number"),
        ({"export": {"types": "q8_0"}}, "export.types is 'q8_0': give a list, such as [a, b]"),
        ({"data": {"train": 3}}, "data.train is 3: give a text, or a list of texts"),
        ({"name": "../x"}, "name is '../x': it names the directory runs/NAME and the files in it"),
        ({"name": "a/../../x"}, "it cannot lead out of them"),
        ({"name": " "}, "name is ' '"),
    ],
)
def test_each_problem_names_key_value_and_remedy(change: dict[str, object], said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, **change})
    assert said in caught.value.message
    assert caught.value.exit_code == 2


def test_one_key_for_two_columns_is_refused_without_the_whole_section() -> None:
    columns = {"user": "Frage", "assistant": "Frage"}
    with pytest.raises(ConfigError) as caught:
        parse_config({**MINIMAL, "data": {"train": "t.jsonl", "columns": columns}})
    assert (
        caught.value.message == "the configuration: data.columns names the key 'Frage' twice, as user and as assistant"
    )
    parse_config({**MINIMAL, "data": {"train": "t.jsonl", "columns": {"content": "text", "system": "text"}}})


def test_all_problems_are_shown_together() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config({"data": {"trian": "x"}, "trainig": {}})
    for said in ("base is missing", "data.train is missing", "data.trian", "trainig"):
        assert said in caught.value.message


def test_overrides_reach_nested_options(tmp_path: Path) -> None:
    path = write(tmp_path, "base: b\ndata: {train: t.jsonl}\n")
    config = load_config(path, ["training.learning_rate=2e-4", "export.types=[q8_0, f16]", "name=x"])
    assert config.training.learning_rate == pytest.approx(2e-4)
    assert config.export.types == ["q8_0", "f16"]
    assert config.name == "x"


@pytest.mark.parametrize("override", ["training.epochs", "=3", "base.x=1", "name=[", "training.epchs=2"])
def test_bad_overrides_are_refused(tmp_path: Path, override: str) -> None:
    with pytest.raises(ConfigError):
        load_config(write(tmp_path, "base: b\ndata: {train: t.jsonl}\n"), [override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["training.epchs=2"], "--set training.epchs=2: unknown key training.epchs, did you mean training.epochs?"),
        (["training.epochs=1", "training.epochs=-1"], "--set training.epochs=-1: training.epochs is -1: "),
        (["data.answer=choice"], "--set data.answer=choice: data.answer is choice, but data.choices names "),
        (["training=3"], "--set training=3: training is 3: "),
        (["adapter.r=-3"], "--set adapter.r=-3: adapter.r is -3: "),
        (["adapter.init=pissa", "adapter.r=4"], "--set adapter.init=pissa: adapter.init: pissa moves the base"),
        (["adapter.layers=[]"], "--set adapter.layers=[]: adapter.layers is []: give one or more"),
    ],
)
def test_a_bad_override_is_blamed_on_the_option_and_not_on_the_file(
    tmp_path: Path, overrides: list[str], message: str
) -> None:
    path = write(tmp_path, "base: b\ndata: {train: t.jsonl}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert caught.value.message.startswith(message)
    assert str(path) not in caught.value.message


def test_problems_of_file_and_overrides_are_shown_together_each_with_its_origin(tmp_path: Path) -> None:
    path = write(tmp_path, "base: b\ndata: {train: t.jsonl}\ntraining: {seeed: 1}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, ["training.epochs=-1"])
    first, *lines = caught.value.message.splitlines()
    assert first == f"2 problems in {path}:"
    assert any(line.startswith("  - unknown key training.seeed") for line in lines)
    assert any(line.startswith("  - --set training.epochs=-1: ") for line in lines)


def test_paths_are_relative_to_the_file(tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    (tmp_path / "t.jsonl").touch()
    config = load_config(write(tmp_path, "base: base\ndata: {train: t.jsonl, validation: org/set}\n"))
    assert config.base == str((tmp_path / "base").resolve())
    assert config.data.train == str((tmp_path / "t.jsonl").resolve())
    assert config.data.validation == "org/set"  # not here, so a name on the hub


@pytest.mark.parametrize(
    ("adapter", "said"),
    [
        ({"kind": "lorra"}, "adapter.kind is 'lorra', did you mean lora?"),
        ({"kind": 3}, "adapter.kind is '3': choose from lora, "),
        ({"kind": "ia3", "r": 3}, "unknown key adapter.r (known here: "),
        ({"rr": 3}, "unknown key adapter.rr, did you mean adapter.r?"),
        ({"r": True}, "adapter.r is True: give a number"),
        ({"alpha": float("inf")}, "adapter.alpha is inf: give a finite number"),
        ({"kind": "osf", "effective_rank": -1}, "adapter.effective_rank is -1: input should be greater than"),
        ({"kind": "lokr", "factor": 0}, "adapter.factor is 0: give 1 or more, or -1 for"),
        ({"kind": "layernorm", "target_modules": "norm("}, "'norm(' is no regular expression: missing )"),
        ({"kind": "layernorm", "target_modules": []}, "adapter.target_modules is empty; name norms, or write"),
        ({"rank_pattern": {"q_proj(": 4}}, "adapter.rank_pattern: 'q_proj(' is no regular expression: missing )"),
        ("lora", "adapter is 'lora': it is a section of options, such as adapter.kind"),
    ],
)
def test_problems_of_a_section_with_kinds_name_the_option_without_the_kind(adapter: object, said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        parse_config({**MINIMAL, "adapter": adapter})


@pytest.mark.parametrize("name", OTHER_NAMES)
def test_another_name_of_an_objective_is_explained(name: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"objective.kind is {name!r}: {OTHER_NAMES[name]}")):
        parse_config({**MINIMAL, "objective": {"kind": name}})


@pytest.mark.parametrize("text", ["", "- a\n", "a: [", "\x00"])
def test_files_that_are_no_configuration(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "config.yaml" in caught.value.message
    assert caught.value.hint


def test_every_option_is_documented_where_it_stands() -> None:
    def undocumented(model: type, prefix: str = "") -> list[str]:
        names = []
        for name, field in model.model_fields.items():  # type: ignore[attr-defined]
            nested = alternatives(field)
            for kind, section in nested.items():
                names += undocumented(section, f"{prefix}{name}.{kind}.")
            if not nested and not field.description:
                names.append(prefix + name)
        return names

    assert undocumented(Config) == []
    assert len(set(option_names(Config))) == len(list(option_names(Config)))


def test_every_option_is_read_somewhere() -> None:
    """As `config.option`, `section.option` or, in a method's own module, `self.option`, or by a text of its name.

    Those of `adapter` reach PEFT: tests/training/test_adapters.py.
    """
    read: set[tuple[str, str]] = set()
    texts: set[object] = set()
    for module, file in modules().items():
        if not module.startswith("edgetune.") or module == "edgetune.config":
            continue
        for node in ast.walk(tree(file)):
            if isinstance(node, ast.Attribute):
                owner = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
                if owner != "self" or module.startswith(("edgetune.methods.", "edgetune.objectives.")):
                    read.add((owner, node.attr))
            elif isinstance(node, ast.Constant):
                texts.add(node.value)
    unused = []
    for option in option_names(Config):
        section, _, name = option.rpartition(".")
        if (
            section != "adapter"
            and not {("config", name), (section, name), ("self", name)} & read
            and name not in texts
        ):
            unused.append(option)
    assert not unused, "options that nothing in edgetune/ reads"


def test_a_base_that_is_not_rounded_cannot_be_the_merge_base() -> None:
    with pytest.raises(ConfigError, match=r"export\.merge_base is nf4, but quantization.bits: 16"):
        parse_config({**MINIMAL, "quantization": {"bits": 16}, "export": {"merge_base": "nf4"}})


def test_a_renamed_key_is_read_and_the_file_that_has_it_is_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse_config({**MINIMAL, "export": {"tune": True}}).export.search_types
    assert capsys.readouterr().err == ""  # a stored run is not complained about
    text = "base: b\ndata: {train: t.jsonl}\nexport: {tune: true}\n"
    assert load_config(write(tmp_path, text)).export.search_types
    assert "export.tune is now called export.search_types" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="is the former name of export"):
        parse_config({**MINIMAL, "export": {"tune": True, "search_types": True}})


@pytest.mark.parametrize("option", ["gate.recovery_min", "training.batch_size", "training.learning_rate"])
def test_a_truth_value_is_no_number(option: str, tmp_path: Path) -> None:
    file = tmp_path / "config.yaml"
    file.write_text("base: base\ndata: {train: rows.jsonl}\n")
    with pytest.raises(ConfigError, match=f"{option} is True: give a number"):
        load_config(file, [f"{option}=yes"])


@pytest.mark.parametrize("kind", METHODS)
def test_a_configuration_as_run_json_stores_it_is_read_again(kind: str) -> None:
    fitting = {"quantization": {"bits": 16}, "export": {"formats": []}, "training": {"gradient_checkpointing": False}}
    config = parse_config({**MINIMAL, "adapter": {"kind": kind}, **fitting})
    assert parse_config(config.model_dump(mode="json")) == config


def test_all_contradictions_between_sections_are_named_at_once() -> None:
    options = MINIMAL | {
        "adapter": {"kind": "lora", "use_dora": True, "init": "pissa", "calibration_rows": 8},
        "objective": {"kind": "grpo", "num_generations": 3, "beta": 0.1},
        "quantization": {"bits": 8},
        "export": {"formats": ["gguf-lora"], "merge_base": "nf4"},
    }
    with pytest.raises(ConfigError) as raised:
        parse_config(options, "c.yaml")
    first, *problems = raised.value.message.splitlines()
    assert first == "7 problems in c.yaml:"
    beginnings = (
        "export.merge_base is nf4", "adapter.calibration_rows is used by",
        "export.formats: LoRA is not exported as gguf-lora exactly",
        "adapter.use_dora cannot be trained with quantization.bits: 8", "adapter.init: pissa moves the base",
        "training.batch_size times training.gradient_accumulation is 8", "objective.kind: grpo compares the model",
    )  # fmt: skip
    for problem, beginning in zip(problems, beginnings, strict=True):
        assert problem.startswith(f"  - {beginning}"), problem
