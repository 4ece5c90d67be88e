"""Virtual tokens of PEFT: soft prompts, which are vectors in place of embeddings, and prefixes of keys and values.

Prompt tuning (arXiv:2104.08691), P-tuning (arXiv:2103.10385), multitask prompt tuning (arXiv:2303.02861) and CPT
(arXiv:2410.17222) all end as a matrix [n, hidden] in front of the embeddings of a text. PEFT stores it as
`prompt_embeddings`: of P-tuning the output of the encoder, of multitask prompt tuning the factor that the tasks share.
Prefix tuning (arXiv:2101.00190, arXiv:2110.07602) stores the output of its encoder under the same name.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.directory import find_adapter
from edgetune_converters.adapters.lora import LORA
from edgetune_converters.adapters.matching import Kind
from edgetune_converters.adapters.peft_config import CONFIG_FILE
from edgetune_converters.adapters.state_dict import AdapterTensors
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.files.contents import read_json
from edgetune_converters.tensors import ALL, F32, TensorInfo

EMBEDDINGS, COLUMNS, ROWS = "prompt_embeddings", "prefix_task_cols", "prefix_task_rows"
MULTITASK = "MULTITASK_PROMPT_TUNING"
PREFIX = "PREFIX_TUNING"
# peft_type -> the tensors that PEFT stores
KINDS: Mapping[str, tuple[str, ...]] = {
    "PROMPT_TUNING": (EMBEDDINGS,),
    "P_TUNING": (EMBEDDINGS,),
    "CPT": (EMBEDDINGS,),
    MULTITASK: (EMBEDDINGS, COLUMNS, ROWS),
}
_AGAIN = "Save it again from the trained model: model.save_pretrained(DIR)"


class VirtualTokenAdapter(Adapter):
    """An adapter directory with virtual tokens, which changes no tensor of the base. Raises AdapterError."""

    def __init__(self, path: Path, tensors: tuple[str, ...]) -> None:
        """Open the adapter, whose tensors must be these."""
        super().__init__(path)
        self.peft_type = str(self.config.peft_type)
        expected, found = set(tensors), set(self.file.tensors)
        problems = [f"{self.path} has no {name}" for name in sorted(expected - found)]
        problems += [f"{name} is not a tensor of {self.peft_type}" for name in sorted(found - expected)]
        if problems:
            raise AdapterError.of_many(f"problems with the adapter {self.path}", problems, _AGAIN)

    def _find_kind(self) -> Kind:
        """The kind of an adapter without modules; all fields had their effect in training."""
        return Kind(LORA.names, lambda module: (), frozenset(self.config.raw))

    def read_embeddings(self) -> F32:
        """Return `prompt_embeddings`, f32 [n, k] for n virtual tokens."""
        values = self.read_finite(self.file.tensors[EMBEDDINGS])
        stated = self.config.raw.get("num_virtual_tokens")
        if values.ndim != 2 or len(values) != stated or not len(values):
            raise AdapterError(
                f"{EMBEDDINGS} of {self.path} has the shape {list(values.shape)}; {CONFIG_FILE} states "
                f"num_virtual_tokens {stated!r}",
                _AGAIN,
            )
        return values

    def read_finite(self, info: TensorInfo) -> F32:
        """Return a tensor in f32. Raises AdapterError for NaN and infinity."""
        flat = self.file.rows(info, ALL)
        if not np.isfinite(flat).all():
            raise AdapterError(f"{info.name} of {self.path} holds NaN or infinity", "Train again at a lower rate")
        return flat.reshape(info.shape)

    def tensors(self, base: BaseTargets) -> AdapterTensors:
        return AdapterTensors()

    def changes(self, base: BaseTargets) -> dict[str, Change]:
        """Return no change: virtual tokens come before the texts."""
        return {}


class SoftPromptAdapter(VirtualTokenAdapter):
    """An adapter directory with a soft prompt.

    Attributes:
        values: The virtual tokens as PEFT puts them before a text, f32 [n, hidden].
    """

    def __init__(self, path: Path, peft_type: str, task: int | None = None) -> None:
        """Read the adapter.

        Args:
            path: The directory that PEFT wrote.
            peft_type: One of `KINDS`.
            task: The task of multitask prompt tuning; None for the only one.

        Raises:
            AdapterError: Tensors are missing, unknown, of the wrong shape or not finite, or the task is not one of it.
        """
        super().__init__(path, KINDS[peft_type])
        self.values = self._read_values(task)

    @property
    def count(self) -> int:
        """The number of virtual tokens."""
        return len(self.values)

    def _read_values(self, task: int | None) -> F32:
        values = self.read_embeddings()
        if self.peft_type == MULTITASK:
            return values * self._task_factor(task, values.shape)
        if task is not None:
            raise AdapterError(
                f"a task was named, and the adapter {self.path} is of the kind {self.peft_type}, without tasks"
            )
        return values

    def _task_factor(self, task: int | None, shape: tuple[int, ...]) -> F32:
        """The factor [n, hidden] of a task: columns [tasks, n, rank] times rows [tasks, rank, hidden]."""
        columns, rows = (self.read_finite(self.file.tensors[name]) for name in (COLUMNS, ROWS))
        tasks = len(columns)
        fits = columns.ndim == rows.ndim == 3 and (*columns.shape[::2], *rows.shape[::2])[:3:2] == (tasks, len(rows))
        if not fits or (columns.shape[1], rows.shape[2]) != shape or columns.shape[2] != rows.shape[1]:
            raise AdapterError(
                f"{COLUMNS} {list(columns.shape)} and {ROWS} {list(rows.shape)} of {self.path} do not fit "
                f"{EMBEDDINGS} {list(shape)}",
                _AGAIN,
            )
        if task is None and tasks > 1:
            raise AdapterError(
                f"the adapter {self.path} has the prompts of {tasks} tasks, and a file holds one",
                f"Name the task with --prompt-task, 0 to {tasks - 1}",
            )
        number = task or 0
        if not 0 <= number < tasks:
            raise AdapterError(
                f"the adapter {self.path} has no task {number}", f"Give --prompt-task a number from 0 to {tasks - 1}"
            )
        factor: F32 = columns[number] @ rows[number]
        return factor


class PrefixAdapter(VirtualTokenAdapter):
    """An adapter directory of prefix tuning: keys and values of every layer, in front of those of a text.

    PEFT puts them into the cache as they are: no norm and no rotation applies to them, and a text begins at the
    position behind them.

    Attributes:
        states: Keys and values by layer, f32 [layers, 2, heads, n, head_dim].
    """

    def __init__(self, path: Path) -> None:
        """Read the adapter. Raises AdapterError."""
        super().__init__(path, (EMBEDDINGS,))
        values = self.read_embeddings()
        layers, heads, width = (
            self.config.integer(name) for name in ("num_layers", "num_attention_heads", "token_dim")
        )
        if not heads or width % heads or values.shape[1] != 2 * layers * width:
            raise AdapterError(
                f"{EMBEDDINGS} of {self.path} has rows of {values.shape[1]} numbers, which are not keys and values of "
                f"{layers} layers, {heads} heads and {width} numbers in all",
                _AGAIN,
            )
        by_layer = values.reshape(len(values), layers, 2, heads, width // heads)
        self.states: F32 = np.ascontiguousarray(by_layer.transpose(1, 2, 3, 0, 4))

    @property
    def count(self) -> int:
        """The number of virtual tokens."""
        return int(self.states.shape[3])


def stated_kind(path: Path) -> str | None:
    """Return the peft_type of an adapter directory; None where it cannot be read."""
    try:
        found = read_json(find_adapter(path).path / CONFIG_FILE).get("peft_type")
    except (AdapterError, CheckpointError):
        return None
    return found if isinstance(found, str) else None


def open_adapter(path: Path, task: int | None = None) -> Adapter:
    """Open an adapter directory of any kind that is exported. Raises AdapterError.

    Args:
        path: The directory that PEFT wrote.
        task: The task of multitask prompt tuning; None for the only one.
    """
    kind = stated_kind(path)
    if kind is not None and kind in KINDS:
        return SoftPromptAdapter(path, kind, task)
    if task is not None:
        raise AdapterError(
            f"--prompt-task {task} names a task of multitask prompt tuning, and the adapter {path} has none",
            "Leave it out",
        )
    if kind == PREFIX:
        return PrefixAdapter(path)
    return Adapter(path)
