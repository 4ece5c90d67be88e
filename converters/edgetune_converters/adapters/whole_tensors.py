"""Adapters that hold trained tensors of the base whole: BitFit, `freeze`, LLaMA Pro and full fine-tuning.

PEFT does not have these methods; edgetune's training names them in `edgetune_method` of adapter_config.json.
"""

from __future__ import annotations

from collections.abc import Mapping

from edgetune_converters.adapters.matching import Kind, Matching
from edgetune_converters.adapters.state_dict import RoleNames
from edgetune_converters.tensors import TensorInfo


class _Replacing(Matching):
    """A head that is the embedding stays so; tensors beside the text part are those of the base."""

    def _replace(self, replacements: Mapping[str, TensorInfo]) -> None:
        super()._replace({name: info for name, info in replacements.items() if not self._base.beside_text(name)})
        for head, embedding in self._base.tied.items():
            if head not in self.changes and embedding in self.changes:
                self.changes[head] = self.changes[embedding]


def _kind(title: str, *fields: str) -> Kind:
    known = frozenset((*fields, "edgetune_method", "zero_in_base"))
    return Kind(RoleNames(title), lambda module: (), known, matching=_Replacing)


WHOLE_TENSORS = {
    "bitfit": _kind("BitFit", "added_to"),
    "freeze": _kind("freeze", "layers", "modules", "also"),
    "llama-pro": _kind("LLaMA Pro", "new_blocks", "blocks"),
    "full": _kind("full fine-tuning"),
}
"""`edgetune_method` -> how these adapters are merged."""
