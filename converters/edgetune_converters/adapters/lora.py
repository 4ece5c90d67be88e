"""LoRA adapters of PEFT, as the change of each base tensor.

Every tensor of the adapter is used exactly once, and all problems are reported in one error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from edgetune_converters.adapters.directory import find_adapter
from edgetune_converters.adapters.expert_factors import ExpertPair, ExpertPart, PairsOfExperts, StackCache
from edgetune_converters.adapters.peft_config import CONFIG_FILE, PeftConfig
from edgetune_converters.adapters.state_dict import AdapterTensors, as_one_line, read_tensors
from edgetune_converters.adapters.token_rows import TokenRows
from edgetune_converters.adapters.weights import AdapterWeights, open_weights
from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.files.contents import sha256_of
from edgetune_converters.tensors import ALL, F32, TensorInfo


@dataclass
class Change:
    """The change of one tensor of shape [n, k]: W becomes (replacement or W) + left @ right.

    `left` is f32 [n, r], `right` f32 [r, k]; the scale is folded into the factor made of B. For a parameter of all
    experts both have the experts as first axis. Factors are read on demand. `token_rows` replace single rows of W.
    """

    file: AdapterWeights
    replacement: TensorInfo | None = None
    factors: Callable[[], tuple[F32, F32]] | None = None
    names: list[str] = field(default_factory=list)
    token_rows: TokenRows | None = None

    def of_expert(self, number: int, first: int, count: int, *, transposed: bool = False) -> Change:
        """Return the part of a change of all experts that concerns rows first..first+count of one.

        `transposed`: the parameter of all experts holds the matrix of each expert transposed.
        """
        whole = self.factors
        assert whole is not None

        def part() -> tuple[F32, F32]:
            left, right = (each[number] for each in whole())
            if transposed:
                left, right = right.T, left.T
            return np.ascontiguousarray(left[first : first + count]), np.ascontiguousarray(right)

        return Change(self.file, factors=part, names=self.names)


@dataclass(frozen=True)
class BaseTargets:
    """What an adapter needs to know of the base."""

    shapes: Mapping[str, tuple[int, ...]]
    """Names and shapes of the base's tensors, and of the parameters that hold several of them."""
    renamed: Callable[[str], str] = str
    """Maps the name of a module or a tensor to the spelling of `shapes`."""
    transposed: Collection[str] | None = None
    """The targets that the base stores transposed (PEFT's `fan_in_fan_out`). None: unknown, so the adapter decides."""
    experts: Mapping[str, ExpertPart] = field(default_factory=dict)
    """Modules of single experts that are parts of a target of all experts."""
    tied: Mapping[str, str] = field(default_factory=dict)
    """The output matrix, where it is the embedding: its target and that of the embedding."""
    beside_text: Callable[[str], bool] = lambda module: False
    """Whether a module belongs to a part of a multimodal model that texts do not pass through."""

    def fits(self, module: str) -> bool:
        """Whether a module's name is one of the base: it has a weight or a bias, or the parameters of all experts."""
        name = self.renamed(module)
        single = any(self.renamed(f"{module}.{part}") in self.shapes for part in ("weight", "bias"))
        return single or name in self.experts or re.sub(r"(\.base_layer)+$", "", name) in self._with_experts

    @cached_property
    def _with_experts(self) -> set[str]:
        return {target.rpartition(".")[0] for target, shape in self.shapes.items() if len(shape) == 3}


@dataclass(frozen=True)
class _Target:
    """The base tensor of an A/B pair; `shapes` are the shapes that A and B must have."""

    target: str
    rank: int
    scale: float
    transposed: bool
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    experts: int | None = None


class Adapter:
    """A PEFT adapter directory. Raises AdapterError when it is missing, damaged or not plain LoRA."""

    def __init__(self, path: Path) -> None:
        try:
            place = find_adapter(path)
            self.config = PeftConfig(place.path / CONFIG_FILE)
            self.file = open_weights(place.weights)
        except CheckpointError as error:
            raise AdapterError(error.message, error.hint) from error
        self.path = place.path
        self._weights = place.weights
        self.notes: list[str] = [*place.notes]
        if self.config.unknown_fields:
            names = ", ".join(self.config.unknown_fields)
            self.notes.append(f"{CONFIG_FILE} has fields that are not known here and not used: {names}")
        self.stacks = StackCache()
        self._tensors: AdapterTensors | None = None

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of configuration and weights, by file name."""
        return {file.name: sha256_of(file) for file in (self.path / CONFIG_FILE, *self._weights)}

    def tensors(self, base: BaseTargets) -> AdapterTensors:
        """Return the adapter's tensors by meaning. Only the names in `base` are used, and only in the first call."""
        if self._tensors is None:
            self._tensors = read_tensors(self.file, base.fits)
            self.notes += self._tensors.notes
        return self._tensors

    def changes(self, base: BaseTargets) -> dict[str, Change]:
        """Return the change of each base tensor that the adapter touches.

        Raises:
            AdapterError: Tensors match nothing, lack their partner, have a wrong shape, are not finite or change
                nothing; the message lists them all.
        """
        matching = _Matching(self, base)
        changes, problems = matching.changes, matching.problems
        if not problems:
            problems, without_effect = _effects(changes)
            if without_effect and len(without_effect) == len(changes) and not problems:
                raise _all_zero(self.path)
            self.notes += _note_on_zero(without_effect, changes)
            if matching.unused_pairs and not changes:
                raise _all_zero(self.path)
            self.notes += _note_on_towers(matching.unused_pairs)
        if not changes and not problems:
            problems = [f"{self._weights[0]} holds no tensors"]
        if problems:
            hint = _OTHER_BASE if matching.differs else _SAVE_AGAIN
            raise AdapterError.of_many(f"problems with the adapter {self.path}", problems, hint)
        return changes


_OTHER_BASE = "Was it trained on this base model?"
_SAVE_AGAIN = "Save it again from the trained model: model.save_pretrained(DIR)"
_SHOWN_MISFITS = 3


class _Matching:
    """One matching of an adapter with a base. Problems are collected, so that all are reported at once."""

    def __init__(self, adapter: Adapter, base: BaseTargets) -> None:
        self._file, self._config, self._base = adapter.file, adapter.config, base
        self._cache = adapter.stacks
        self._unknown: list[str] = []
        self._without_bias: list[str] = []
        self._of_experts: dict[str, list[ExpertPair]] = {}
        self.unused_pairs: list[str] = []
        self._changing_towers: list[str] = []
        tensors = adapter.tensors(base)
        self.changes: dict[str, Change] = {}
        self.problems: list[str] = list(tensors.problems)
        self._replace(tensors.replacements)
        self._replace_rows(tensors.token_rows)
        misfits = [text for module, roles in tensors.factors.items() for text in self._add_pair(module, roles)]
        self.differs = bool(misfits or self._unknown or self.problems[len(tensors.problems) :])
        self.problems += as_one_line(
            self._unknown, "is not a module of the base model", "are not modules of the base model"
        )
        if self._changing_towers:
            self.problems.append(
                f"it changes {_layers(self._changing_towers)} {_NO_TEXT}, and only the text part of a multimodal model "
                "can be merged"
            )
        lacking = "a LoRA bias (lora_bias), for which the base has no bias"
        self.problems += as_one_line(self._without_bias, f"has {lacking}", f"have {lacking}", noun="modules")
        self.problems += misfits[:_SHOWN_MISFITS]
        if len(misfits) > _SHOWN_MISFITS:
            self.problems.append(f"{len(misfits) - _SHOWN_MISFITS} more modules do not fit in such a way")
        for target, pairs in self._of_experts.items():
            self.problems += self._stack(target, pairs)

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
                    f"{info.name} has the shape {list(info.shape)}; trainable_token_indices names {len(ids)} tokens up "
                    f"to {max(ids)}, and the base has {list(shape)}"
                )
                continue
            rows = TokenRows(self._file, info, ids)
            tied = [head for head, embedding in self._base.tied.items() if embedding == target]
            for changed in [target, *tied]:
                self.changes.setdefault(changed, Change(self._file)).token_rows = rows

    def _add_pair(self, module: str, roles: Mapping[str, TensorInfo]) -> Iterator[str]:
        """Attach one module's A/B pair to its base tensor, or yield why it does not fit; list an unknown module."""
        if "B.bias" in roles:
            yield from self._add_bias(module, roles["B.bias"])
            roles = {role: info for role, info in roles.items() if role != "B.bias"}
        embedding = "embedding_A" in roles or "embedding_B" in roles
        wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(roles) != set(wanted):
            yield _missing_partner(module, roles, wanted)
            return
        a, b = (roles[role] for role in wanted)
        if self._base.beside_text(module):
            zero = not (self._file.rows(a, ALL).any() and self._file.rows(b, ALL).any())
            (self.unused_pairs if zero else self._changing_towers).append(module)
            return
        renamed = self._base.renamed(module)
        found = self._linear(module, renamed, embedding)
        if found is None and renamed in self._base.experts:
            yield from self._one_expert(module, self._base.experts[renamed], a, b)
            return
        found = found or self._experts(renamed, a, b)
        if found is None:
            self._unknown.append(module)
            return
        if (a.shape, b.shape) != found.shapes:
            shape = list(self._base.shapes[found.target])
            yield f"{module}: A {list(a.shape)} and B {list(b.shape)} do not fit {shape} at rank {found.rank}"
            return
        change = self.changes.setdefault(found.target, Change(self._file))
        if change.factors is not None:
            yield f"{module} and {change.names[0]} are one module under two names"
        change.names = [a.name, b.name]
        change.factors = _Factors(self._file, a, b, found.scale, found.transposed, found.experts, self._cache)

    def _add_bias(self, module: str, bias: TensorInfo) -> Iterator[str]:
        """Attach the bias of a module's B (`lora_bias`) to that of its base layer, or yield why it does not fit."""
        target = self._base.renamed(f"{module}.bias")
        shape = self._base.shapes.get(target)
        if shape is None:
            self._without_bias.append(module)
        elif bias.shape != shape:
            yield f"{bias.name} has the shape {list(bias.shape)}, the bias of the base {list(shape)}"
        else:
            change = self.changes.setdefault(target, Change(self._file))
            change.names = [bias.name]
            change.factors = partial(_as_factors, self._file, bias, self._config.rank_and_scale(module)[1])

    def _linear(self, module: str, renamed: str, embedding: bool) -> _Target | None:
        """The target of the pair of a linear layer or an embedding."""
        target = f"{renamed}.weight"
        shape = self._base.shapes.get(target)
        if shape is None:
            return None
        known = self._base.transposed
        transposed = embedding or (self._config.is_transposed if known is None else target in known)
        # modules of target_parameters have their parameter's name in the patterns too
        rank, scale = self._config.rank_and_scale(target if self._config.names_parameter(target) else module)
        rows, columns = (shape[-1], shape[0]) if transposed else (shape[0], shape[-1])
        return _Target(target, rank, scale, transposed, ((rank, columns), (rows, rank)))

    def _experts(self, renamed: str, a: TensorInfo, b: TensorInfo) -> _Target | None:
        """The target of the pair of a parameter of all experts.

        PEFT wraps a module once per parameter, and only the shapes tell the parameters apart.
        """
        module = re.sub(r"(\.base_layer)+$", "", renamed)
        fitting = []
        for target, shape in self._base.shapes.items():
            if len(shape) != 3 or target.rpartition(".")[0] != module:
                continue
            rank, scale = self._config.rank_and_scale(target.removesuffix(_PACKED))
            count, rows, columns = shape
            for transposed in (False, True):
                place = _Target(target, rank, scale, transposed, ((rank * count, columns), (rows, rank * count)), count)
                rows, columns = columns, rows
                if (a.shape, b.shape) == place.shapes:
                    fitting.append(place)
        stored_transposed = self._base.transposed or ()
        # a square matrix is read in the orientation in which it is stored
        fitting.sort(key=lambda place: place.transposed != (place.target in stored_transposed))
        return fitting[0] if len({place.target for place in fitting}) == 1 else None

    def _one_expert(self, module: str, part: ExpertPart, a: TensorInfo, b: TensorInfo) -> Iterator[str]:
        """Keep the pair of one expert for `_stack`, or yield why it does not fit; list an unknown module."""
        target = next((name for name in (part.target, part.target + _PACKED) if name in self._base.shapes), None)
        if target is None:
            self._unknown.append(module)
            return
        rank, scale = self._config.rank_and_scale(module)
        if (a.shape, b.shape) != ((rank, part.columns), (part.rows, rank)):
            yield (
                f"{module}: A {list(a.shape)} and B {list(b.shape)} do not fit "
                f"{[part.rows, part.columns]} at rank {rank}"
            )
            return
        self._of_experts.setdefault(target, []).append(ExpertPair(part, a, b, scale))

    def _stack(self, target: str, pairs: list[ExpertPair]) -> Iterator[str]:
        """Make one change of the pairs of single experts, or yield why not."""
        change = self.changes.setdefault(target, Change(self._file))
        if change.factors is not None:
            yield f"{pairs[0].a.name} is the pair of one expert, and {change.names[0]} that of all of them"
            return
        transposed = target in (self._base.transposed or ())
        change.names = [pairs[0].a.name, pairs[-1].b.name]
        change.factors = PairsOfExperts(
            self._file, tuple(pairs), self._base.shapes[target], transposed, self._cache
        )  # fmt: skip


@dataclass(frozen=True)
class _Factors:
    """Reads A and B as left [n, r] and right [r, k], with the scale folded into B."""

    file: AdapterWeights
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    experts: int | None
    cache: StackCache

    def __call__(self) -> tuple[F32, F32]:
        if self.experts is not None:
            return self.cache(self.b.name, self._read_stack)
        a, b = self._read()
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    def _read(self) -> tuple[F32, F32]:
        return self.file.rows(self.a, ALL), self.file.rows(self.b, ALL) * np.float32(self.scale)

    def _read_stack(self) -> tuple[F32, F32]:
        """PEFT stores A as [experts * r, columns] and B as [rows, r * experts], where the experts vary fastest."""
        assert self.experts is not None
        a, b = self._read()
        right = a.reshape(self.experts, -1, a.shape[1])
        left = b.reshape(b.shape[0], -1, self.experts).transpose(2, 0, 1)
        if self.transposed:
            left, right = right.transpose(0, 2, 1), left.transpose(0, 2, 1)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)


def _as_factors(file: AdapterWeights, bias: TensorInfo, scale: float) -> tuple[F32, F32]:
    """The change of a bias as a product, of a column and one."""
    return file.rows(bias, ALL) * np.float32(scale), np.ones((1, 1), np.float32)


def _missing_partner(module: str, roles: Mapping[str, TensorInfo], wanted: tuple[str, str]) -> str:
    if any(role.endswith(".bias") for role in roles):
        return f"{module} has a bias of A, which PEFT does not have"
    missing = [role for role in wanted if role not in roles]
    if not missing:
        return f"{module} has LoRA factors for an embedding and for a linear layer"
    return f"{module} has no lora_{missing[0]}"


_PACKED = "_blocks"
"""Suffix of parameter names in the published gpt-oss; PEFT and its patterns use the names without it."""


def _effects(changes: Mapping[str, Change]) -> tuple[list[str], list[str]]:
    """Problems with factors that are not finite, and the names of pairs whose product is zero."""
    problems, without_effect = [], []
    for change in changes.values():
        if change.token_rows is not None and not np.isfinite(change.token_rows.read()).all():
            problems.append(f"{change.token_rows.values.name} holds NaN or infinity")
        if change.factors is None:
            continue
        left, right = change.factors()
        if not (np.isfinite(left).all() and np.isfinite(right).all()):
            problems.append(f"{' and '.join(change.names)} hold NaN or infinity")
        elif _squared_norm(left, right) == 0 and change.replacement is None and change.token_rows is None:
            without_effect.append(change.names[-1])
    return problems, without_effect


def _note_on_zero(names: list[str], changes: Mapping[str, Change]) -> list[str]:
    if not names:
        return []
    pairs = sum(change.factors is not None for change in changes.values())
    return [
        f"{len(names)} of {pairs} pairs A, B change nothing, because their product is zero: {names[0]}"
        + (f" and {len(names) - 1} more" if len(names) > 1 else "")
        + " (was the whole model trained?)"
    ]


_NO_TEXT = "beside the text part"


def _layers(modules: list[str]) -> str:
    """Return `2 layers (a, b)`, with the first of many names."""
    shown = ", ".join(modules[:3]) + (" ..." if len(modules) > 3 else "")
    return f"{len(modules)} layer{'s' if len(modules) > 1 else ''} ({shown})"


def _note_on_towers(modules: list[str]) -> list[str]:
    return [f"the adapter's pairs for {_layers(modules)} {_NO_TEXT} are zero: left out"] if modules else []


def _all_zero(path: Path) -> AdapterError:
    return AdapterError(
        f"the adapter {path} is all zero: training changed nothing, and the file would equal the base",
        "Train for more steps or at a higher learning rate; to export the base alone, give --base DIR",
    )


def _squared_norm(left: F32, right: F32) -> float:
    """|left @ right|^2, computed from two r x r matrices; over all experts of a stack."""
    if not left.any() or not right.any():
        return 0.0
    if left.ndim == 3:
        return sum(_squared_norm(one, other) for one, other in zip(left, right, strict=True))
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    return max(0.0, float(np.sum((wide_left.T @ wide_left) * (wide_right @ wide_right.T))))
