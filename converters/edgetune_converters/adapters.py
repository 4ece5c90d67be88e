"""A PEFT adapter on disk, as the change it makes to each tensor of the base.

Every tensor of the adapter is consumed exactly once, and every problem that is found is reported in one error. Kinds of
adapters that are not plain LoRA are refused by name: merged as if they were, they would give a wrong model silently.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from edgetune_converters.checkpoint import F32, Rows, SafetensorsFile, TensorInfo, read_json, sha256_of
from edgetune_converters.errors import AdapterError, CheckpointError

_MAX_ALPHA = 1e9  # no one means more, and products of f32 stay finite
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"

# initialisations that leave the base as it was; all others fold a part of the base into A and B
_KEEPS_BASE = (True, False, None, "gaussian", "eva", "orthogonal")

# field of adapter_config.json -> what a true value means
_REFUSED: Mapping[str, str] = {
    "use_dora": "DoRA (use_dora)",
    "use_qalora": "QA-LoRA (use_qalora)",
    "use_bdlora": "BD-LoRA (use_bdlora)",
    "kasa_config": "KaSA (kasa_config)",
    "arrow_config": "Arrow routing (arrow_config)",
    "monteclora_config": "MonteCLoRA (monteclora_config)",
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens)",
    "layer_replication": "layer replication (layer_replication)",
    "target_parameters": "LoRA on bare parameters (target_parameters)",
    "trainable_token_indices": "trainable tokens (trainable_token_indices)",
}

_PREFIX = r"^(?:base_model\.model\.)?(?P<module>.+?)"
_FACTOR = re.compile(
    _PREFIX + r"\.(?P<role>lora_(?:embedding_)?[AB])(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<part>weight|bias))?$"
)
_REPLACEMENT = re.compile(_PREFIX + r"(?:\.base_layer|\.modules_to_save(?:\.[^.]+)?)?\.(?P<part>weight|bias)$")


@dataclass
class Change:
    """What the adapter does to one tensor of shape (n, k): W becomes (replacement or W) + left @ right.

    `left` is f32 [n, r]; `right` is f32 [r, k] and holds the scale. They are read when they are asked for.
    """

    file: SafetensorsFile
    replacement: TensorInfo | None = None
    factors: Callable[[], tuple[F32, F32]] | None = None
    names: list[str] = field(default_factory=list)

    def replaced(self, rows: Rows) -> F32 | None:
        """Rows of the replacement, None where the base stays."""
        return None if self.replacement is None else self.file.rows(self.replacement, rows)


class Adapter:
    """A PEFT adapter directory. Errors: AdapterError when it is missing, damaged or of a kind that is not merged."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.config = read_json(path / CONFIG_FILE)
            _check_kind(self.config)
            self._file = SafetensorsFile(_weights(path))
        except CheckpointError as error:
            raise AdapterError(error.message, error.hint) from error

    def identity(self) -> dict[str, str]:
        """SHA-256 of the adapter's two files, by file name."""
        return {name: sha256_of(self.path / name) for name in (CONFIG_FILE, WEIGHTS_FILE)}

    def changes(self, targets: Mapping[str, tuple[int, ...]]) -> dict[str, Change]:
        """The change of each base tensor that the adapter touches; `targets` are the base's tensors and shapes.

        Errors: AdapterError listing every tensor that matches nothing, lacks its partner, has a wrong shape, is not
        finite or changes nothing.
        """
        factors, replacements, problems = self._sorted()
        changes = {target: Change(self._file, replacement=info) for target, info in replacements.items()}
        problems += [text for target, info in replacements.items() for text in _bad_replacement(target, info, targets)]
        for module, roles in factors.items():
            problems += self._add_factors(module, roles, targets, changes)
        if not problems:
            problems = [text for target, change in changes.items() for text in _vacuous(target, change)]
        if not changes and not problems:
            problems = [f"{self.path / WEIGHTS_FILE} holds no tensors"]
        if problems:
            raise AdapterError.of_many(
                f"problems with the adapter {self.path}", problems, "Was it trained on this base model?"
            )
        return changes

    def _sorted(self) -> tuple[dict[str, dict[str, TensorInfo]], dict[str, TensorInfo], list[str]]:
        """LoRA factors by module and role, replacements by target, and what is wrong with the rest."""
        factors: dict[str, dict[str, TensorInfo]] = {}
        replacements: dict[str, TensorInfo] = {}
        problems = []
        for name, info in self._file.tensors.items():
            if info.dtype not in ("F32", "F16", "BF16", "F64"):
                problems.append(f"{name} is stored as {info.dtype}, not as floats")
            elif match := _FACTOR.match(name):
                role = match["role"].replace("lora_", "") + (".bias" if match["part"] == "bias" else "")
                known = factors.setdefault(match["module"], {})
                problems += [f"{name} is there twice under different names"] if role in known else []
                known[role] = info
            elif match := _REPLACEMENT.match(name):
                target = f"{match['module']}.{match['part']}"
                problems += [f"{name} is there twice under different names"] if target in replacements else []
                replacements[target] = info
            else:
                problems.append(f"{name} is not a tensor of a LoRA adapter")
        return factors, replacements, problems

    def _add_factors(
        self,
        module: str,
        roles: Mapping[str, TensorInfo],
        targets: Mapping[str, tuple[int, ...]],
        changes: dict[str, Change],
    ) -> Iterator[str]:
        """Attach one module's pair to its target, or say why not."""
        target = f"{module}.weight"
        embedding = "embedding_A" in roles or "embedding_B" in roles
        wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(roles) != set(wanted):
            yield _unpaired(module, roles, wanted)
            return
        if target not in targets:
            yield f"{module} is not a module of the base model"
            return
        a, b = (roles[role] for role in wanted)
        transposed = embedding or bool(self.config.get("fan_in_fan_out"))
        rank, scale = self._rank_and_scale(module)
        shapes = (rank, targets[target][-1]), (targets[target][0], rank)
        if transposed:
            shapes = (rank, targets[target][0]), (targets[target][-1], rank)
        if (a.shape, b.shape) != shapes:
            yield f"{module}: A {list(a.shape)} and B {list(b.shape)} do not fit {list(targets[target])} at rank {rank}"
            return
        change = changes.setdefault(target, Change(self._file))
        change.names = [a.name, b.name]
        change.factors = _Factors(self._file, a, b, scale, transposed)

    def _rank_and_scale(self, module: str) -> tuple[int, float]:
        """r and the factor of B @ A for one module: alpha/r, or alpha/sqrt(r) for rsLoRA, by its patterns."""
        rank = _patterned(self.config.get("rank_pattern"), module, self.config.get("r"))
        alpha = _patterned(self.config.get("alpha_pattern"), module, self.config.get("lora_alpha"))
        if type(rank) is not int or rank <= 0 or type(alpha) not in (int, float) or not abs(alpha) < _MAX_ALPHA:
            raise AdapterError(f"{self.path / CONFIG_FILE}: r is {rank!r} and lora_alpha is {alpha!r} for {module}")
        return rank, alpha / (math.sqrt(rank) if self.config.get("use_rslora") else rank)


@dataclass(frozen=True)
class _Factors:
    """Reads A and B and turns them into left [n, r] and right [r, k] with the scale folded into right."""

    file: SafetensorsFile
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool

    def __call__(self) -> tuple[F32, F32]:
        a = self.file.rows(self.a, slice(None))
        b = self.file.rows(self.b, slice(None))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return np.ascontiguousarray(left), np.ascontiguousarray(right) * np.float32(self.scale)


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
    for name, meaning in _REFUSED.items():
        if config.get(name):
            raise AdapterError(f"the adapter uses {meaning}, which cannot be merged yet", "Merge it with PEFT first")
    start = config.get("init_lora_weights", True)
    if start not in _KEEPS_BASE:
        raise AdapterError(
            f"the adapter was initialised with {start!r}, which moves the base: it does not fit the original one",
            "Convert it to plain LoRA with PEFT: save_pretrained(..., path_initial_model_for_weight_conversion=...)",
        )


def _patterned(patterns: Any, module: str, default: Any) -> Any:
    """The value of the first pattern that matches the end of a module's name, as PEFT does it."""
    if patterns and not isinstance(patterns, dict):
        raise AdapterError(f"{CONFIG_FILE}: rank_pattern and alpha_pattern must be objects, not {patterns!r}")
    for pattern, value in (patterns or {}).items():
        try:
            if re.match(rf"(.*\.)?({pattern})$", module):
                return value
        except re.error as error:
            raise AdapterError(f"{CONFIG_FILE}: {pattern!r} is not a pattern: {error}") from error
    return default


def _unpaired(module: str, roles: Mapping[str, TensorInfo], wanted: tuple[str, str]) -> str:
    if any(role.endswith(".bias") for role in roles):
        return f"{module} has a LoRA bias (lora_bias), which cannot be merged yet"
    missing = [role for role in wanted if role not in roles]
    if not missing:
        return f"{module} has LoRA factors for an embedding and for a linear layer"
    return f"{module} has no lora_{missing[0]}"


def _bad_replacement(target: str, info: TensorInfo, targets: Mapping[str, tuple[int, ...]]) -> Iterator[str]:
    if target not in targets:
        yield f"{info.name} matches no tensor of the base model"
    elif info.shape != targets[target]:
        yield f"{info.name} has the shape {list(info.shape)}, the base {list(targets[target])}"


def _vacuous(target: str, change: Change) -> Iterator[str]:
    """Changes that are not finite, or that are none. The norm of left @ right comes from two r x r matrices."""
    if change.factors is None:
        return
    left, right = change.factors()
    names = " and ".join(change.names)
    if not (np.isfinite(left).all() and np.isfinite(right).all()):
        yield f"{names} hold NaN or infinity"
    elif _squared_norm(left, right) == 0:
        yield f"{names} change nothing: their product is zero (was {target} trained?)"


def _squared_norm(left: F32, right: F32) -> float:
    """|left @ right|^2."""
    if not left.any() or not right.any():
        return 0.0
    wide_left, wide_right = left.astype(np.float64), right.astype(np.float64)
    return max(0.0, float(np.sum((wide_left.T @ wide_left) * (wide_right @ wide_right.T))))
