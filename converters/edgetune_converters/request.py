"""The request for an export: what is read, which artifacts are written, and how."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgetune_converters.gguf.values import Scalar
from edgetune_converters.names import ORIGINAL, FormatName, MergeBaseName
from edgetune_converters.quantization.overrides import NONE, Overrides

if TYPE_CHECKING:
    from edgetune_converters.adapters.combined import Combination
    from edgetune_converters.merging.score_head import ScoreHead
    from edgetune_converters.onnx.plan import OnnxSettings
    from edgetune_converters.outputs.traced import Tracer


@dataclass(frozen=True)
class Target:
    """One artifact to write."""

    format: FormatName
    """A key of `formats.FORMATS`."""
    type: str
    """Storage type of the file, one of the format's `types`: q4_k_m, bf16, int4, ..."""
    path: Path
    """The file, or for safetensors and onnx the directory, that is written."""


@dataclass(frozen=True)
class ExportRequest:
    """Everything that determines an export. Variants are made with `dataclasses.replace`.

    Only `base` and `targets` are required.
    """

    base: Path
    """Base model: a Hugging Face directory, or a GGUF file."""
    targets: tuple[Target, ...]
    """The artifacts. One read of the base feeds all of them; receipts are returned in this order."""
    adapter: Path | None = None
    """Directory of a PEFT adapter; None exports the base itself."""
    combination: Combination | None = None
    """Several adapters and their weights; `adapter` is then the first of them."""
    score_head: ScoreHead | None = None
    """Score head of a reward model; None for a language model."""
    prompt_task: int | None = None
    """Task whose prompt of multitask prompt tuning is exported; None for the only one."""
    tokenizer: Path | None = None
    """Directory with the tokenizer files; None takes those of the base."""
    chat_template: str | None = None
    """Jinja text that replaces the chat template of the tokenizer."""
    name: str | None = None
    """Name of the model in the metadata of GGUF; None takes the name of the base."""
    merge_base: MergeBaseName = ORIGINAL
    """What the delta of the adapter is added to: the base as it is stored, or quantized to NF4 and dequantized."""
    bnb_record: Mapping[str, Any] | None = None
    """How bitsandbytes quantized the base in training (`quantized` of run.json), for `merge_base="nf4"`; None assumes
    the defaults of bitsandbytes."""
    merge_base_kld: Mapping[str, float] | None = None
    """Mean KL divergence (nats) of each merge base, where that was measured; recorded in the receipts."""
    overrides: Overrides = NONE
    """Storage types of single tensors in GGUF."""
    imatrix: Path | None = None
    """Importance matrix of llama-imatrix, GGUF or .dat."""
    allow_fallback: bool = False
    """Accept another storage type where rows do not divide the block, however large its share of the bytes."""
    onnx_settings: OnnxSettings | None = None
    """Blocks, zero points and operators of ONNX; None takes the defaults."""
    tracer: Tracer | None = None
    """Exporter of ONNX graphs for families that edgetune has no graph for; None refuses them."""
    split_max_size: int | None = None
    """Largest file of a split GGUF in bytes; None writes one file."""
    max_shard_size: int | None = None
    """Largest file of a safetensors directory in bytes; None takes 5 GB."""
    lora_rank: int | None = None
    """Rank of the pairs that approximate other changes in a GGUF adapter, and of pairs of a higher rank; None refuses
    the former and keeps the latter."""
    lora_max_error: float = 0.1
    """Largest relative error of the approximated changes of a GGUF adapter."""
    measure_survival: bool = False
    """Measure for each tensor how much of the delta survives quantization; quantizes twice."""
    metadata: Mapping[str, Scalar] = field(default_factory=dict)
    """Further metadata of GGUF and ONNX files."""
    expected_base: Mapping[str, str] | None = None
    """SHA-256 of the files of the base by name; another base fails with AdapterError."""
    expected_adapter: Mapping[str, str] | None = None
    """SHA-256 of the files of the adapter by name; another adapter fails with AdapterError."""
    threads: int = 0
    """Worker threads; 0 takes all cores."""
    write_receipts: bool = False
    """Write the receipt of each artifact beside it, in the moment in which the artifacts are renamed into place."""

    def paths(self, format_: FormatName) -> dict[str, Path]:
        """Return storage type -> path for the targets of one format."""
        return {target.type: target.path for target in self.targets if target.format == format_}

    def for_trial(self, target: Target) -> ExportRequest:
        """Return the request for a temporary artifact of the same model, which is measured and then deleted."""
        return replace(
            self, targets=(target,), split_max_size=None, measure_survival=False, metadata={}, write_receipts=False,
            score_head=None,
        )  # fmt: skip
