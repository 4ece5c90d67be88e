"""Run llama.cpp's convert_hf_to_gguf.py, unchanged, in a process of its own.

Only what random models lack is patched: it recognizes pre-tokenizers by a hash of the ids of one text, needs a
tokenizer.model for families that had one, and reads fields of config.json that a newer transformers drops.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.converters import llama_cpp_source

_DRIVER = """
import json, logging, pathlib, sys, warnings
source, jobs = sys.argv[1], json.loads(sys.argv[2])
sys.path[:0] = [source, source + "/gguf-py"]
warnings.simplefilter("ignore")
from conversion import base
import convert_hf_to_gguf, conversion.internlm

hparams, pre = base.ModelBase.load_hparams, base.TextModel.get_vocab_base_pre
pieces = base.TextModel._set_vocab_sentencepiece

def load_hparams(dir_model, is_mistral_format):
    return json.loads((dir_model / "config.json").read_text("utf-8")) | hparams(dir_model, is_mistral_format)

def recognized(self, tokenizer):
    try:
        return pre(self, tokenizer)
    except NotImplementedError:
        return "qwen2"

def vocabulary(self, *arguments):
    there = (self.dir_model / "tokenizer.model").is_file()
    return pieces(self, *arguments) if there else self._set_vocab_gpt2()

base.ModelBase.load_hparams = staticmethod(load_hparams)
base.TextModel.get_vocab_base_pre = recognized
base.TextModel._set_vocab_sentencepiece = conversion.internlm.InternLM2Model.set_vocab = vocabulary
for job in jobs:
    words = ["--outtype", job["type"]] if job["type"] else ["--vocab-only"]
    sys.argv = ["convert_hf_to_gguf.py", job["directory"], *words, "--outfile", job["output"]]
    try:
        convert_hf_to_gguf.main()
    except (SystemExit, Exception) as error:
        logging.exception("failed")
        pathlib.Path(job["output"] + ".error").write_text(repr(error), "utf-8")
"""


@dataclass(frozen=True)
class Job:
    """A model directory to be written with `type` (f32, f16, bf16, q8_0), or its vocabulary alone where that is ""."""

    directory: str
    type: str
    output: str


def convert(jobs: Sequence[Job]) -> dict[str, str]:
    """Run all jobs in one process. Return the messages of those that failed, by output."""
    command = [sys.executable, "-c", _DRIVER, str(llama_cpp_source.directory()), json.dumps([*map(asdict, jobs)])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    errors = {job.output: Path(job.output + ".error") for job in jobs}
    return {output: path.read_text("utf-8") for output, path in errors.items() if path.exists()}
