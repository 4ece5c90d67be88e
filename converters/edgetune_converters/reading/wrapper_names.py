"""Names that training wrappers put into the keys of a state dict, and the names without them.

torch.compile, FSDP and activation checkpointing add a component anywhere in a key; DistributedDataParallel, DeepSpeed,
Lightning, TRL and nested PEFT models put one in front of all keys. Neither says anything about the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import NamedTuple

# added by a wrapper around any module; no module of a model has such a name
_ANYWHERE = frozenset(
    {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fpw_module", "_forward_module"}
)
# put in front of all keys; a model can have modules of these names, so the base decides
_IN_FRONT = frozenset({"base_model", "model", "module", "pretrained_model"})


# first component of the names of a model with its head, which a model without it lacks
_OF_HEADED_MODELS = ("model.", "transformer.", "gpt_neox.")


class PrefixChoice(NamedTuple):
    """The name of each module without the wrapper in front of it, what was removed, and names that fit in two ways."""

    names: Mapping[str, str]
    removed: tuple[str, ...]
    ambiguous: Mapping[str, tuple[str, ...]]


def without_inner_wrappers(key: str) -> str:
    """Return a key without the components that wrappers add anywhere in it."""
    return ".".join(part for part in key.split(".") if part not in _ANYWHERE)


def inner_wrappers(keys: Iterable[str]) -> tuple[str, ...]:
    """Return the names of wrappers that occur in keys, sorted."""
    return tuple(sorted(_ANYWHERE & {part for key in keys for part in key.split(".")}))


def missing_prefix(names: Collection[str], fits: Callable[[str], bool]) -> str:
    """Return the prefix without which no name is one of the base model and with which all are; "" without one."""
    known = [name for name in names if any(fits(name.removeprefix(prefix)) for prefix in _prefixes(name))]
    if known or not names:
        return ""
    return next((prefix for prefix in _OF_HEADED_MODELS if all(fits(prefix + name) for name in names)), "")


def without_prefix(names: Iterable[str], fits: Callable[[str], bool]) -> PrefixChoice:
    """Remove the wrapper in front of the names of modules.

    A wrapper holds the whole model, so one prefix is looked for that all names have; only if there is none is each
    name judged alone. Names that fit as they are stay so.

    Args:
        names: Names of modules as an adapter spells them.
        fits: Whether a name is one of the base model.

    Returns:
        Every name, without the prefix where one was found. Names that fit nothing are unchanged.
    """
    options = {name: [prefix for prefix in _prefixes(name) if fits(name.removeprefix(prefix))] for name in names}
    known = [set(found) for found in options.values() if found]
    common = set.intersection(*known) if known else {""}
    if "" in common or len(common) == 1:
        prefix = "" if "" in common else next(iter(common))
        names_found = {name: name.removeprefix(prefix) if found else name for name, found in options.items()}
        return PrefixChoice(names_found, (prefix,) if prefix else (), {})
    chosen = {name: name.removeprefix(found[0]) if len(found) == 1 else name for name, found in options.items()}
    removed = sorted({found[0] for found in options.values() if len(found) == 1 and found[0]})
    ambiguous = {
        name: tuple(name.removeprefix(prefix) for prefix in found) for name, found in options.items() if len(found) > 1
    }
    return PrefixChoice(chosen, tuple(removed), ambiguous)


def _prefixes(name: str) -> Iterator[str]:
    """Yield the prefixes that a wrapper may have put in front of a name, the empty one first."""
    yield ""
    parts = name.split(".")
    for count, part in enumerate(parts[:-1], 1):
        if part not in _IN_FRONT:
            return
        yield ".".join(parts[:count]) + "."
