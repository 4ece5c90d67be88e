"""Training beside plain TRL + PEFT + bitsandbytes: `make bench-train`.

Both train the same LoRA on the same NF4 base, on the same rows in the same order, with equal losses: TRL's SFTTrainer
as its documentation shows it, and the loop of `edgetune train`. Each training is a process of its own, and they take
turns. The first step of each is not counted. A token is one of a row; padding is none.

    make bench-train                                                     # the base of samples/smart-home
    make bench-train ARGS='--sample smollm2 --base build/smollm2 --batch 8'

TRL cannot train from a GGUF file. `edgetune merge-export --base FILE --format safetensors -q f32 -o build/smollm2`
writes the directory of such a file.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
SIDES = ("edgetune", "trl")


def main() -> None:
    arguments = _parser().parse_args()
    if arguments.side:
        print(json.dumps(_SIDES[arguments.side](arguments)))
        return
    measured: dict[str, list[dict[str, Any]]] = {side: [] for side in arguments.sides.split(",")}
    for _ in range(arguments.rounds):
        for side, found in measured.items():
            command = [sys.executable, "-m", "tests.bench.bench_train", *sys.argv[1:], "--side", side]
            child = subprocess.run(command, capture_output=True, text=True, check=False)
            if child.returncode:
                sys.exit(f"{side} failed:\n{child.stderr[-2000:]}")
            found.append(json.loads(child.stdout.splitlines()[-1]))
            print(f"{side}: {found[-1]}", file=sys.stderr, flush=True)
    print(format_table(measured))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sample", default="smart-home", choices=["smart-home", "smollm2"])
    parser.add_argument("--base", help="model directory in place of the sample's base")
    parser.add_argument("--batch", type=int, help="rows of a step; default: those of the sample")
    parser.add_argument("--steps", type=int, default=6, help="counted steps")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--sides", default=",".join(SIDES))
    parser.add_argument("--set", action="append", default=[], help="key=value for the configuration of edgetune")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)
    return parser


def format_table(measured: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """Return the Markdown table of the medians, each beside that of the last side."""
    columns = ("tokens/s", "tokens per processor second", "peak MB", "peak MB with loading", "loss")
    medians = {
        side: {column: statistics.median(each[column] for each in found) for column in columns}
        for side, found in measured.items()
    }
    lines = [f"| | {' | '.join(medians)} | ratio |", "| --- |" + " --- |" * (len(medians) + 1)]
    for column in columns:
        values = [found[column] for found in medians.values()]
        form = "{:.4f}" if column == "loss" else "{:,.0f}"
        lines.append(f"| {column} | {' | '.join(map(form.format, values))} | {values[0] / values[-1]:.2f} |")
    return "\n".join(lines)


# -- what both sides train on ------------------------------------------------------------------------------------------


def _configuration(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the sample's configuration for the counted steps and one before them."""
    folder = ROOT / "samples" / arguments.sample
    stated: dict[str, Any] = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
    stated["base"] = arguments.base or str(folder / "base")
    for split in ("train", "validation", "test"):
        stated["data"][split] = str(folder / stated["data"][split])
    training = stated["training"]
    training["batch_size"] = arguments.batch or training["batch_size"]
    steps = arguments.steps + 1
    stated["data"]["max_rows"] = steps * training["batch_size"]
    training.pop("gradient_checkpointing", None)
    return {**stated, "training": {**training, "epochs": 1, "eval_steps": 10**6, "save_steps": 10**6}}


def _prepare(arguments: argparse.Namespace) -> Any:
    from edgetune.config import load_config
    from edgetune.planning.prepare import prepare_run

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "config.yaml"
        path.write_text(yaml.safe_dump(_configuration(arguments)))
        return prepare_run(load_config(path, arguments.set))


def _memory_peak() -> float:
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return float(next(line.split()[1] for line in lines if line.startswith("VmHWM"))) / 1e3


def _clock(rows: Sequence[Sequence[int]]) -> Any:
    """Return a callback that measures the steps after the first."""
    from transformers import TrainerCallback

    class Clock(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
        def __init__(self) -> None:
            self.marks: list[tuple[float, float]] = []
            self.losses: list[float] = []

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.loaded = _memory_peak()
            Path("/proc/self/clear_refs").write_text("5")

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.marks.append((time.perf_counter(), time.process_time()))

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            if logs and "loss" in logs:
                self.losses.append(logs["loss"])

        def result(self) -> dict[str, float]:
            share = (len(self.marks) - 1) / len(self.marks)  # rows are shuffled: the first step has an average share
            tokens = sum(map(len, rows)) * share
            wall, processor = (self.marks[-1][which] - self.marks[0][which] for which in (0, 1))
            peak = _memory_peak()
            return {
                "tokens/s": tokens / wall,
                "tokens per processor second": tokens / processor,
                "peak MB": peak,
                "peak MB with loading": max(
                    peak, self.loaded, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
                ),
                "loss": statistics.fmean(self.losses),
            }

    return Clock()


# -- the sides ---------------------------------------------------------------------------------------------------------


def _train_edgetune(arguments: argparse.Namespace) -> dict[str, float]:
    """Train as `edgetune train` does, without the capture that follows."""
    from edgetune.training import environment

    with environment.silence_libraries():  # whose settings OpenMP reads when torch is imported
        return _train_in_silence(arguments)


def _train_in_silence(arguments: argparse.Namespace) -> dict[str, float]:
    from edgetune.planning.disk import count_adapter_parameters
    from edgetune.planning.memory import choose_layout
    from edgetune.runs.directory import RunDirectory
    from edgetune.training import fit
    from edgetune.training.loading import arithmetic
    from edgetune.training.processor import free_memory

    prepared = _prepare(arguments)
    clock = _clock([row.input_ids for row in prepared.train.rows])
    adapter_parameters = count_adapter_parameters(prepared.base.checkpoint, prepared.config.adapter)
    with tempfile.TemporaryDirectory() as folder:
        run = RunDirectory.create(Path(folder) / "run")
        run.update_manifest(config=prepared.config.model_dump(mode="json"))
        build = fit._build
        fit._build = lambda inputs: build(replace(inputs, callbacks=[*inputs.callbacks, clock]))
        layout = choose_layout(prepared, adapter_parameters, arithmetic(prepared.config), free_memory())
        fit.train_or_load_adapter(run, prepared, layout)
    figures: dict[str, float] = clock.result()
    return figures


def _train_trl(arguments: argparse.Namespace) -> dict[str, float]:
    """Train with SFTTrainer as its documentation shows QLoRA, in float32 where the processor emulates bfloat16."""
    import torch  # noqa: TID251 - what is measured
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
    from trl import SFTConfig, SFTTrainer

    from edgetune.training.environment import emulates_bfloat16

    prepared = _prepare(arguments)
    config, rows = prepared.config, prepared.train.rows
    dtype = torch.float32 if emulates_bfloat16() else torch.bfloat16
    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(str(prepared.base.path), quantization_config=quantization, dtype=dtype)
    table = {
        "input_ids": [row.input_ids for row in rows],
        "completion_mask": [[int(each) for each in row.supervised] for row in rows],
    }
    clock = _clock([row.input_ids for row in rows])
    training, adapter = config.training, config.adapter
    with tempfile.TemporaryDirectory() as folder:
        trainer = SFTTrainer(
            model=model,
            args=SFTConfig(
                output_dir=folder, num_train_epochs=1, per_device_train_batch_size=training.batch_size,
                learning_rate=training.learning_rate, lr_scheduler_type=training.scheduler,
                warmup_steps=training.warmup_ratio, optim=training.optimizer, logging_steps=1, save_strategy="no",
                report_to="none", disable_tqdm=True, bf16=dtype is torch.bfloat16,
                use_cpu=not torch.cuda.is_available(), seed=training.seed, data_seed=training.seed,
                max_length=None, completion_only_loss=True,
            ),
            train_dataset=Dataset.from_dict(table),
            processing_class=AutoTokenizer.from_pretrained(str(prepared.base.path)),
            peft_config=LoraConfig(
                r=adapter.r, lora_alpha=adapter.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
            callbacks=[clock],
        )  # fmt: skip
        trainer.train()
    figures: dict[str, float] = clock.result()
    return figures


_SIDES = {"edgetune": _train_edgetune, "trl": _train_trl}

if __name__ == "__main__":
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    main()
