"""The RoPE tables: transformers' frequencies, and the same numbers in pieces as at once."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgetune_converters.architectures import ModelConfig
from edgetune_converters.architectures.rotation import rotation
from edgetune_converters.errors import ArchitectureError
from tests.converters.tiny import torch, transformers

_ORIGINAL = {"original_max_position_embeddings": 160}
PARAMETERS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 2.5},
    "llama3": {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, **_ORIGINAL},
    "yarn": {"factor": 4.0, **_ORIGINAL},
    "yarn with scales": {"factor": 4.0, "mscale": 0.8, "mscale_all_dim": 0.5, "beta_fast": 24.0, **_ORIGINAL},
    "yarn untruncated": {"factor": 4.0, "truncate": False, "attention_factor": 1.3, **_ORIGINAL},
}


@pytest.mark.parametrize("name", PARAMETERS)
def test_frequencies_are_those_of_transformers(name: str) -> None:
    """To the last bits: both are f32, and positions far out multiply what differs."""
    stated = {"rope_type": name.split()[0], "rope_theta": 50000.0, **PARAMETERS[name]}
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=2, head_dim=64, max_position_embeddings=640, rope_parameters=stated
    )
    theirs = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(config)
    ours = rotation(ModelConfig(config.to_dict()).rope, 64, 640)
    np.testing.assert_allclose(ours.frequencies, theirs.inv_freq.numpy(), rtol=5e-7)
    assert ours.scale == pytest.approx(theirs.attention_scaling, rel=1e-12)
    cosines, sines = theirs(torch.zeros(1), torch.arange(640)[None])
    for table, wanted in zip(ours.tables(0, 640), (cosines, sines), strict=True):
        np.testing.assert_allclose(table, wanted[0, :, :32].numpy(), atol=2e-4)


def test_tables_in_pieces_are_the_table() -> None:
    longer = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.5, 2.0, 3.0, 4.5]}
    found = rotation({"rope_type": "longrope", "rope_theta": 1e4, **longer, **_ORIGINAL}, 8, 640)
    assert found.rows(640) == 800
    whole = found.tables(0, 800)
    for at, table in enumerate(whole):
        pieces = [found.tables(first, min(first + 70, 800))[at] for first in range(0, 800, 70)]
        assert np.array_equal(np.concatenate(pieces), table)
    np.testing.assert_array_equal(whole[0][160], whole[0][0])  # the second table begins at position 0 again
    assert not np.array_equal(whole[0][170], whole[0][10])


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "unheard-of", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4},
        {"rope_type": "linear", "rope_theta": 1e4, "factor": "two"},
        {"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0], "long_factor": [1.0], **_ORIGINAL},
        {"rope_type": "default", "rope_theta": -1},
    ],
)
def test_a_rope_type_without_a_formula_is_refused(parameters: dict[str, Any]) -> None:
    with pytest.raises(ArchitectureError):
        rotation(parameters, 8, 640)
