"""Rows of tokens in embedding and head: which are trained, and the first values of new ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from peft import TrainableTokensConfig
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch.nn.utils import parametrize

from edgetune.errors import ConfigError
from edgetune.methods.trainable_tokens import TrainableTokens
from edgetune.training.adapters.selective import (
    WEIGHTS_FILE,
    Selection,
    SelectiveModel,
    copy_values,
    select,
    trained_tensors,
)

TOKENIZER_FILE = "tokenizer.json"


class _ReplacedRows(torch.nn.Module):
    """A weight whose rows `ids` are a parameter of their own."""

    def __init__(self, ids: Sequence[int], rows: torch.nn.Parameter) -> None:
        super().__init__()
        self.register_buffer("ids", torch.tensor(ids, device=rows.device), persistent=False)
        self.rows = rows

    def forward(self, weight: torch.Tensor) -> torch.Tensor:
        return weight.index_copy(0, cast("torch.Tensor", self.ids), self.rows.to(weight.dtype))


class TokenRowsModel(SelectiveModel):
    """A model of which rows of embedding and head are trained, and stored as PEFT's TRAINABLE_TOKENS.

    PEFT's own layers are not used in training: TRL multiplies by `lm_head.weight`, which PEFT leaves as it was.
    """

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:
        """Write the rows in f32, and adapter_config.json of PEFT."""
        folder = Path(save_directory)
        options = {name: self.selection.options[name] for name in ("token_indices", "target_modules")}
        config = TrainableTokensConfig(task_type="CAUSAL_LM", inference_mode=True, **options)
        config.base_model_name_or_path = cast("Any", self).name_or_path
        config.save_pretrained(str(folder))
        values = {self._stored_name(name): rows for name, rows in trained_tensors(self).items()}
        save_file(values, folder / WEIGHTS_FILE, metadata={"format": "pt"})

    def load_trained(self, directory: Path) -> None:
        """Read the rows from a directory of `save_pretrained`."""
        stored = load_file(directory / WEIGHTS_FILE)
        parameters = self.selection.parameters
        copy_values(parameters, {name: stored[self._stored_name(name)] for name in parameters})

    @staticmethod
    def _stored_name(name: str) -> str:
        return f"base_model.model.{name.partition('.parametrizations.')[0]}.trainable_tokens_delta"


def add_token_rows(model: Any, adapter: TrainableTokens, ids: Mapping[str, int | None]) -> Any:
    """Return the model, of which only the rows of the named tokens are trained.

    Args:
        model: The base, with rows for new tokens.
        adapter: The named tokens.
        ids: Their ids, None for what is no token.

    Raises:
        ConfigError: No token is named, or a token does not exist.
    """
    named = [*adapter.tokens, *adapter.added]
    if not named:
        raise ConfigError(
            "adapter.kind trainable-tokens names no token", "Name some in adapter.tokens or adapter.new_tokens"
        )
    if unknown := [token for token in named if ids.get(token) is None]:
        raise ConfigError(
            f"adapter.tokens names what is no token of the base: {', '.join(map(repr, unknown))}",
            "Name new tokens in adapter.new_tokens",
        )
    trained = sorted(id_ for token in named if (id_ := ids[token]) is not None)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    tied = head is not None and head.weight is embedding.weight
    rows = _replace_rows(embedding, trained)
    if tied:
        _replace_rows(head, trained, rows)
    targets = [names[id(layer)] for layer in (embedding, *([] if tied or head is None else [head]))]
    if len(targets) > 1:
        _replace_rows(head, trained)
    options = {"token_indices": trained, "target_modules": targets}
    chosen = [f"{name}.parametrizations.weight.0.rows" for name in targets]
    return select(model, Selection.of(model, adapter.kind, chosen, options=options), TokenRowsModel)


def _replace_rows(layer: Any, ids: Sequence[int], rows: torch.nn.Parameter | None = None) -> torch.nn.Parameter:
    """Make rows of a layer's weight a parameter of their own, and return it; `rows`: that of a tied layer."""
    rows = torch.nn.Parameter(layer.weight.detach()[list(ids)].float()) if rows is None else rows
    parametrize.register_parametrization(layer, "weight", _ReplacedRows(ids, rows))
    return rows


def add_rows(model: Any, before: Path, after: Path, tokens: Sequence[str]) -> None:
    """Give embedding and head the rows of new tokens: the mean of the rows of the tokens that each text was before.

    Args:
        model: The base; it is resized if it has fewer rows than tokens.
        before: The directory of the base's own tokenizer.
        after: The directory of the tokenizer with the new tokens.
        tokens: Texts of the new tokens.
    """
    own, extended = (Tokenizer.from_file(str(folder / TOKENIZER_FILE)) for folder in (before, after))
    ids = {token: int(extended.token_to_id(token) or 0) for token in tokens}
    rows = max(model.get_input_embeddings().weight.shape[0], 1 + max(ids.values()))
    model.resize_token_embeddings(rows, mean_resizing=False)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    layers = [embedding] if head is None or head.weight is embedding.weight else [embedding, head]
    with torch.no_grad():
        for token, id_ in ids.items():
            pieces = own.encode(token, add_special_tokens=False).ids
            for layer in layers:
                layer.weight[id_] = layer.weight[pieces].float().mean(0)
