"""Adapters that hold trained tensors of the base whole: BitFit, `freeze`, LLaMA Pro and full fine-tuning.

PEFT does not have these methods; edgetune's training names them in `edgetune_method` of adapter_config.json.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import replace

from edgetune_converters.adapters.matching import Kind, Matching
from edgetune_converters.adapters.state_dict import RoleNames, as_one_line
from edgetune_converters.tensors import TensorInfo

_ANY = re.compile(r"(?P<module>.+)\.(?P<part>[^.]+)")


class _TensorNames(RoleNames):
    """Every name is that of a tensor of the base, whatever it ends with."""

    def replaced_by(self, name: str) -> re.Match[str] | None:
        return _ANY.fullmatch(name)


class _Replacing(Matching):
    """A head that is the embedding stays so; tensors beside the text part are those of the base."""

    def _replace(self, replacements: Mapping[str, TensorInfo]) -> None:
        own = {name: info for name, info in replacements.items() if not self._base.beside_text(name)}
        super()._replace({name: self._as_in_base(name, info) for name, info in own.items()})
        for head, embedding in self._base.tied.items():
            if head not in self.changes and embedding in self.changes:
                self.changes[head] = self.changes[embedding]

        stored = {self._base.renamed(name) for name in replacements}
        absent = [  # experts, whose names end otherwise, may be stored one by one
            name
            for name in self._config.raw.get("trained_tensors") or ()
            if name.endswith((".weight", ".bias"))
            and (target := self._base.renamed(name)) in self._base.shapes
            and target not in stored
        ]
        self.problems += as_one_line(
            absent, "is a trained tensor that the adapter lacks", "are trained tensors that the adapter lacks"
        )

    def _as_in_base(self, name: str, info: TensorInfo) -> TensorInfo:
        """Biases of all experts are one vector in the table of architectures."""
        shape = self._base.shapes.get(self._base.renamed(name), info.shape)
        return replace(info, shape=shape) if len(shape) == 1 and shape == (math.prod(info.shape),) else info


def _kind(title: str, *fields: str) -> Kind:
    known = frozenset((*fields, "edgetune_method", "zero_in_base", "trained_tensors"))
    return Kind(_TensorNames(title), lambda module: (), known, matching=_Replacing)


MERGED_BY_PEFT = "merged-by-peft"
"""`edgetune_method` of a temporary adapter with the layers that PEFT merged; `identity` are the hashes of its own."""

WHOLE_TENSORS = {
    MERGED_BY_PEFT: _kind("merged", "identity", "merged_by"),
    "bitfit": _kind("BitFit", "added_to"),
    "freeze": _kind("freeze", "layers", "modules", "also"),
    "llama-pro": _kind("LLaMA Pro", "new_blocks", "blocks"),
    "full": _kind("full fine-tuning"),
}
"""`edgetune_method` -> how these adapters are merged."""
