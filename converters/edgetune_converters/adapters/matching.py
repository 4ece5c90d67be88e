"""The matching of an adapter with a base: which tensor of the base each of the adapter's tensors changes, and how.

Every tensor of the adapter is used exactly once. Problems are collected, so that all are reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import NamedTuple

from edgetune_converters.adapters.adapted_module import AdaptedModule, Fold, Misfit
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change, Transform, of_all, on_transposed, transposed
from edgetune_converters.adapters.completeness import is_adapted, lost_modules
from edgetune_converters.adapters.expert_factors import ExpertPart, StackCache
from edgetune_converters.adapters.expert_transforms import ExpertTransforms
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.state_dict import AdapterTensors, RoleNames, as_one_line
from edgetune_converters.adapters.token_rows import TokenRows
from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.errors import AdapterError
from edgetune_converters.tensors import F32, Read, TensorInfo

PACKED_SUFFIX = "_blocks"
"""Suffix of parameter names in the published gpt-oss; PEFT and its patterns use the names without it."""
NO_TEXT = "beside the text part"
_SHOWN_MISFITS = 3


class AdapterParts(NamedTuple):
    """An adapter that was read, to be matched with a base."""

    file: AdapterWeights
    config: PeftConfig
    kind: Kind
    tensors: AdapterTensors
    stacks: StackCache
    initial: tuple[AdapterWeights, AdapterTensors] | None = None
    """The adapter before training, where it lies beside."""


class Matching:
    """One matching of an adapter with a base."""

    def __init__(self, adapter: AdapterParts, base: BaseTargets) -> None:
        self._file, self._config, self._kind, self._base = adapter.file, adapter.config, adapter.kind, base
        tensors = adapter.tensors
        self._shared = tensors.shared
        self._modules = tuple(tensors.modules)
        self._used: dict[str, TensorInfo] = {}
        self._unknown: list[str] = []
        self._of_experts: dict[str, list[tuple[ExpertPart, Transform]]] = {}
        self.unused_modules: list[str] = []
        self.notes: list[str] = []
        self._changing_towers: list[str] = []
        self.changes: dict[str, Change] = {}
        self.problems: list[str] = list(tensors.problems)
        self._replace(tensors.replacements)
        self._replace_rows(tensors.token_rows)
        misfits = [text for module, roles in tensors.modules.items() for text in self.attach(module, roles)]
        self.differs = bool(misfits or self._unknown or self.problems[len(tensors.problems) :])
        self.problems += as_one_line(
            self._unknown, "is not a module of the base model", "are not modules of the base model"
        )
        if self._changing_towers:
            self.problems.append(
                f"it changes {layers(self._changing_towers)} {NO_TEXT}, and only the text part of a multimodal model "
                "can be merged"
            )
        self.problems += self.further_problems()
        self.problems += misfits[:_SHOWN_MISFITS]
        if len(misfits) > _SHOWN_MISFITS:
            self.problems.append(f"{len(misfits) - _SHOWN_MISFITS} more modules do not fit in such a way")
        self.problems += self.finish()
        if not self.problems:
            self.problems += self._lost(tensors)

    # -- what a kind with a matching of its own replaces ---------------------------------------------------------------

    def attach(self, module: str, roles: Mapping[str, TensorInfo]) -> Iterator[str]:
        """Attach the tensors of a module to what they change, or yield why they do not fit; list an unknown module."""
        if self._base.beside_text(module):
            (self.unused_modules if self._is_idle_tower(module, roles) else self._changing_towers).append(module)
            return
        part, flipped, shape = self._place(module)
        if shape is None:
            self._unknown.append(module)
            return
        rows, columns = shape
        has_bias = self._target(module, "bias") in self._base.shapes
        adapted = AdaptedModule(
            module, rows, columns, has_bias, roles, self._shared, self._config, self._file, lambda: self._widest,
            self._weight(module, flipped=flipped),
        )  # fmt: skip
        try:
            folds = list(self._kind.fold(adapted))
        except Misfit as misfit:
            yield str(misfit)
            return
        self._used |= adapted.used
        unused = [info.name for role, info in roles.items() if role not in adapted.used]
        yield from as_one_line(unused, "is not used by its module", "are not used by their module", noun="tensors")
        for fold in folds:
            yield from self._add(adapted, part, fold, flipped=flipped)

    def further_problems(self) -> Iterable[str]:
        """Return problems of a kind that are reported before those of single modules."""
        unused = [info.name for role, info in self._shared.items() if role not in self._used]
        return as_one_line(unused, "is used by no module", "are used by no module", noun="tensors")

    def finish(self) -> Iterator[str]:
        """Make the changes that need all modules, or yield why not."""
        for target, found in self._of_experts.items():
            change = self.changes.setdefault(target, Change(self._file))
            if change.factors is not None or change.transform is not None:
                yield f"{found[0][1].tensors[0].name} changes one expert, and {change.names[0]} all of them"
                continue
            parts = tuple((part, transform.apply) for part, transform in found)
            stack = ExpertTransforms(parts, self._base.shapes[target], target in (self._base.transposed or ()))
            change.transform = of_all([transform for _, transform in found], stack)
            change.names = [info.name for info in change.transform.tensors]

    # -- shared --------------------------------------------------------------------------------------------------------

    def stack_of(self, part: ExpertPart) -> str | None:
        """Return the parameter of all experts that a matrix is a part of, as the base names it; None if it has none."""
        names = (part.target, part.target + PACKED_SUFFIX)
        return next((name for name in names if name in self._base.shapes), None)

    def is_transposed(self, target: str) -> bool:
        """Whether the base stores a matrix transposed; where that is not known, whether the adapter states it."""
        known = self._base.transposed
        return self._config.is_transposed if known is None else target in known

    def _place(self, module: str) -> tuple[ExpertPart | None, bool, tuple[int, int] | None]:
        """Return the place of a single expert, whether the base stores it transposed, and outputs and inputs."""
        renamed = self._base.renamed(module)
        part = self._base.experts.get(renamed) if f"{renamed}.weight" not in self._base.shapes else None
        if part is not None:
            return part, False, (part.rows, part.columns)
        shape = self._base.shapes.get(f"{renamed}.weight")
        if shape is None or len(shape) != 2:
            return None, False, None
        flipped = self.is_transposed(f"{renamed}.weight")
        return None, flipped, (shape[1], shape[0]) if flipped else (shape[0], shape[1])

    @cached_property
    def _widest(self) -> tuple[int, int] | None:
        """The largest numbers of outputs and inputs of the adapter's modules; None where one is not known."""
        beside = self._base.beside_text
        found = [self._base.shape_beside_text(name) if beside(name) else self._place(name)[2] for name in self._modules]
        shapes = [shape for shape in found if shape is not None and len(shape) == 2]
        if len(shapes) < len(found):
            return None
        return max(shape[0] for shape in shapes), max(shape[1] for shape in shapes)

    def _weight(self, module: str, *, flipped: bool) -> Callable[[], Read] | None:
        reader = self._base.reader
        if reader is None:
            return None
        target = self._target(module, "weight")
        return lambda: transposed(reader(target)) if flipped else reader(target)

    def _target(self, module: str, part: str) -> str:
        """Return the name of the weight or the bias of a module, as the base spells it."""
        return self._base.renamed(f"{module}.bias") if part == "bias" else f"{self._base.renamed(module)}.weight"

    def _is_idle_tower(self, module: str, roles: Mapping[str, TensorInfo]) -> bool:
        """Whether the tensors of a module that texts do not pass through change nothing."""
        shape = self._base.shape_beside_text(module)
        if shape is None or len(shape) != 2:
            return False
        adapted = AdaptedModule(
            module, *shape, False, roles, self._shared, self._config, self._file, lambda: self._widest
        )
        try:
            folds = list(self._kind.fold(adapted))
        except Misfit:
            return False
        self._used |= adapted.used
        return all(fold.idle for fold in folds)

    def _add(self, module: AdaptedModule, part: ExpertPart | None, fold: Fold, *, flipped: bool) -> Iterator[str]:
        """Attach one change, or yield why it does not fit."""
        tensors = tuple(module.used.values())
        if part is not None:
            target = self.stack_of(part)
            if target is None or fold.part == "bias":
                self._unknown.append(module.name)
                return
            transform = Transform(fold.as_apply(), tensors, lambda: fold.idle, fold.needs_trained)
            self._of_experts.setdefault(target, []).append((part, transform))
            return
        change = self.changes.setdefault(self._target(module.name, fold.part), Change(self._file))
        if change.factors is not None or change.transform is not None:
            yield f"{module.name} and {change.names[0]} are one module under two names"
            return
        change.names = [info.name for info in tensors]
        turned = flipped and fold.part == "weight"
        if fold.factors is not None:
            change.factors = partial(_transposed_factors, fold.factors) if turned else fold.factors
            return
        apply = fold.as_apply()
        change.transform = Transform(
            on_transposed(apply) if turned else apply, tensors, fold.changes_nothing, fold.needs_trained
        )

    def _lost(self, tensors: AdapterTensors) -> list[str]:
        """Return the problem with modules that the configuration says are adapted, and that have no tensors."""
        replaced = {name.rpartition(".")[0] for name in tensors.replacements}
        present = tensors.modules or {name for name in replaced if is_adapted(self._config.raw, name)}
        lost = lost_modules(self._config.raw, present, self._base)
        because = "by adapter_config.json (target_modules), and the file has no tensor of"
        return as_one_line(lost, f"is adapted {because} it", f"are adapted {because} them", noun="modules")

    def _replace(self, replacements: Mapping[str, TensorInfo]) -> None:
        unknown = []
        for name, info in replacements.items():
            target = self._base.renamed(name)
            shape = self._base.shapes.get(target)
            if shape is None:
                unknown.append(info.name)
            elif info.shape != shape:
                self.problems.append(f"{info.name} has the shape {list(info.shape)}, the base {list(shape)}")
            else:
                self.changes[target] = Change(self._file, replacement=info)
        self.problems += as_one_line(
            unknown, "matches no tensor of the base model", "match no tensor of the base model"
        )

    def _replace_rows(self, token_rows: Mapping[str, TensorInfo]) -> None:
        for module, info in token_rows.items():
            target = self._base.renamed(f"{module}.weight")
            shape = self._base.shapes.get(target)
            if shape is None:
                self._unknown.append(module)
                continue
            ids = self._config.token_ids(module)
            if info.shape != (len(ids), *shape[1:]) or max(ids) >= shape[0]:
                self.problems.append(
                    f"{info.name} has the shape {list(info.shape)}; {self._config.token_field} names {len(ids)} tokens "
                    f"up to {max(ids)}, and the base has {list(shape)}"
                )
                continue
            rows = TokenRows(self._file, info, ids)
            tied = [head for head, embedding in self._base.tied.items() if embedding == target]
            for changed in [target, *tied]:
                self.changes.setdefault(changed, Change(self._file)).token_rows = rows


@dataclass(frozen=True)
class Kind:
    """A kind of adapters, as `peft_type` names it."""

    names: RoleNames
    fold: Callable[[AdaptedModule], Iterable[Fold]]
    """Returns the changes of a module. Raises Misfit for a tensor that is missing or has another shape."""
    fields: frozenset[str] = frozenset()
    """Fields of adapter_config.json that the fold reads, and fields that had their effect in training alone."""
    refused: Mapping[str, str] = field(default_factory=dict)
    """Fields whose variant cannot be merged, with its name. They are refused where they have a value."""
    check: Callable[[PeftConfig], None] = lambda config: None
    """Raises AdapterError for a configuration that cannot be merged."""
    matching: type[Matching] = Matching

    def check_config(self, config: PeftConfig) -> None:
        """Raise AdapterError for a variant that cannot be merged."""
        for name, meaning in self.refused.items():
            if config.raw.get(name):
                raise AdapterError(f"the adapter uses {meaning}, which cannot be merged yet", MERGE_FIRST)
        self.check(config)


MERGE_FIRST = "Merge it with PEFT first"


def _transposed_factors(factors: Callable[[], tuple[F32, F32]]) -> tuple[F32, F32]:
    left, right = factors()
    return right.T.copy(), left.T.copy()


def layers(modules: list[str]) -> str:
    """Return `2 layers (a, b)`, with the first of many names."""
    shown = ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")
    return f"{len(modules)} layer{'s' if len(modules) > 1 else ''} ({shown})"
