"""Verify an exported file using only what is embedded in it: its hashes, its contract and its golden first tokens.

This tells an intact file from a damaged or a foreign one, on the machine where it will run. The cost of quantization is
measured by `edgetune validate`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from edgetune.console import Progress
from edgetune.errors import RunDirectoryError
from edgetune.reference import golden
from edgetune.reference.golden import GoldenSet
from edgetune.runtime import Runtime, load
from edgetune.validation import contract
from edgetune.validation.choices import log_likelihoods
from edgetune_converters.errors import ArtifactError
from edgetune_converters.gguf import keys
from edgetune_converters.provenance.receipts import Receipt, receipt_path

PUBLISHED = {
    "f32": 0.0, "f16": 0.0, "bf16": 0.0, "q8": 0.0014, "int8": 0.0014, "q6": 0.0055, "q5": 0.011, "q4_k": 0.031,
    "q4": 0.072, "iq4": 0.072, "int4": 0.072, "q3": 0.10, "iq3": 0.10,
}  # fmt: skip
"""Mean KLD in nats by the beginning of the type's name: Llama-3-8B as published by llama.cpp, or the nearest type."""
_COARSEST = 0.45  # q2_k
_MERGING = 0.1  # the model was trained on a 4-bit base, the file has another: published cases cost 0.02 to 0.05
_SPREAD = 5  # models other than Llama-3-8B, and few prompts


@dataclass(frozen=True)
class Check:
    """One check."""

    name: str
    """receipt, data, template, tokens, BOS, stop or first tokens."""
    passed: bool | None
    """None: the file has nothing to compare with."""
    detail: str


@dataclass(frozen=True)
class Verification:
    """The result of all checks."""

    checks: list[Check]

    @property
    def failed(self) -> list[Check]:
        """The checks that failed."""
        return [check for check in self.checks if check.passed is False]

    @property
    def is_empty(self) -> bool:
        """Whether no check could be made."""
        return all(check.passed is None for check in self.checks)


def limit_for(metadata: Mapping[str, Any]) -> float:
    """Return the largest mean KLD of first tokens that the storage type of a file explains."""
    recipe = str(metadata.get(keys.RECIPE, "")).lower()
    known = max((name for name in PUBLISHED if recipe.startswith(name)), key=len, default=None)
    return _MERGING + _SPREAD * (_COARSEST if known is None else PUBLISHED[known])


def verify(path: Path, *, max_kld: float | None = None, threads: int | None = None, progress: Progress) -> Verification:
    """Make all checks. With `max_kld` None, the limit for the first tokens depends on the file's storage type.

    Raises:
        ArtifactError, RuntimeProblem: The file cannot be opened.
    """
    checks = [_receipt(path)]
    with load(path, threads=threads) as runtime:
        checks.append(_data(runtime))
        carried = golden.read(runtime.metadata, path)
        if carried is None:
            return Verification([*checks, Check("golden", None, "the file has no golden conversations")])
        checks += _contract(runtime, carried)
        limit = limit_for(runtime.metadata) if max_kld is None else max_kld
        checks.append(_first_tokens(runtime, carried, limit, progress))
    return Verification(checks)


def _receipt(path: Path) -> Check:
    """Check the hash of the file against the receipt beside it."""
    if not receipt_path(path).is_file():
        return Check("receipt", None, "there is no receipt beside the file")
    try:
        Receipt.read(path).check()
    except ArtifactError as error:
        return Check("receipt", False, error.message)
    return Check("receipt", True, "the file matches its receipt")


def _data(runtime: Runtime) -> Check:
    """Check the hash of the weights in the metadata."""
    if keys.DATA_HASH not in runtime.metadata:
        return Check("data", None, "the file has no hash of its weights")
    try:
        runtime.verify()
    except ArtifactError as error:
        return Check("data", False, error.message)
    return Check("data", True, "the weights match their hash")


def _contract(runtime: Runtime, carried: GoldenSet) -> list[Check]:
    conversations = carried.conversations
    missing = sorted(carried.stop_ids - runtime.stop_tokens)
    found = {
        "template": contract.first(contract.rendering_difference(runtime, entry) for entry in conversations)
        if runtime.chat_template
        else "the file has no chat template",
        "BOS": contract.first(contract.bos_difference(runtime, entry) for entry in conversations),
        "tokens": contract.first(contract.token_difference(runtime, entry) for entry in conversations),
        "stop": f"the file does not stop at token {missing[0]}" if missing else None,
    }
    held = f"as in training, in {len(conversations)} conversations"
    return [Check(name, difference is None, difference or held) for name, difference in found.items()]


def _first_tokens(runtime: Runtime, carried: GoldenSet, max_kld: float, progress: Progress) -> Check:
    """Check the KL divergence of the first token of each answer, over the embedded tokens and the rest as one."""
    asked = [entry for entry in carried.conversations if "first" in entry and _first_length(entry) < runtime.context]
    if not asked:
        return Check("first tokens", None, "the file has none")
    klds, same = [], 0
    for done, entry in enumerate(asked, 1):
        kld, is_same = _first_token(runtime, entry)
        klds.append(kld)
        same += is_same
        progress(done, len(asked))
    mean = float(np.mean(klds))
    detail = f"mean KLD {mean:.3g} over {len(asked)} prompts, same top token in {same} of them"
    return Check("first tokens", bool(mean <= max_kld), f"{detail}; the limit is {max_kld:g}")


def _first_length(entry: Mapping[str, Any]) -> int:
    return len(entry["ids"]) + len(entry["first"].get("after", []))


def _first_token(runtime: Runtime, entry: Mapping[str, Any]) -> tuple[float, bool]:
    ids = np.asarray([*entry["ids"], *entry["first"].get("after", []), 0], np.int32)
    tokens = np.asarray(entry["first"]["ids"], np.int64)
    if len(tokens) == 0 or tokens.min() < 0 or tokens.max() >= runtime.vocabulary_size:
        raise RunDirectoryError(f"{keys.GOLDEN} names tokens that {runtime.path} has not", "Export the file again.")
    (block,) = runtime.score(ids, np.array([len(ids) - 1]))
    ours = log_likelihoods(np.repeat(block, len(tokens), axis=0), tokens)
    theirs = np.asarray(entry["first"]["log_probs"], np.float64)
    rest = [np.log(max(1 - np.exp(each).sum(), 1e-9)) for each in (theirs, ours)]
    theirs, ours = np.append(theirs, rest[0]), np.append(ours, rest[1])
    kld = float((np.exp(theirs) * (theirs - ours)).sum())
    return (kld if np.isfinite(kld) else np.inf), bool(block[0].argmax() == tokens[0])
