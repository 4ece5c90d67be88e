"""The files that trainers leave beside an adapter, as they write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

FACTORY = """\
bf16: true
cutoff_len: 96
dataset: mine,identity
dataset_dir: data
double_quantization: true
finetuning_type: lora
gradient_accumulation_steps: 8
learning_rate: 5.0e-05
lora_rank: 4
lora_target: all
lr_scheduler_type: cosine
max_grad_norm: 1.0
model_name_or_path: BASE
num_train_epochs: 3.0
optim: adamw_torch
output_dir: saves/lora
per_device_train_batch_size: 2
quantization_bit: 4
quantization_method: bnb
stage: sft
template: qwen
trust_remote_code: true
"""
BOARD = """\
top.booster: auto
top.model_path: BASE
top.quantization_bit: '8'
top.quantization_method: bnb
top.template: default
train.batch_size: 2
train.cutoff_len: 96
train.learning_rate: 5e-5
train.num_train_epochs: '3.0'
train.training_stage: Supervised Fine-Tuning
"""
FACTORY_LOG = """\
{"current_steps": 5, "total_steps": 30, "loss": 1.9, "lr": 5e-05, "epoch": 0.5, "percentage": 16.67}
{"current_steps": 10, "total_steps": 30, "eval_loss": 1.25, "epoch": 1.0}
{"current_steps": 10, "total_steps": 30, "loss": 1.1, "lr": 4e-05, "epoch": 1.0}
{"current_steps": 10, "tot
"""
AXOLOTL = """\
base_model: BASE
model_type: AutoModelForCausalLM
load_in_8bit: false
load_in_4bit: true
adapter: qlora
datasets:
  - path: data/rows.jsonl
    type: chat_template
chat_template: tokenizer_default
sequence_len: 96
micro_batch_size: 2
gradient_accumulation_steps: 4
num_epochs: 2
optimizer: paged_adamw_8bit
lr_scheduler: cosine
learning_rate: 0.0002
special_tokens:
  pad_token: <|endoftext|>
"""
AXOLOTL_CARD = """\
---
library_name: peft
tags:
- axolotl
- base_model:adapter:BASE
base_model: BASE
model-index:
- name: outputs/lora
  results: []
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. -->

<details><summary>See axolotl config</summary>

axolotl version: `0.11.0`
```yaml
{config}
```

</details><br>

# outputs/lora

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.0002
- train_batch_size: 2

### Training results

| Training Loss | Epoch  | Step | Validation Loss |
|:-------------:|:------:|:----:|:---------------:|
| No log        | 0.0140 | 1    | 0.3703          |
| 0.2705        | 0.1399 | 10   | 0.1777          |
| 0.1263        | 0.2797 | 20   | 0.0097          |
"""
TRAINER_CARD = """\
---
library_name: peft
license: other
base_model: BASE
tags:
- base_model:adapter:BASE
- llama-factory
- lora
- transformers
pipeline_tag: text-generation
---

# lora

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 5e-05
- train_batch_size: 2
- eval_batch_size: 8
- seed: 42
- gradient_accumulation_steps: 8
- total_train_batch_size: 16
- optimizer: Use OptimizerNames.ADAMW_TORCH with betas=(0.9,0.999) and epsilon=1e-08
- lr_scheduler_type: cosine
- num_epochs: 3.0

### Framework versions

- PEFT 0.18.0
"""
OLD_PEFT_CARD = """\
---
library_name: peft
base_model: BASE
---
## Training procedure

The following `bitsandbytes` quantization config was used during training:
- quant_method: bitsandbytes
- load_in_8bit: False
- load_in_4bit: True
- llm_int8_skip_modules: None
- bnb_4bit_quant_type: fp4
- bnb_4bit_use_double_quant: False
- bnb_4bit_compute_dtype: bfloat16

### Framework versions

- PEFT 0.5.0
"""
SWIFT: dict[str, Any] = {
    "model": "BASE", "model_type": "qwen2", "model_revision": None, "torch_dtype": "bfloat16",
    "template": "qwen2_5", "system": None, "max_length": 96, "dataset": ["mine.jsonl#500"], "val_dataset": [],
    "quant_method": None, "quant_bits": None, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True,
    "tuner_type": "lora", "tuner_backend": "peft", "learning_rate": 0.0001, "num_train_epochs": 1.0,
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 16, "max_steps": -1, "seed": 42,
    "swift_version": "4.0.0", "adapters": [], "rlhf_type": None,
}  # fmt: skip
SWIFT_LOG = """\
{"loss": 2.5, "grad_norm": 3.1, "learning_rate": 1e-05, "epoch": 0.01, "global_step/max_steps": "1/93"}
{"loss": 1.5, "grad_norm": 2.1, "learning_rate": 1e-04, "epoch": 0.05, "global_step/max_steps": "5/93"}
{"eval_loss": 1.75, "epoch": 0.05, "global_step/max_steps": "5/93"}
{"last_model_checkpoint": "output/checkpoint-93", "best_metric": 1.75}
"""
TORCHTUNE = """\
model:
  _component_: torchtune.models.llama3_2.qlora_llama3_2_1b
  lora_rank: 4
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  max_seq_len: 96
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: BASE
optimizer:
  _component_: torch.optim.AdamW
  lr: 3e-4
  weight_decay: 0.01
batch_size: 2
epochs: 1
max_steps_per_epoch: null
"""


def write(folder: Path, **files: str | dict[str, Any]) -> Path:
    """Write files, BASE in them as it is; a mapping as JSON. Names have __ for a dot."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        path = folder / name.replace("__", ".")
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


def config(folder: Path, **fields: Any) -> Path:
    """Write an adapter_config.json of PEFT with these fields."""
    stated = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 4, "lora_alpha": 8, "target_modules": ["q_proj"]}
    return write(folder, adapter_config__json={**stated, **fields})
