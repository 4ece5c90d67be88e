"""The command line as a whole: the lazy table, errors as sentences, exit codes."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import click
import pytest

from edgetune import cli
from edgetune.errors import ConfigError, EdgetuneError, GateFailure


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_every_command_has_a_help_that_ends_with_an_example(name: str) -> None:
    command = cli.cli.get_command(click.Context(cli.cli), name)
    assert command is not None
    assert command.name == name, f'edgetune/commands: decorate the function with @click.command(name="{name}")'
    assert command.get_short_help_str(limit=100) == cli.COMMANDS[name]
    last = (command.help or "").strip().rsplit("\n\n", 1)[-1]
    assert f"edgetune {name}" in last, f"the help of {name} does not end with an example"
    assert command.epilog is not None
    assert "docs/concepts.md" in command.epilog


def test_the_table_of_commands_is_the_folder_of_commands() -> None:
    folder = Path(cli.__file__).parent / "commands"
    assert {path.stem.replace("_", "-") for path in folder.glob("[!_]*.py")} == set(cli.COMMANDS)


def test_completion_shows_the_summaries_and_imports_no_command() -> None:
    script = """
import sys
from click.shell_completion import ShellComplete
from edgetune import cli
found = ShellComplete(cli.cli, {}, "edgetune", "_EDGETUNE_COMPLETE").get_completions([], sys.argv[1])
assert {item.value: item.help for item in found} == {
    name: line for name, line in cli.COMMANDS.items() if name.startswith(sys.argv[1])
}, found
print(len(found), "numpy" in sys.modules, any(name.startswith("edgetune.commands.") for name in sys.modules))
"""
    for incomplete in ("", "re"):
        count = sum(name.startswith(incomplete) for name in cli.COMMANDS)
        result = subprocess.run([sys.executable, "-c", script, incomplete], capture_output=True, text=True)
        assert result.stdout.split() == [str(count), "False", "False"], result.stderr


def raising(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> None:
    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(cli.cli, "main", fail)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (EdgetuneError("the base b.bin is a pickle", "Convert it."), 1, "the base b.bin is a pickle"),
        (ConfigError("unknown key x"), 2, "unknown key x"),
        (GateFailure("mean KLD 0.2 exceeds 0.1"), 3, "mean KLD 0.2"),
        (OSError(errno.ENOSPC, "No space left on device", "out.gguf"), 1, "out.gguf: no space left on device"),
        (MemoryError(), 1, "not enough memory"),
        (KeyboardInterrupt(), 130, "stopped"),
        (click.Abort(), 130, "stopped"),
        (click.UsageError("No such command 'x'."), 2, "No such command"),
    ],
)
def test_errors_become_one_sentence_and_a_code(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, said: str
) -> None:
    raising(monkeypatch, error)
    assert cli.run([]) == code
    captured = capsys.readouterr()
    assert said in captured.err
    assert captured.out == ""


def test_a_bug_is_not_dressed_up_as_bad_input(monkeypatch: pytest.MonkeyPatch) -> None:
    raising(monkeypatch, AssertionError("a bug"))
    with pytest.raises(AssertionError, match="a bug"):
        cli.run([])


def test_unknown_command_exits_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["trian"]) == 2
    assert "trian" in capsys.readouterr().err


def test_version_prints_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["--version"]) == 0
    assert "edgetune" in capsys.readouterr().out


def test_missing_config_is_a_sentence(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert cli.run(["make-rules", str(tmp_path / "no.yaml")]) == 2
    assert "there is no configuration file" in capsys.readouterr().err
