"""All `edgetune.*` keys of the metadata of GGUF files, ONNX graphs and safetensors shards.

Files that have been published carry these keys: a key may be added, but never renamed or given another meaning.
"""

from __future__ import annotations

PREFIX = "edgetune."

# provenance
VERSION = "edgetune.version"
"""Version of edgetune that wrote the file. Its presence marks a directory as one that an export may replace."""
MERGE_BASE = "edgetune.merge_base"
"""Base weights that the adapter was merged into: original or nf4."""
BASE_HASH = "edgetune.base.sha256"
"""SHA-256 over the hashes of the base's files (`receipts.combined_hash`)."""
ADAPTER_HASH = "edgetune.adapter.sha256"
"""SHA-256 over the hashes of the adapter's files; absent without an adapter."""
COMBINATION = "edgetune.adapter.combination"
"""How several adapters were combined, a JSON object: `method`, `adapters` (`name`, `weight`, `sha256` of each, as
ADAPTER_HASH of it alone), and `density` and `seed` where the method has them; absent for one adapter."""
EXPORTER = "edgetune.exporter"
"""Exporter that traced the graph; absent where edgetune built it."""

# contents
RECIPE = "edgetune.recipe"
"""Recipe of a GGUF file, or storage type of an ONNX model."""
OVERRIDES = "edgetune.overrides"
"""Storage types set by hand, as given on the command line; GGUF only."""
DATA_HASH = "edgetune.data.sha256"
"""GGUF: SHA-256 of everything after the header; of a split file, of the hashes of its parts, one a line. ONNX: of the
file of weights."""
DATA_SIZE = "edgetune.data.size"
"""Bytes of the file of weights; ONNX only."""
CACHE = "edgetune.cache"
"""Key-value cache of an ONNX decoder: "in place" or "grows"."""
RECEIPT = "edgetune.receipt"
"""JSON object with the keys above, bits per weight and bytes by type; ONNX only."""
GOLDEN = "edgetune.golden"
"""Golden conversations and first answers for `edgetune verify`, as JSON in ASCII."""
GOLDEN_PART = "edgetune.golden.{number}"
"""More of them, numbered from 2: auditors flag strings of more than 8 KB."""
TEMPLATE_OPTIONS = "edgetune.template.options"
"""Variables that training gave to the chat template (enable_thinking ...), as a JSON object; absent without any."""
SOFT_PROMPT = "edgetune.soft_prompt"
"""Soft prompt as rows of the vocabulary, a JSON object: `first` (id), `count`, `added` (rows that the base has not),
`adds_bos` (whether the tokenizer of training adds BOS to a text) and `with_bos` (names of the chat templates in which
BOS was written behind the soft tokens)."""
PROMPT_TASK = "edgetune.soft_prompt.task"
"""Number of the task of multitask prompt tuning whose prompt the file holds; absent for a training of one task."""
PREFIX_STATE = "edgetune.prefix"
"""Prefix of keys and values that the model was trained with, a JSON object: `tokens`, and `sha256` of its file beside
the model (MODEL.prefix.safetensors, or prefix.safetensors in an ONNX folder). Without the file the model is the base.
"""

SCORE_HEAD = "edgetune.score_head"
"""Score head of a reward model, base64 of f32 [hidden size]: its product with the last token's hidden state is the
score. llama.cpp reads tensors of such a head for other architectures alone."""

IMATRIX_MADE_OF = "edgetune.imatrix.made_of"
"""In an importance matrix: SHA-256 of base, adapter, merge base and rows that it follows from."""

# tokenizer behavior that llama.cpp does not reproduce
NORMALIZER = "edgetune.tokenizer.normalizer"
"""Unicode normal form (NFC, ...) of the training tokenizer; llama.cpp does not normalize."""
SPACE = "edgetune.tokenizer.space"
"""Where a space is added before a text (first, each) or removed (spare); llama.cpp differs."""
LSTRIP = "edgetune.tokenizer.lstrip"
"""Added tokens that strip whitespace on their left; llama.cpp has no such flag."""
RSTRIP = "edgetune.tokenizer.rstrip"
"""Added tokens that strip whitespace on their right."""
STOPS = "edgetune.tokenizer.stop_ids"
"""Stop tokens beyond the three of GGUF (eos, eot, eom); llama.cpp does not stop at them."""

HASH_PLACEHOLDER = "0" * 64
"""Reserves the space of a hash that is known only after the pass."""
