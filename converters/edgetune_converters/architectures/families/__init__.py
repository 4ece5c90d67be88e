"""The table of model families, one file per name. Nothing outside this package asks which family a model is.

To add a family, write a file with its `Family` row and add the row to `FAMILIES`. docs/architecture.md, section "A
model family", lists the tests and pages that follow.
"""

from __future__ import annotations

from edgetune_converters.architectures.families.baichuan import BAICHUAN
from edgetune_converters.architectures.families.bloom import BLOOM
from edgetune_converters.architectures.families.cohere import COMMAND_R, COMMAND_R7B
from edgetune_converters.architectures.families.deepseek import DEEPSEEK_V2, DEEPSEEK_V3
from edgetune_converters.architectures.families.exaone import EXAONE4
from edgetune_converters.architectures.families.falcon import FALCON
from edgetune_converters.architectures.families.gemma import GEMMA, GEMMA2, GEMMA3
from edgetune_converters.architectures.families.glm import GLM4
from edgetune_converters.architectures.families.gpt2 import GPT2
from edgetune_converters.architectures.families.gpt_oss import GPT_OSS
from edgetune_converters.architectures.families.granite import GRANITE, GRANITE_MOE
from edgetune_converters.architectures.families.internlm import INTERNLM2
from edgetune_converters.architectures.families.lfm import LFM2
from edgetune_converters.architectures.families.llama import LLAMA, MISTRAL
from edgetune_converters.architectures.families.llama4 import LLAMA4
from edgetune_converters.architectures.families.minicpm import MINICPM
from edgetune_converters.architectures.families.mixtral import MIXTRAL
from edgetune_converters.architectures.families.mpt import MPT
from edgetune_converters.architectures.families.neox import NEOX
from edgetune_converters.architectures.families.olmo import OLMO2, OLMO3
from edgetune_converters.architectures.families.phi import PHI2, PHI3
from edgetune_converters.architectures.families.qwen import QWEN2, QWEN2_MOE, QWEN3, QWEN3_MOE
from edgetune_converters.architectures.families.smollm import SMOLLM3
from edgetune_converters.architectures.families.stablelm import STABLELM2
from edgetune_converters.architectures.families.starcoder import STARCODER2

# in the order of docs/export.md; of several families with one GGUF architecture, a GGUF base is tried in this order
FAMILIES = (
    LLAMA,
    MISTRAL,
    QWEN2,
    QWEN3,
    SMOLLM3,
    STABLELM2,
    OLMO2,
    OLMO3,
    GRANITE,
    EXAONE4,
    GEMMA,
    GEMMA2,
    GEMMA3,
    PHI3,
    PHI2,
    MIXTRAL,
    QWEN2_MOE,
    QWEN3_MOE,
    GRANITE_MOE,
    DEEPSEEK_V2,
    DEEPSEEK_V3,
    GPT_OSS,
    LLAMA4,
    GPT2,
    NEOX,
    BLOOM,
    FALCON,
    MPT,
    STARCODER2,
    GLM4,
    COMMAND_R,
    COMMAND_R7B,
    LFM2,
    MINICPM,
    INTERNLM2,
    BAICHUAN,
)
