"""A base with its adapter, matched and checked before any weight is read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from edgetune_converters.adapters.adapter import Adapter
from edgetune_converters.adapters.base_targets import BaseTargets
from edgetune_converters.adapters.change import Change
from edgetune_converters.adapters.combined import Combination, CombinedAdapter, open_combination
from edgetune_converters.adapters.expert_factors import ExpertPart
from edgetune_converters.adapters.peft_config import CONFIG_FILE
from edgetune_converters.adapters.soft_prompt import PrefixAdapter, SoftPromptAdapter, VirtualTokenAdapter, open_adapter
from edgetune_converters.architectures import (
    BoundTensor,
    Family,
    Head,
    ModelConfig,
    Piece,
    bind,
    completed_config,
    expert_slices,
    family_of,
    slots,
    stored_transposed,
    targets,
)
from edgetune_converters.architectures.rope import context_notes
from edgetune_converters.errors import AdapterError, ArchitectureError
from edgetune_converters.merging import expanded_blocks, prefix_state, stream
from edgetune_converters.merging.base_layout import BaseTensor, base_tensors
from edgetune_converters.merging.merge_base import MergeBase
from edgetune_converters.merging.new_biases import NewBiases, with_biases_of
from edgetune_converters.merging.resized_vocabulary import ResizedVocabulary, with_rows, with_vocabulary_of
from edgetune_converters.merging.score_head import ScoreHead, ScoreTensor
from edgetune_converters.merging.soft_prompt_rows import SoftPromptRows, place_rows
from edgetune_converters.names import ORIGINAL
from edgetune_converters.quantization import recipes
from edgetune_converters.reading.checkpoint import Checkpoint
from edgetune_converters.reading.gguf_base import GgufBase, open_base


@dataclass(frozen=True)
class Model:
    """The input of an export. `tensors` are those of GGUF in the order of the file."""

    checkpoint: Checkpoint
    adapter: Adapter | None
    family: Family
    config: ModelConfig
    tensors: list[stream.MergedTensor]
    bound: list[BoundTensor]
    changes: Mapping[str, Change]
    merge_base: MergeBase
    resized: ResizedVocabulary | None = None
    """Where the adapter has more or fewer rows of embeddings than the base."""
    soft_prompt: SoftPromptRows | None = None
    """The place of a soft prompt in the vocabulary."""
    new_biases: NewBiases | None = None
    """Where the adapter has biases of layers that have none in the base."""
    score_head: ScoreHead | None = None
    """The score head of a reward model."""

    @property
    def prefix(self) -> PrefixAdapter | None:
        """The keys and values before every text, where the adapter is of prefix tuning."""
        return self.adapter if isinstance(self.adapter, PrefixAdapter) else None

    @property
    def tied(self) -> bool:
        """Whether the embedding is the output matrix."""
        return not any(tensor.slot == slots.OUTPUT for tensor in self.tensors)

    def check_format(self, format_: str) -> None:
        """Raise EdgetuneError if an output of this format cannot hold what the training added to the base."""
        if format_ == "gguf" and self.family.head is Head.NEVER and not self.tied:
            raise ArchitectureError(
                "gguf: the output matrix differs from the embedding, and llama.cpp has none of its own for "
                f"{self.family.name}",
                "Export onnx or safetensors, which have one, or train neither the head nor the embedding, or both tied",
            )
        if self.new_biases is not None:
            self.new_biases.check(format_)
        if self.score_head is not None:
            self.score_head.check(format_, self.family, self.config)

    @property
    def config_json(self) -> Mapping[str, Any]:
        """config.json for a merged model: the base's own with the rows of the embedding.

        That of a multimodal model keeps its parts; others state the family's defaults too.
        """
        stated = self.checkpoint.config
        seeing = isinstance(stated.get("text_config"), Mapping)
        raw = stated if seeing else completed_config(stated, class_defaults=False).raw
        if self.soft_prompt is not None and self.soft_prompt.added:
            return with_rows(raw, self.config.vocab_size)
        return raw if self.resized is None else with_rows(raw, self.resized.rows)

    @cached_property
    def towers(self) -> list[BaseTensor]:
        """The tensors of a multimodal model beside its text part, unchanged."""
        return [
            BaseTensor(info.name, info.shape, stream.TensorPart(Piece(info.name, info)))
            for info in self.checkpoint.tensors.values()
            if self.family.is_beside_text(info.name)
        ]

    @property
    def notes_of_runnable_files(self) -> list[str]:
        """Notes on GGUF and ONNX alike: the text part of a multimodal model alone, the stated context."""
        seeing = self.towers or self.config.get("vision_config") is not None
        text_only = ["only the text part is exported: the file does not hold what the model needs to see pictures"]
        return (text_only if seeing else []) + context_notes(self.config)

    @cached_property
    def in_base_order(self) -> list[BaseTensor]:
        """The tensors under the base's names, each where the stream of GGUF tensors first reads it."""
        places = {name: index for index, tensor in reversed(list(enumerate(self.tensors))) for name in tensor.sources}
        tensors = base_tensors(self.family, self.checkpoint.tensors, self.tensors, self.bound, self.changes)
        return sorted(tensors, key=lambda tensor: places.get(tensor.source.name, len(places)))

    @cached_property
    def of_directory(self) -> list[BaseTensor | ScoreTensor]:
        """The tensors of a safetensors directory: of a reward model, the score head is in place of the output."""
        tensors = [*self.in_base_order, *self.towers]
        if self.score_head is None:
            return [*tensors]
        heads = {piece.target for item in self.bound if item.slot == slots.OUTPUT for piece in item.pieces}
        return [*(tensor for tensor in tensors if tensor.part.piece.target not in heads), ScoreTensor(self.score_head)]

    @cached_property
    def in_hf_row_order(self) -> list[stream.MergedTensor]:
        """The tensors with rotated heads in the base's row order; unaffected ones are the same objects."""
        return [tensor.in_hf_row_order for tensor in self.tensors]

    @property
    def facts(self) -> recipes.ModelFacts:
        """The properties on which mixes depend."""
        stated = {key: value.data for key, make in self.family.metadata if (value := make(self.config)) is not None}
        shared = stated.get("attention.head_count_kv")
        first = shared[0] if isinstance(shared, list) else shared
        experts = stated.get("expert_count", 0)
        assert isinstance(first, int)
        assert isinstance(experts, int)
        return recipes.ModelFacts(self.config.layers, self.config.heads, first, self.family.gguf, experts)

    @property
    def tensor_facts(self) -> list[recipes.TensorFacts]:
        """The tensors to be planned."""
        return [
            recipes.TensorFacts(
                tensor.slot, tensor.part, tensor.layer, tensor.gguf_name, tensor.shape, tensor.dtype.lower()
            )
            for tensor in self.tensors
        ]

    @property
    def input_notes(self) -> list[str]:
        """Notes on what the base and the adapter have that is not used, for every format."""
        resized = [self.resized.note] if self.resized else []
        soft = self.soft_prompt.notes if self.soft_prompt else []
        of_adapter = self.adapter.notes if self.adapter else []
        return [*self.checkpoint.notes, *self._notes_on_left_out, *resized, *soft, *of_adapter, *self._notes_on_places]

    def with_soft_prompt(self, first: int) -> Model:
        """Return the model with the soft prompt of its adapter as rows of the vocabulary from the id `first` on.

        Raises:
            AdapterError: The soft prompt does not fit the base.
        """
        assert isinstance(self.adapter, SoftPromptAdapter)
        place, config, bound, changes = place_rows(
            self.adapter, first, self.family, self.config, self.checkpoint, self.bound
        )
        tensors = stream.merged_tensors(self.family, config, self.checkpoint, bound, changes)
        applied = self.merge_base.apply(tensors, self.family.canonical_name)
        return replace(self, config=config, bound=bound, changes=changes, tensors=applied, soft_prompt=place)

    @property
    def _notes_on_left_out(self) -> list[str]:
        """Notes on tensors of the base that are in no output."""
        canonical = [self.family.canonical_name(name) for name in self.checkpoint.tensors]
        buffers = [name for name in canonical if self.family.is_buffer(name)]
        notes = [f"{_some(buffers)} computed when the model is loaded: left out"] if buffers else []
        if any(self.family.is_behind_the_last(name, self.config) for name in canonical):
            notes.append("the layers that predict further tokens ahead are left out: the model answers without them")
        return notes

    @property
    def _notes_on_places(self) -> list[str]:
        """Notes on an adapter in the directory of the base, and on one that was trained on a base in 4 bits."""
        if self.adapter is None:
            if (self.checkpoint.path / CONFIG_FILE).is_file():
                return [f"an adapter lies in the directory of the base and is not merged: {CONFIG_FILE}"]
            return []
        name = self.adapter.config.four_bit_base
        if name is None or self.merge_base.name != ORIGINAL or self.checkpoint.is_quantized:
            return []
        return [
            f"the adapter was trained on a base in 4 bits ({name}) and is merged into one that is not rounded: "
            "--merge-base nf4 is closer to the training"
        ]

    @property
    def notes(self) -> list[str]:
        """Notes on what GGUF cannot represent, and on uncertainties of the merge base."""
        stated = [text for note in self.family.notes if (text := note(self.config))]
        return stated + self.notes_of_runnable_files + self.merge_base.notes


def _some(names: list[str]) -> str:
    """Return `NAME is`, or `NAME and 3 more are`."""
    return f"{names[0]} and {len(names) - 1} more are" if len(names) > 1 else f"{names[0]} is"


def open_model(
    base: Path,
    adapter_path: Path | None,
    merge_base: MergeBase,
    prompt_task: int | None = None,
    combination: Combination | None = None,
) -> Model:
    """Read the headers of base and adapter and match the two. Raises EdgetuneError of the part at fault.

    A soft prompt has its place once the tokenizer is known: `Model.with_soft_prompt`.

    Args:
        base: A model directory or a GGUF file.
        adapter_path: The directory of an adapter.
        merge_base: What the changes are added to.
        prompt_task: The task of multitask prompt tuning; None for the only one.
        combination: Several adapters, in place of the one.
    """
    checkpoint = open_base(base)
    config = completed_config(checkpoint.config, class_defaults=not isinstance(checkpoint, GgufBase))
    family = family_of(config).with_bare_names(checkpoint.tensors)
    bound = bind(family, config, checkpoint.tensors, checkpoint.zero_biases)
    adapter = None if adapter_path is None else open_adapter(adapter_path, prompt_task)
    if combination is not None:
        adapter = open_combination(combination, open_adapter)
    if adapter is not None and adapter.path.resolve() == base.resolve():
        raise AdapterError(
            f"{base} is given as the base and as the adapter: a model beside an adapter usually contains it already",
            "Give the model that was trained on with --base; to export the model in the directory, leave out --adapter",
        )
    if isinstance(adapter, PrefixAdapter):
        prefix_state.check_fits(adapter, family, config)
    changes: Mapping[str, Change] = {}
    resized = None
    new_biases = None
    renamed: Callable[[str], str] = family.canonical_name
    if adapter is not None and not isinstance(adapter, VirtualTokenAdapter):
        if isinstance(adapter, CombinedAdapter):  # before the base takes the shape of the first adapter
            _check_combination(adapter, family, config, checkpoint, bound)
        renamed = expanded_blocks.renamed(family, adapter.config.raw.get(expanded_blocks.BLOCKS))
        expanded = expanded_blocks.expand(adapter, family, config, checkpoint)
        if expanded is not config:
            config, bound = expanded, bind(family, expanded, checkpoint.tensors, checkpoint.zero_biases)
        known = _as_adapters_see_it(family, config, bound, checkpoint)
        resized = with_vocabulary_of(adapter, family, config, checkpoint, bound, known)
        if resized is not None:
            config, bound = resized.config, resized.bound
            known = _as_adapters_see_it(family, config, bound, checkpoint)
        new_biases = with_biases_of(adapter, family, config, checkpoint, bound, known)
        if new_biases is not None:
            family, config = new_biases.family, new_biases.config
            bound = bind(family, config, checkpoint.tensors, checkpoint.zero_biases)
            known = _as_adapters_see_it(family, config, bound, checkpoint)
        changes = adapter.changes(known)
    tensors = stream.merged_tensors(family, config, checkpoint, bound, changes)
    applied = merge_base.apply(tensors, renamed)
    return Model(
        checkpoint, adapter, family, config, applied, bound, changes, merge_base, resized, new_biases=new_biases
    )


def _check_combination(
    adapter: CombinedAdapter, family: Family, config: ModelConfig, checkpoint: Checkpoint, bound: list[BoundTensor]
) -> None:
    """Raise AdapterError for an adapter that changes the shape of the model: the others do not fit it."""
    given = family, config, checkpoint, bound, _as_adapters_see_it(family, config, bound, checkpoint)
    for part in adapter.parts:
        if isinstance(part, VirtualTokenAdapter):
            raise AdapterError(
                f"{part.path} has virtual tokens ({part.peft_type}), and cannot be combined with other adapters",
                "Export it alone, with --adapter",
            )
        if part.config.raw.get(expanded_blocks.BLOCKS):  # its tensors fit no tensor of the base
            found = ["new blocks"]
        else:
            reasons = {
                "another number of rows of embeddings": with_vocabulary_of(part, *given),
                "biases that the base has not": with_biases_of(part, *given),
            }
            found = [name for name, value in reasons.items() if value is not None]
        if found:
            raise AdapterError(
                f"{part.path} has {' and '.join(found)}, and cannot be combined with other adapters",
                "Export it alone to safetensors, and give the result with --base",
            )


def _as_adapters_see_it(
    family: Family, config: ModelConfig, bound: list[BoundTensor], checkpoint: Checkpoint
) -> BaseTargets:
    """Describe the base for the matching of an adapter."""
    pieces = {item.slot: item.pieces[0] for item in bound if item.slot in (slots.EMBEDDING, slots.OUTPUT)}
    embedding, head = pieces[slots.EMBEDDING], pieces.get(slots.OUTPUT)
    parts = {
        name: ExpertPart(place.target, place.number, place.first, *shape)
        for name, (place, shape) in expert_slices(family, config).items()
    }
    tied = {head.target: embedding.target} if head and head.source.name == embedding.source.name else {}
    beside = {name: info.shape for name, info in checkpoint.tensors.items() if family.is_beside_text(name)}
    sources = {piece.target: piece.source for item in bound for piece in item.pieces}
    return BaseTargets(
        targets(bound), family.canonical_name, stored_transposed(bound), parts, tied, family.is_beside_text,
        beside, lambda target: partial(checkpoint.stored, sources[target]),
    )  # fmt: skip
