"""LoRA adapters of PEFT, as the change of each base tensor.

Every tensor of the adapter is used exactly once, and all problems are reported in one error. Variants that are not
plain LoRA are refused by name: merged like plain LoRA, they would silently give a wrong model.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetune_converters.errors import AdapterError, CheckpointError
from edgetune_converters.files.contents import read_json, sha256_of
from edgetune_converters.reading.safetensors_file import SafetensorsFile
from edgetune_converters.reading.wrapper_names import inner_wrappers, without_inner_wrappers, without_prefix
from edgetune_converters.tensors import ALL, F32, TensorInfo

_MAX_ALPHA = 1e9  # beyond any real use; products in f32 stay finite
_SHOWN_NAMES = 3  # of names with the same problem
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# initializations that leave the base unchanged; all others move a part of the base into A and B
_BASE_UNCHANGED = (True, False, None, "gaussian", "eva", "orthogonal")

# field of adapter_config.json that is not supported -> name of the variant
_UNSUPPORTED: Mapping[str, str] = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer replication (layer_replication)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
}

_PREFIX = r"^(?:base_model\.model\.)?(?P<module>.+?)"
_FACTOR = re.compile(
    _PREFIX + r"\.(?P<role>lora_(?:embedding_)?[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<part>weight|bias))?$"
)
_REPLACEMENT = re.compile(_PREFIX + r"(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<part>weight|bias)$")


@dataclass
class Change:
    """The change of one tensor of shape [n, k]: W becomes (replacement or W) + left @ right.

    `left` is f32 [n, r], `right` f32 [r, k]; the scale is folded into the factor made of B. For a parameter of all
    experts both have the experts as first axis. Factors are read on demand.
    """

    file: SafetensorsFile
    replacement: TensorInfo | None = None
    factors: Callable[[], tuple[F32, F32]] | None = None
    names: list[str] = field(default_factory=list)

    def of_expert(self, number: int, first: int, count: int) -> Change:
        """Return the part of a change of all experts that concerns rows first..first+count of one."""
        whole = self.factors
        assert whole is not None

        def part() -> tuple[F32, F32]:
            left, right = whole()
            return left[number, first : first + count], right[number]

        return Change(self.file, factors=part, names=self.names)


@dataclass(frozen=True)
class _Base:
    """Shapes of the base's tensors by target, and the targets that are stored transposed."""

    targets: Mapping[str, tuple[int, ...]]
    transposed: Collection[str] | None


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
        self.path = path
        try:
            self.config = read_json(path / CONFIG_FILE)
            _check_kind(self.config)
            self._file = SafetensorsFile(_weights(path))
            self._cache = _StackCache()
            self.notes: list[str] = []
        except CheckpointError as error:
            raise AdapterError(error.message, error.hint) from error

    def identity(self) -> dict[str, str]:
        """Return the SHA-256 of the adapter's two files, by file name."""
        return {name: sha256_of(self.path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}

    def changes(
        self,
        targets: Mapping[str, tuple[int, ...]],
        renamed: Callable[[str], str] = str,
        transposed: Collection[str] | None = None,
    ) -> dict[str, Change]:
        """Return the change of each base tensor that the adapter touches.

        Args:
            targets: Names and shapes of the base's tensors.
            renamed: Maps a module's name to the spelling of `targets`.
            transposed: The targets that the base stores transposed (PEFT's `fan_in_fan_out`). None: unknown, so the
                adapter's own `fan_in_fan_out` decides.

        Raises:
            AdapterError: Tensors match nothing, lack their partner, have a wrong shape, are not finite or change
                nothing; the message lists them all.
        """
        factors, saved, problems = self._classified(_fits(targets, renamed))
        replacements = {renamed(target): info for target, info in saved.items()}
        changes = {target: Change(self._file, replacement=info) for target, info in replacements.items()}
        problems += _unknown_replacements(replacements, targets)
        problems += [text for target, info in replacements.items() for text in _bad_replacement(target, info, targets)]
        unknown: list[str] = []
        misfits: list[str] = []
        for module, roles in factors.items():
            known = _Base(targets, transposed)
            misfits += self._add_factors(module, renamed(module), roles, known, changes, unknown)
        problems += _as_one_line(unknown, "is not a module of the base model", "are not modules of the base model")
        problems += misfits
        if not problems:
            problems = [text for target, change in changes.items() for text in _no_effect(target, change)]
            if problems and len(problems) == len(changes) and all(_NOTHING in text for text in problems):
                raise _all_zero(self.path)
        if not changes and not problems:
            problems = [f"{self.path / WEIGHTS_FILE} holds no tensors"]
        if problems:
            raise AdapterError.of_many(
                f"problems with the adapter {self.path}", problems, "Was it trained on this base model?"
            )
        return changes

    def _classified(
        self, fits: Callable[[str], bool]
    ) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], list[str]]:
        """LoRA factors by module and role, replacements by target, and problems with the rest."""
        matched: list[tuple[TensorInfo, re.Match[str]]] = []
        problems, foreign = [], []
        for name, info in self._file.tensors.items():
            key = without_inner_wrappers(name)
            match = _FACTOR.match(key) or _REPLACEMENT.match(key)
            if info.dtype not in ("F32", "F16", "BF16", "F64"):
                problems.append(f"{name} is stored as {info.dtype}, not as floats")
            elif match is None:
                foreign.append(name)
            else:
                matched.append((info, match))
        problems += _as_one_line(foreign, "is not a tensor of a LoRA adapter", "are not tensors of a LoRA adapter")
        modules, ambiguous = self._module_names([match["module"] for _, match in matched], fits)
        factors: dict[str, dict[str, TensorInfo]] = {}
        replacements: dict[str, TensorInfo] = {}
        for info, match in matched:
            module = modules[match["module"]]
            if match.re is _FACTOR:
                role = match["role"].replace("lora_", "") + (".bias" if match["part"] == "bias" else "")
                found, key = factors.setdefault(module, {}), role
            else:
                found, key = replacements, f"{module}.{match['part']}"
            problems += [f"{info.name} is duplicated under another name"] if key in found else []
            found[key] = info
        return factors, replacements, problems + ambiguous

    def _module_names(self, modules: Sequence[str], fits: Callable[[str], bool]) -> tuple[Mapping[str, str], list[str]]:
        """The names of modules without a wrapper's prefix, and a problem for each that fits in two ways."""
        choice = without_prefix(modules, fits)
        removed = [*inner_wrappers(self._file.tensors), *(prefix.rstrip(".") for prefix in choice.removed)]
        if removed:
            wrappers = " and ".join(repr(name) for name in removed)
            self.notes.append(f"the adapter's keys carry {wrappers}, the name of a wrapper around the model; ignored")
        return choice.names, [
            f"{module} can be {' or '.join(names)} of the base model: its keys have no common prefix"
            for module, names in choice.ambiguous.items()
        ]

    def _add_factors(
        self,
        module: str,
        renamed: str,
        roles: Mapping[str, TensorInfo],
        known: _Base,
        changes: dict[str, Change],
        unknown: list[str],
    ) -> Iterator[str]:
        """Attach one module's A/B pair to its base tensor, or yield why it does not fit; list an unknown module."""
        embedding = "embedding_A" in roles or "embedding_B" in roles
        wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(roles) != set(wanted):
            yield _missing_partner(module, roles, wanted)
            return
        a, b = (roles[role] for role in wanted)
        found = self._linear(module, renamed, embedding, known) or self._experts(renamed, a, b, known)
        if found is None:
            unknown.append(module)
            return
        if (a.shape, b.shape) != found.shapes:
            shape = list(known.targets[found.target])
            yield f"{module}: A {list(a.shape)} and B {list(b.shape)} do not fit {shape} at rank {found.rank}"
            return
        change = changes.setdefault(found.target, Change(self._file))
        if change.factors is not None:
            yield f"{module} and {change.names[0]} are one module under two names"
        change.names = [a.name, b.name]
        change.factors = _Factors(self._file, a, b, found.scale, found.transposed, found.experts, self._cache)

    def _linear(self, module: str, renamed: str, embedding: bool, known: _Base) -> _Target | None:
        """The target of the pair of a linear layer or an embedding."""
        target = f"{renamed}.weight"
        shape = known.targets.get(target)
        if shape is None:
            return None
        stated = bool(self.config.get("fan_in_fan_out"))
        transposed = embedding or (stated if known.transposed is None else target in known.transposed)
        # modules of target_parameters have their parameter's name in the patterns too
        as_parameter = any(target.endswith(name) for name in self.config.get("target_parameters") or ())
        rank, scale = self._rank_and_scale(target if as_parameter else module)
        rows, columns = (shape[-1], shape[0]) if transposed else (shape[0], shape[-1])
        return _Target(target, rank, scale, transposed, ((rank, columns), (rows, rank)))

    def _experts(self, renamed: str, a: TensorInfo, b: TensorInfo, known: _Base) -> _Target | None:
        """The target of the pair of a parameter of all experts.

        PEFT wraps a module once per parameter, and only the shapes tell the parameters apart.
        """
        module = re.sub(r"(\.base_layer)+$", "", renamed)
        fitting = []
        for target, shape in known.targets.items():
            if len(shape) != 3 or target.rpartition(".")[0] != module:
                continue
            rank, scale = self._rank_and_scale(target.removesuffix(_PACKED))
            count, rows, columns = shape
            for transposed in (False, True):
                place = _Target(target, rank, scale, transposed, ((rank * count, columns), (rows, rank * count)), count)
                rows, columns = columns, rows
                if (a.shape, b.shape) == place.shapes:
                    fitting.append(place)
        stored_transposed = known.transposed or ()
        # a square matrix is read in the orientation in which it is stored
        fitting.sort(key=lambda place: place.transposed != (place.target in stored_transposed))
        return fitting[0] if len({place.target for place in fitting}) == 1 else None

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        """The rank and the scale of B @ A for one module: alpha/r, or alpha/sqrt(r) with rsLoRA; patterns apply."""
        rank = _patterned(self.config.get("rank_pattern"), module, self.config.get("r"))
        alpha = _patterned(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        if type(rank) is not int or rank <= 0 or type(alpha) not in (int, float) or not abs(alpha) < _MAX_ALPHA:
            raise AdapterError(f"{self.path / CONFIG_FILE}: r is {rank!r} and lora_alpha is {alpha!r} for {module}")
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class _Factors:
    """Reads A and B as left [n, r] and right [r, k], with the scale folded into B."""

    file: SafetensorsFile
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    experts: int | None
    cache: _StackCache

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


class _StackCache:
    """Cache of the last two stacks of factors: each expert of a layer asks for the same stack."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[F32, F32]] = {}

    def __call__(self, name: str, read: Callable[[], tuple[F32, F32]]) -> tuple[F32, F32]:
        found = self._kept.pop(name, None) or read()
        self._kept = {**dict(list(self._kept.items())[-1:]), name: found}
        return found


def _weights(path: Path) -> Path:
    if not (path / WEIGHTS_FILE).is_file() and (path / "adapter_model.bin").is_file():
        raise AdapterError(
            f"{path} holds a pickled adapter_model.bin; safetensors only, because opening a pickle can run any code",
            "Save it again with PEFT: model.save_pretrained(DIR), which writes safetensors",
        )
    return path / WEIGHTS_FILE


def _check_kind(config: Mapping[str, Any]) -> None:
    """Refuse what is not plain LoRA."""
    kind = config.get("peft_type")
    if kind != "LORA":
        raise AdapterError(f"the adapter is of the kind {kind}; only LORA can be merged", "Merge it with PEFT first")
    for name, meaning in _UNSUPPORTED.items():
        if config.get(name):
            raise AdapterError(f"the adapter uses {meaning}, which cannot be merged yet", "Merge it with PEFT first")
    start = config.get("init_lora_weights", True)
    if start not in _BASE_UNCHANGED:
        raise AdapterError(
            f"the adapter was initialized with {start!r}, which moves the base: it does not fit the original one",
            "Convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as in PEFT."""
    if patterns and not isinstance(patterns, dict):
        raise AdapterError(f"{CONFIG_FILE}: rank_pattern and alpha_pattern must be objects, not {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise AdapterError(f"{CONFIG_FILE}: {pattern!r} is not a pattern: {error}") from error
    return default


def _missing_partner(module: str, roles: Mapping[str, TensorInfo], wanted: tuple[str, str]) -> str:
    if any(role.endswith(".bias") for role in roles):
        return f"{module} has a LoRA bias (lora_bias), which cannot be merged yet"
    missing = [role for role in wanted if role not in roles]
    if not missing:
        return f"{module} has LoRA factors for an embedding and for a linear layer"
    return f"{module} has no lora_{missing[0]}"


def _fits(targets: Mapping[str, tuple[int, ...]], renamed: Callable[[str], str]) -> Callable[[str], bool]:
    """Whether a module's name is one of the base: it has a weight or a bias, or the parameters of all experts."""
    with_experts = {target.rpartition(".")[0] for target, shape in targets.items() if len(shape) == 3}

    def fits(module: str) -> bool:
        single = any(renamed(f"{module}.{part}") in targets for part in ("weight", "bias"))
        return single or re.sub(r"(\.base_layer)+$", "", renamed(module)) in with_experts

    return fits


def _unknown_replacements(replacements: Mapping[str, TensorInfo], targets: Mapping[str, tuple[int, ...]]) -> list[str]:
    unknown = [info.name for target, info in replacements.items() if target not in targets]
    return _as_one_line(unknown, "matches no tensor of the base model", "match no tensor of the base model")


def _as_one_line(names: Sequence[str], one: str, many: str) -> list[str]:
    """One problem for all names that have it, with the first of them."""
    if len(names) < 2:
        return [f"{name} {one}" for name in names]
    more = f" and {len(names) - _SHOWN_NAMES} more" if len(names) > _SHOWN_NAMES else ""
    return [f"{len(names)} names {many}: {', '.join(names[:_SHOWN_NAMES])}{more}"]


def _bad_replacement(target: str, info: TensorInfo, targets: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if target in targets and info.shape != targets[target]:
        yield f"{info.name} has the shape {list(info.shape)}, the base {list(targets[target])}"


_PACKED = "_blocks"
"""Suffix of parameter names in the published gpt-oss; PEFT and its patterns use the names without it."""
_NOTHING = "change nothing: their product is zero"


def _no_effect(target: str, change: Change) -> Iterator[str]:
    """Report factors that are not finite, or whose product is zero."""
    if change.factors is None:
        return
    left, right = change.factors()
    names = " and ".join(change.names)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        yield f"{names} hold NaN or infinity"
    elif _squared_norm(left, right) == 0:
        yield f"{names} {_NOTHING} (was {target} trained?)"


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
