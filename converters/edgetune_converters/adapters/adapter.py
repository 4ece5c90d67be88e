"""A PEFT adapter directory, as the change of each tensor of a base."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np

from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.directory import find_adapter
from edgetune_converters.adapters.expert_factors import StackCache
from edgetune_converters.adapters.kinds import KINDS, kind_of
from edgetune_converters.adapters.matching import NO_TEXT, AdapterParts, Kind, layers
from edgetune_converters.adapters.peft_config import CONFIG_FILE, PeftConfig
from edgetune_converters.adapters.products import is_zero_product
from edgetune_converters.adapters.state_dict import AdapterTensors, read_tensors
from edgetune_converters.adapters.weights import AdapterWeights, open_weights
from edgetune_converters.adapters.whole_tensors import MERGED_BY_PEFT
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.tensors import ALL, TensorInfo


class Adapter:
    """A PEFT adapter directory. Raises AdapterError when it is missing, damaged or of a kind that cannot be merged."""

    def __init__(self, path: Path) -> None:
        try:
            place = find_adapter(path)
            self.config = PeftConfig(place.path / place.config)
            self.file = open_weights(place.weights)
        except CheckpointError as error:
            raise AdapterError(error.message, error.hint) from error
        self.kind = self._find_kind()
        self.path = place.path
        self._place, self._weights = place, place.weights
        self.notes: list[str] = [*place.notes]
        if unknown := self.config.unknown_fields(self.kind.fields):
            names = ", ".join(unknown)
            self.notes.append(f"{CONFIG_FILE} has fields that are not known here and not used: {names}")
        if self.config.peft_type == MERGED_BY_PEFT:
            self.notes.append(f"its layers were merged by {self.config.raw.get('merged_by')}, not by edgetune")
        self.stacks = StackCache()
        self._tensors: AdapterTensors | None = None
        self._initial = place.initial

    def _find_kind(self) -> Kind:
        return kind_of(self.config)

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of configuration and weights, by file name."""
        if self.config.peft_type == MERGED_BY_PEFT:
            return dict(self.config.raw["identity"])
        return self._place.identity()

    def tensors(self, base: BaseTargets) -> AdapterTensors:
        """Return the adapter's tensors by meaning. Only the names in `base` are used, and only in the first call."""
        if self._tensors is None:
            self._tensors = read_tensors(self.file, base.fits, self.kind.names)
            self.notes += self._tensors.notes
        return self._tensors

    @property
    def matched_tensors(self) -> AdapterTensors:
        """The tensors by meaning, once they were matched with a base."""
        assert self._tensors is not None
        return self._tensors

    def changes(self, base: BaseTargets) -> dict[str, Change]:
        """Return the change of each base tensor that the adapter touches.

        Raises:
            AdapterError: Tensors match nothing, lack their partner, have a wrong shape, are not finite or change
                nothing; the message lists them all.
        """
        initial = None
        if self._initial:
            file = open_weights(self._initial)
            initial = file, read_tensors(file, base.fits, self.kind.names)
        parts = AdapterParts(self.file, self.config, self.kind, self.tensors(base), self.stacks, initial)
        matching = self.kind.matching(parts, base)
        self.notes += matching.notes
        changes, problems = matching.changes, matching.problems
        if not problems:
            problems, without_effect = _effects(changes, self.file)
            if without_effect and len(without_effect) == len(changes) and not problems:
                raise _all_zero(self.path)
            self.notes += _note_on_zero(without_effect, changes)
            if matching.unused_modules and not changes:
                raise _all_zero(self.path)
            self.notes += _note_on_towers(matching.unused_modules, self.kind)
        if not changes and not problems:
            problems = [f"{self._weights[0]} holds no tensors"]
        if problems:
            hint = _OTHER_BASE if matching.differs else _SAVE_AGAIN
            raise AdapterError.of_many(f"problems with the adapter {self.path}", problems, hint)
        return changes


_OTHER_BASE = "Was it trained on this base model?"
_SAVE_AGAIN = "Save it again from the trained model: model.save_pretrained(DIR)"


def _effects(changes: Mapping[str, Change], file: AdapterWeights) -> tuple[list[str], list[str]]:
    """Problems with values that are not finite, and the names of tensors that change nothing."""
    problems, without_effect = [], []
    checked: dict[str, bool] = {}
    for change in changes.values():
        if change.token_rows is not None and not np.isfinite(change.token_rows.read()).all():
            problems.append(f"{change.token_rows.values.name} holds NaN or infinity")
        if change.factors is None and change.transform is None:
            continue
        if change.transform is not None:
            bad, idle = _bad_tensors(change.transform.tensors, file, checked), change.transform.changes_nothing
        else:
            assert change.factors is not None
            left, right = change.factors()
            finite = np.isfinite(left).all() and np.isfinite(right).all()
            bad = [] if finite else [f"{' and '.join(change.names)} hold NaN or infinity"]
            idle = partial(is_zero_product, left, right)
        problems += bad
        if not bad and change.replacement is None and change.token_rows is None and idle():
            without_effect.append(change.names[-1])
    return problems, without_effect


def _bad_tensors(tensors: Sequence[TensorInfo], file: AdapterWeights, checked: dict[str, bool]) -> list[str]:
    """The tensors that are not finite and not in `checked` yet, as problems."""
    bad = []
    for info in tensors:
        if info.name not in checked:
            checked[info.name] = bool(np.isfinite(file.rows(info, ALL)).all())
            bad += [] if checked[info.name] else [f"{info.name} holds NaN or infinity"]
    return bad


def _note_on_zero(names: list[str], changes: Mapping[str, Change]) -> list[str]:
    if not names:
        return []
    pairs = sum(change.factors is not None for change in changes.values())
    transforms = sum(change.transform is not None for change in changes.values())
    of = (
        f"{pairs + transforms} changes have no effect"
        if transforms
        else (f"{pairs} pairs A, B change nothing, because their product is zero")
    )
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return [f"{len(names)} of {of}: {names[0]}{more} (was the whole model trained?)"]


def _note_on_towers(modules: list[str], kind: Kind) -> list[str]:
    if not modules:
        return []
    if kind is KINDS["LORA"]:
        return [f"the adapter's pairs for {layers(modules)} {NO_TEXT} are zero: left out"]
    return [f"the adapter changes nothing in {layers(modules)} {NO_TEXT}: left out"]


def _all_zero(path: Path) -> AdapterError:
    return AdapterError(
        f"the adapter {path} is all zero: training changed nothing, and the file would equal the base",
        "Train for more steps or at a higher learning rate; to export the base alone, give --base DIR",
    )
