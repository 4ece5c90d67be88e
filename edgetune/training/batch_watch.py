"""The batches of the current optimizer step, kept so that those of a diverged one can be looked at."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from edgetune_converters.files import atomic


class BatchWatch(TrainerCallback):  # type: ignore[misc]  # transformers is not typed
    """Keeps references to the micro-batches of one step, and their losses."""

    def __init__(self) -> None:
        self._batches: list[tuple[Any, float]] = []

    def attach(self, trainer: Any) -> None:
        """Follow the steps of a trainer."""
        step = trainer.training_step

        def watched(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            loss = step(model, inputs, *args, **kwargs)
            self._batches.append((inputs, loss.detach()))
            return loss

        trainer.training_step = watched
        trainer.add_callback(self)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget the step before."""
        self._batches.clear()

    def save(self, path: Path, tokenizer: Any) -> int:
        """Write the rows of the step as JSON lines, those of a micro-batch whose loss is no number first.

        Args:
            path: The file.
            tokenizer: Decodes token ids.

        Returns:
            The number of rows.
        """
        lines = []
        ordered = sorted(self._batches, key=lambda each: math.isfinite(float(each[1])))
        for number, (inputs, loss) in enumerate(ordered):
            value = float(loss)
            for row in _rows(inputs):
                entry = {
                    "micro_batch": number,
                    "loss": value if math.isfinite(value) else str(value),
                    "tokens": len(row),
                    "text": tokenizer.decode(row),
                    "ids": row,
                }
                lines.append(json.dumps(entry, ensure_ascii=False) + "\n")
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            atomic.write_text(path, "".join(lines))
        return len(lines)


def _rows(inputs: Any) -> list[list[int]]:
    """Return the token ids of the rows of a batch, without padding where the batch states it."""
    ids = next((inputs[key] for key in inputs if key.endswith("input_ids") and hasattr(inputs[key], "tolist")), None)
    if ids is None:
        return []
    attended = inputs.get("attention_mask")
    if attended is None or attended.shape != ids.shape:
        return [[int(each) for each in row] for row in ids.tolist()]
    return [row[mask.bool()].tolist() for row, mask in zip(ids, attended, strict=True)]
