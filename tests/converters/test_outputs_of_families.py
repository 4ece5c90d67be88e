"""A safetensors directory keeps the base's layout; an adapter file has the layout of GGUF."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from edgetune_converters.errors import EdgetuneError
from edgetune_converters.reading.checkpoint import Checkpoint
from tests.converters import family_models, runtime, tiny
from tests.converters.test_families import ADAPTERS, KLD
from tests.export_requests import export

# experts are several modules and one tensor in GGUF; norms and convolutions are replaced whole
REFUSED = {"deepseek-v2", "gemma2", "mixtral", "mixtral-fused", "gpt-oss", "llama4", "deepseek-v3"}


@pytest.mark.parametrize("name", family_models.CASES)
def test_without_an_adapter_every_bit_is_kept(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    export(base, {}, safetensors={"base": tmp_path / "m"})
    before, after = Checkpoint(base), Checkpoint(tmp_path / "m")
    assert after.tensors.keys() <= before.tensors.keys()
    for tensor, info in after.tensors.items():
        other = before.tensors[tensor]
        assert (info.dtype, info.shape) == (other.dtype, other.shape)
        assert np.array_equal(after.rows(tensor, slice(None)), before.rows(tensor, slice(None))), tensor


@pytest.mark.parametrize("name", ADAPTERS)
def test_transformers_loads_the_merged_model(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    export(base, {}, safetensors={"base": tmp_path / "m"}, adapter=adapter)
    ids = family_models.ids(name)
    kld, _ = tiny.divergence(tiny.torch_logits(base, adapter, ids), tiny.torch_logits(tmp_path / "m", None, ids))
    print(f"{name}: {kld:.1e}")
    assert kld < 1e-8


@pytest.mark.parametrize("name", ADAPTERS)
def test_llama_cpp_lays_the_adapter_over_the_base_or_it_is_refused(name: str, tmp_path: Path) -> None:
    base = family_models.base(name, tmp_path / "base")
    adapter = tiny.adapter(base, tmp_path / "adapter", **ADAPTERS[name])
    if name in REFUSED:
        with pytest.raises(EdgetuneError, match=r"experts|replaced whole|do not follow"):
            export(base, {}, lora={"f32": tmp_path / "lora.gguf"}, adapter=adapter)
        return
    export(base, {}, lora={"f32": tmp_path / "lora.gguf"}, adapter=adapter)
    export(base, {"f32": tmp_path / "base.gguf"})
    ids = family_models.ids(name)
    found = runtime.logits(tmp_path / "base.gguf", ids, tmp_path / "lora.gguf")
    kld, _ = tiny.divergence(tiny.torch_logits(base, adapter, ids), found)
    print(f"{name}: {kld:.1e}")
    assert kld < KLD
