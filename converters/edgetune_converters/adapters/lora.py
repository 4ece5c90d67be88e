"""LoRA adapters: pairs A, B of a module, of a parameter of all experts, or of single experts.

Each pair is used exactly once.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change, Transform, on_transposed
from edgetune_converters.adapters.directory import INITIAL
from edgetune_converters.adapters.dora import ScaledRows
from edgetune_converters.adapters.expert_factors import ExpertPair, ExpertPart, PairsOfExperts, StackCache
from edgetune_converters.adapters.lora_variants import (
    PLAIN,
    Spelling,
    spelling_of,
    start_of,
    without_orthogonal_start,
)
from edgetune_converters.adapters.matching import MERGE_FIRST, PACKED_SUFFIX, AdapterParts, Kind, Matching
from edgetune_converters.adapters.peft_config import PeftConfig
from edgetune_converters.adapters.products import is_zero_product
from edgetune_converters.adapters.state_dict import RoleNames, as_one_line
from edgetune_converters.adapters.weights import AdapterWeights
from edgetune_converters.errors import AdapterError, OnlyPeftError
from edgetune_converters.tensors import ALL, F32, TensorInfo

_MAGNITUDES = "magnitude_vector"
# what MonteCLoRA draws its samples from in training; merged, and run, it is A and B themselves
_SAMPLERS = tuple(
    f"lora_monteclora_sampler.{name}"
    for name in ("std_prior", "expert_weights_prior", "gaussian_var_prior", "expert_weights")
)


@dataclass(frozen=True)
class _Target:
    """The base tensor of an A/B pair; `shapes` are the shapes that A and B must have."""

    target: str
    rank: int
    scale: float
    transposed: bool
    shapes: tuple[tuple[int, ...], tuple[int, ...]]
    experts: int | None = None


class LoraMatching(Matching):
    """The matching of pairs A, B."""

    def __init__(self, adapter: AdapterParts, base: BaseTargets) -> None:
        self._cache = adapter.stacks
        self._without_bias: list[str] = []
        self._with_magnitudes: list[str] = []
        self._without_magnitudes: list[str] = []
        self._pairs_of_experts: dict[str, list[ExpertPair]] = {}
        self._sampled: list[str] = []
        self._start, self._initial = start_of(adapter.config), adapter.initial
        super().__init__(adapter, base)
        self.notes += as_one_line(
            self._sampled, "drew samples in training; left out", "drew samples in training; left out", noun="tensors"
        )

    def further_problems(self) -> Iterator[str]:
        lacking = "a LoRA bias (lora_bias), for which the base has no bias"
        yield from as_one_line(self._without_bias, f"has {lacking}", f"have {lacking}", noun="modules")
        none = f"no lora_{_MAGNITUDES}, and adapter_config.json states DoRA (use_dora)"
        yield from as_one_line(self._without_magnitudes, f"has {none}", f"have {none}", noun="modules")
        some = f"a lora_{_MAGNITUDES} (DoRA), and adapter_config.json does not state use_dora"
        yield from as_one_line(self._with_magnitudes, f"has {some}", f"have {some}", noun="modules")

    def finish(self) -> Iterator[str]:
        yield from super().finish()
        for target, pairs in self._pairs_of_experts.items():
            yield from self._stack(target, pairs)

    def attach(self, module: str, roles: Mapping[str, TensorInfo]) -> Iterator[str]:
        """Attach one module's A/B pair to its base tensor, or yield why it does not fit; list an unknown module."""
        if "B.bias" in roles:
            yield from self._add_bias(module, roles["B.bias"])
            roles = {role: info for role, info in roles.items() if role != "B.bias"}
        magnitudes = roles.get(_MAGNITUDES)
        samplers = [info.name for role, info in roles.items() if f"lora_{role}" in _SAMPLERS]
        self._sampled += samplers
        roles = {role: info for role, info in roles.items() if role != _MAGNITUDES and info.name not in samplers}
        if self._config.flag("use_dora") is not (magnitudes is not None):
            (self._without_magnitudes if magnitudes is None else self._with_magnitudes).append(module)
            return
        embedding = "embedding_A" in roles or "embedding_B" in roles
        wanted = ("embedding_A", "embedding_B") if embedding else ("A", "B")
        if set(roles) != set(wanted):
            yield _missing_partner(module, roles, wanted)
            return
        a, b = (roles[role] for role in wanted)
        if self._base.beside_text(module):
            zero = not (self._file.rows(a, ALL).any() and self._file.rows(b, ALL).any())
            (self.unused_modules if zero else self._changing_towers).append(module)
            return
        renamed = self._base.renamed(module)
        spelled, found = PLAIN, self._linear(module, renamed, embedding)
        if found is not None and not embedding:
            spelled = spelling_of(self._config, module, found.shapes[0][1])
            found = replace(found, shapes=spelled.stored(*found.shapes))
        if found is None and renamed in self._base.experts:
            yield from self._one_expert(module, self._base.experts[renamed], a, b, magnitudes)
            return
        found = found or (self._experts(renamed, a, b) if magnitudes is None else None)
        if found is None:
            self._unknown.append(module)
            return
        if (a.shape, b.shape) != found.shapes:
            shape = list(self._base.shapes[found.target])
            yield f"{module}: A {list(a.shape)} and B {list(b.shape)} do not fit {shape} at rank {found.rank}"
            return
        change = self.changes.setdefault(found.target, Change(self._file))
        if change.factors is not None or change.transform is not None:
            yield f"{module} and {change.names[0]} are one module under two names"
        change.names = [a.name, b.name]
        if magnitudes is None:
            factors = PairFactors(self._file, a, b, found.scale, found.transposed, found.experts, self._cache, spelled)
            yield from self._add_pair(module, change, factors, wanted)
        elif spelled is not PLAIN:
            yield f"{module} combines DoRA with another variant of LoRA"
        elif magnitudes.shape != b.shape[:1]:
            yield f"{magnitudes.name} has the shape {list(magnitudes.shape)}, not {list(b.shape[:1])}"
        else:
            dora = self._dora(a, b, magnitudes, found.scale)
            change.transform = replace(dora, apply=on_transposed(dora.apply)) if found.transposed else dora

    def _add_pair(self, module: str, change: Change, factors: PairFactors, roles: tuple[str, str]) -> Iterator[str]:
        """Attach a pair, with that before training where that was a part of the base, or yield why it does not fit."""
        if self._start is None:
            change.factors = factors
        elif self._initial is not None:
            file, tensors = self._initial
            before = [tensors.modules.get(module, {}).get(role) for role in roles]
            a, b = before
            if a is None or b is None or (a.shape, b.shape) != (factors.a.shape, factors.b.shape):
                yield f"{module}: {INITIAL} has no pair of the same shapes, from which the training started"
                return
            change.factors = replace(factors, initial=(file, a, b))
        elif factors.transposed or factors.spelled is not PLAIN or factors.experts is not None:
            yield f"{module}: the start {self._start} can be found again in plain linear layers alone"
        else:
            rank, scale = factors.a.shape[0], factors.scale
            change.transform = Transform(
                without_orthogonal_start(factors, rank, scale), (factors.a, factors.b), needs_trained=True
            )

    def _dora(self, a: TensorInfo, b: TensorInfo, magnitudes: TensorInfo, scale: float) -> Transform:
        """The transform of a matrix [outputs, inputs]."""
        factors = PairFactors(self._file, a, b, scale, transposed=False, experts=None, cache=self._cache)
        return Transform(
            ScaledRows(factors, partial(self._file.rows, magnitudes, ALL)),
            (magnitudes, a, b),
            lambda: is_zero_product(*factors()),
            needs_trained=True,
        )

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
        transposed = embedding or self.is_transposed(target)
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
            rank, scale = self._config.rank_and_scale(target.removesuffix(PACKED_SUFFIX))
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

    def _one_expert(
        self, module: str, part: ExpertPart, a: TensorInfo, b: TensorInfo, magnitudes: TensorInfo | None
    ) -> Iterator[str]:
        """Keep the pair of one expert for `_stack`, or yield why it does not fit; list an unknown module."""
        target = self.stack_of(part)
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
        if magnitudes is not None:
            if magnitudes.shape != b.shape[:1]:
                yield f"{magnitudes.name} has the shape {list(magnitudes.shape)}, not {list(b.shape[:1])}"
            self._of_experts.setdefault(target, []).append((part, self._dora(a, b, magnitudes, scale)))
            return
        self._pairs_of_experts.setdefault(target, []).append(ExpertPair(part, a, b, scale))

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
class PairFactors:
    """Reads A and B as left [n, r] and right [r, k], with the scale folded into B."""

    file: AdapterWeights
    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool
    experts: int | None
    cache: StackCache
    spelled: Spelling = PLAIN
    initial: tuple[AdapterWeights, TensorInfo, TensorInfo] | None = None
    """A and B before training, where they were a part of the base: their product is taken away."""

    def __call__(self) -> tuple[F32, F32]:
        if self.experts is not None:
            return self.cache(self.b.name, self._read_stack)
        a, b = self._read()
        left, right = (a.T, b.T) if self.transposed else (b, a)
        return np.ascontiguousarray(left), np.ascontiguousarray(right)

    def _read(self) -> tuple[F32, F32]:
        a, b = self.spelled.a(self.file.rows(self.a, ALL)), self.spelled.b(self.file.rows(self.b, ALL))
        if self.initial is not None:
            file, first, second = self.initial
            a = np.concatenate([a, file.rows(first, ALL)])
            b = np.concatenate([b, -file.rows(second, ALL)], axis=1)
        return a, b * np.float32(self.scale)

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


# field of adapter_config.json -> why no weights equal the adapter
_BY_INPUT: Mapping[str, str] = {
    "alora_invocation_tokens": "activated LoRA (alora_invocation_tokens) acts from its invocation tokens on",
    "arrow_config": "Arrow routing (arrow_config) chooses among adapters by the input",
}


def _check(config: PeftConfig) -> None:
    """Refuse what depends on the input, and an adapter whose initialization moved the base for good."""
    for name, why in _BY_INPUT.items():
        if config.raw.get(name):
            raise AdapterError(
                f"{why}: no merged weights equal it", "Run it with PEFT, or train plain LoRA on the same rows"
            )
    if config.raw.get("kasa_config"):
        raise OnlyPeftError(
            "the adapter uses KaSA (kasa_config), which PEFT alone merges: it takes the smallest singular values from "
            "the base",
            MERGE_FIRST,
        )
    start_of(config)


# field of adapter_config.json that is not supported -> name of the variant
_REFUSED: Mapping[str, str] = {
    # of ms-swift before version 3
    "use_qa_lora": "QA-LoRA (use_qa_lora)",
    "use_merged_linear": "merged linear layers (use_merged_linear)",
    "enable_lora": "parts of merged linear layers (enable_lora)",
}

# fields that are read here or by their tensors, and fields that had their effect in training alone
_FIELDS = frozenset(
    {
        *_REFUSED,
        *_BY_INPUT,
        *("use_qalora", "use_bdlora", "monteclora_config", "kasa_config"),
        *("layer_replication", "blocks"),
        *(
            "r",
            "lora_alpha",
            "use_dora",
            "rank_pattern",
            "alpha_pattern",
            "use_rslora",
            "init_lora_weights",
            "target_parameters",
        ),
        *("trainable_token_indices", "bias", "lora_bias"),
        *("lora_dropout", "runtime_config", "megatron_config", "megatron_core", "qalora_group_size", "velora_config"),
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config"),
        *("swift_type", "lora_dtype", "lorap_lr_ratio", "lorap_emb_lr", "group_size", "model_key_mapping"),
        *("loraplus_lr_ratio", "loraplus_lr_embedding", "unsloth_version", "unsloth_fixed", "merge_weights"),
    }
)

LORA = Kind(
    RoleNames(
        "LoRA",
        ("lora_A", "lora_B", "lora_embedding_A", "lora_embedding_B", f"lora_{_MAGNITUDES}", *_SAMPLERS),
        prefix="lora_",
    ),
    lambda module: (),
    fields=_FIELDS,
    refused=_REFUSED,
    check=_check,
    matching=LoraMatching,
)
