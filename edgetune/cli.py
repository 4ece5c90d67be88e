"""The command line: a click group that imports a command only when it is used.

`edgetune --help` and shell completion must be instant. Therefore the one-line summaries are declared here, and neither
numpy nor torch is imported.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Callable, Sequence

import click
from click.shell_completion import CompletionItem

COMMANDS = {
    "plan": "Show what a training and its files will take: memory, disk, time, sizes.",
    "train": "Fine-tune a base model with QLoRA and capture its reference outputs.",
    "adopt": "Make a run directory around an adapter that another program trained.",
    "preview": "Show rendered rows and the tokens that are trained on.",
    "merge-export": "Merge an adapter into its base and write GGUF, ONNX or safetensors.",
    "run": "Answer a prompt with an exported file, on the CPU.",
    "chat": "Chat with an exported file in the terminal.",
    "serve": "Answer clients of OpenAI, Anthropic and Ollama with exported files, on the CPU.",
    "bench": "Measure the speed of an exported file on this machine.",
    "fit": "Measure how an exported file runs fastest on this machine, and remember it.",
    "reference": "Recapture the reference outputs (other rows, full vocabulary, merged model).",
    "validate": "Measure exported files against the trained model; check thresholds.",
    "evaluate": "Score a trained model and its exported files on tasks of lm-evaluation-harness.",
    "report": "Show a run and its validated files on one HTML page.",
    "verify": "Verify an exported file using only what is embedded in it.",
    "card": "Write a Hugging Face model card for exported files.",
    "inspect": "Show what is in an exported file or a run directory.",
    "make-rules": "Print the pipeline of a configuration as rules for GNU make.",
    "doctor": "Check this machine: versions, CPU features, GPU, disk.",
}
"""Command -> one-line summary, in the order of the work: the only declaration of both."""

TERMS = "Terms such as reference, ladder, gate and merge base are explained in docs/concepts.md."


class LazyGroup(click.Group):
    """A group whose commands are modules `edgetune.commands.NAME`, each with a click command called `command`."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order of the work."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of the command, and give the command its summary."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module("edgetune.commands." + cmd_name.replace("-", "_"))
        command: click.Command = module.command
        command.short_help = COMMANDS[cmd_name]
        command.epilog = TERMS
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the summaries without importing a command."""
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Complete names of commands without importing a command."""
        commands = [CompletionItem(name, help=line) for name, line in COMMANDS.items() if name.startswith(incomplete)]
        return [*commands, *click.Command.shell_complete(self, ctx, incomplete)]


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]}, epilog=TERMS)
@click.version_option(package_name="edgetune", prog_name="edgetune")
def cli() -> None:
    """Fine-tune a language model on a GPU, run it on a CPU, and prove that the exported file is what was trained.

    \b
    edgetune train config.yaml -o runs/mine
    edgetune merge-export runs/mine --format gguf -q q4_k_m
    edgetune validate runs/mine runs/mine/artifacts/mine-q4_k_m.gguf
    edgetune run runs/mine/artifacts/mine-q4_k_m.gguf -p "dim the bedroom lights"
    """


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line and exit with its code."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; print an expected failure as one sentence and a hint."""
    from edgetune import console

    try:
        with console.notices():
            result = cli.main(args=list(arguments) if arguments is not None else None, standalone_mode=False)
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except Exception as error:  # noqa: BLE001 - raised again unless the table below explains it
        return _report(error)
    except KeyboardInterrupt:
        return _interrupted()
    return result if isinstance(result, int) else 0


def _report(error: Exception) -> int:
    if isinstance(error, click.Abort):
        return _interrupted()
    for kind, explain in _explanations():
        if isinstance(error, kind):
            from edgetune import console

            message, hint, code = explain(error)
            console.fail(message, hint)
            return code
    raise error


def _interrupted() -> int:
    click.echo("\nstopped; no incomplete file was left behind", err=True)
    return 130


Explanation = tuple[str, str | None, int]


def _explanations() -> list[tuple[type[Exception], Callable[..., Explanation]]]:
    from edgetune.errors import EdgetuneError

    return [
        (EdgetuneError, lambda error: (error.message, error.hint, error.exit_code)),
        (OSError, _explain_os_error),
        (MemoryError, lambda error: ("there is not enough memory", "Close other programs, or use a smaller model", 1)),
    ]


def _explain_os_error(error: OSError) -> Explanation:
    import errno

    hints = {
        errno.ENOSPC: "Free some space, or write elsewhere with -o",
        errno.EACCES: "Check the permissions, or write elsewhere with -o",
        errno.EROFS: "Write elsewhere with -o",
        errno.EDQUOT: "Free some space, or write elsewhere with -o",
    }
    # the name that was asked for, not the temporary one that would have been renamed to it
    where = re.sub(r"(\.\d+)?\.partial$", "", str(error.filename)) + ": " if error.filename else ""
    return where + (error.strerror or str(error)).lower(), hints.get(error.errno or 0), 1


if __name__ == "__main__":
    main()
