"""Encoded rows of each objective, made of the conversations of a prepared run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from edgetune.config import parse_config
from edgetune.data.dataset import EncodedSplit
from edgetune.data.masks import encode_conversation
from edgetune.data.objective_rows import EncodedAnswer, EncodedLabelled, EncodedPair
from edgetune.planning.prepare import PreparedRun, prepare_run
from edgetune.training import adapters, environment
from edgetune.training.loading import load_model, load_tokenizer
from edgetune.training.objectives import TrainerInputs, build_trainer
from tests.training import runs

FLOAT32 = {"bits": 16, "compute_dtype": "float32"}


def settings(base: Path, folder: Path, objective: dict[str, Any], **training: Any) -> dict[str, Any]:
    values = runs.settings(base, folder, **training)
    return {**values, "objective": objective, "quantization": FLOAT32}


def prepare(values: dict[str, Any]) -> PreparedRun:
    """Prepare the run, and give its splits the rows of every objective."""
    config = parse_config(values)
    prepared = prepare_run(parse_config({**values, "objective": {"kind": "sft"}}))
    for split in (prepared.train, prepared.validation):
        _add_rows(prepared, split)
    return replace(prepared, config=config)


def _add_rows(prepared: PreparedRun, split: EncodedSplit) -> None:
    for number, chat in enumerate(split.chats):
        question, answer = chat.messages[0], chat.messages[1]["content"]
        wrong = next(colour for colour in runs.COLOURS if colour != answer)
        good, bad = (_encode(prepared, question, text) for text in (answer, f"{wrong} {wrong}"))
        split.pairs.append(EncodedPair(good, bad))
        split.labelled.append(EncodedLabelled(bad if number % 3 == 0 else good, number % 3 != 0))


def _encode(prepared: PreparedRun, question: dict[str, Any], answer: str) -> EncodedAnswer:
    messages = [question, {"role": "assistant", "content": answer}]
    (row,) = encode_conversation(prepared.template, prepared.tokenizer, messages).rows
    return EncodedAnswer(row, row.supervised.index(True))


@environment.silence_libraries()
def trainer_of(prepared: PreparedRun, directory: Path) -> Any:
    """Return the trainer of the prepared run's objective."""
    model = adapters.add_adapter(load_model(prepared.base, prepared.config), prepared.config.adapter)
    return build_trainer(TrainerInputs(model, load_tokenizer(prepared), prepared, directory))
