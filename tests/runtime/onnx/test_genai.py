"""onnxruntime-genai reads our ONNX folders: its token ids, chat template, greedy answers and stop tokens are ours."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgetune.runtime.loading import load
from tests.converters import tiny, vocabularies
from tests.export_requests import export

genai: Any = pytest.importorskip("onnxruntime_genai", reason="pip install onnxruntime-genai")

SAMPLE = Path(__file__).parents[3] / "samples/smart-home/smart-home-q4_k_m.gguf"
QUESTIONS = ["dim the bedroom lights to 30% at 7pm", "把卧室的灯调到三成亮", "turn off the garage heater"]
TEXTS = [
    "Hello world", "  two  spaces ", "naïve café ½", "I'm you're WE'LL", "1234567 12 3.14", "", " ", "把卧室的灯",
    "emoji 👍🏽 family 👨\u200d👩\u200d👧", "lines\nand\n\ttabs\r\n", "<|im_start|>user\nhi<|im_end|>\n", "e\u0301 ﬁ Ⅷ",
]  # fmt: skip


@pytest.fixture(scope="module", params=["f32", "int4"])
def sample(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sample") / str(request.param)
    export(SAMPLE, onnx={str(request.param): folder})
    return folder


def _answer(model: Any, tokenizer: Any, question: str) -> tuple[str, list[int], list[int]]:
    """The rendered prompt, its token ids, and the greedy answer."""
    messages = json.dumps([{"role": "user", "content": question}])
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)
    ids = [int(token) for token in tokenizer.encode(prompt)]
    generator = genai.Generator(model, genai.GeneratorParams(model))
    generator.append_tokens(np.asarray(ids, np.int32))
    answer = []
    while not generator.is_done():
        generator.generate_next_token()
        answer.append(int(generator.get_next_tokens()[0]))
    return prompt, ids, answer


def test_prompts_and_greedy_answers_are_ours(sample: Path) -> None:
    model = genai.Model(str(sample))
    tokenizer = genai.Tokenizer(model)
    with load(sample) as runtime:
        assert runtime.chat_template is not None
        assert {int(token) for token in tokenizer.eos_token_ids} == runtime.stop_tokens
        for question in QUESTIONS:
            prompt, ids, answer = _answer(model, tokenizer, question)
            wanted = runtime.chat_template.render([{"role": "user", "content": question}], add_generation_prompt=True)
            assert prompt == wanted
            assert ids == list(runtime.tokenize(wanted))
            assert answer[-1] in runtime.stop_tokens  # it stops, at one of them
            ours = list(runtime.generate(ids, max_tokens=200))
            assert [token for token in ours if token not in runtime.stop_tokens] == answer[:-1]


def _folder(base: Path, make: Callable[[Path], object], **config: Any) -> tuple[Path, list[str]]:
    """The folder of a base with another tokenizer, and the notes of its export."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    make(base)
    path = base / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | config))
    (receipt,) = export(base, onnx={"f32": base.with_name("folder")})
    return base.with_name("folder"), receipt.notes


@pytest.fixture
def base(tmp_path: Path, plain_base: Path) -> Path:
    return Path(shutil.copytree(plain_base, tmp_path / "base"))


@pytest.fixture(scope="module")
def plain_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.base("llama-tied", tmp_path_factory.mktemp("plain"))


@pytest.mark.parametrize("cutter", ["qwen2", "llama-bpe", "tekken"])
@pytest.mark.parametrize("name", ["CohereTokenizerFast", "BloomTokenizerFast", "Qwen2Tokenizer", "TokenizersBackend"])
def test_token_ids_are_ours_whatever_the_class(cutter: str, name: str, base: Path) -> None:
    """A class that the other runtime refuses is replaced in the copy by the general one."""
    folder, notes = _folder(base, lambda path: vocabularies.byte_level(path, cutter), tokenizer_class=name)
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    with load(folder) as runtime:
        for text in TEXTS:
            assert [int(token) for token in tokenizer.encode(text)] == list(runtime.tokenize(text)), text
    unread = name in ("CohereTokenizerFast", "BloomTokenizerFast")
    stated = json.loads((folder / "tokenizer_config.json").read_text())
    assert stated["tokenizer_class"] == ("PreTrainedTokenizerFast" if unread else name)
    assert len([note for note in notes if f"the class {name}, which onnxruntime-genai does not read" in note]) == unread


def test_what_the_other_tokenizer_leaves_out_is_said(base: Path) -> None:
    """It puts neither a token nor a space before a text; where this changes, the notes can go."""
    folder, notes = _folder(base, lambda path: vocabularies.sentencepiece(path, bos=True, prefix=True))
    said = " ".join(notes)
    assert "does not put <s> before a text" in said
    assert "does not put a space before a text" in said
    tokenizer = genai.Tokenizer(genai.Model(str(folder)))
    with load(folder) as runtime:
        ours = list(runtime.tokenize("Hello"))
        assert ours[:2] == [1, runtime.tokenize("x")[1]]  # the token, and the space
        assert [int(token) for token in tokenizer.encode("Hello")] == ours[2:]


MEMORY = """
import sys
import numpy as np, onnxruntime_genai as og
model = og.Model(sys.argv[1])
options = og.GeneratorParams(model)
if len(sys.argv) > 2: options.set_search_options(max_length=int(sys.argv[2]))
generator = og.Generator(model, options)
generator.append_tokens(np.arange(5, dtype=np.int32))
generator.generate_next_token()
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


def _memory(folder: Path, length: int | None) -> int:
    """The largest resident memory of one answered prompt, in KB."""
    asked = [sys.executable, "-c", MEMORY, str(folder), *([] if length is None else [str(length)])]
    return int(subprocess.run(asked, capture_output=True, check=True, text=True).stdout)


def test_a_long_context_does_not_reserve_its_whole_cache(tmp_path: Path) -> None:
    """Measured: the resident memory of a prompt with the folder's length, and with that of the whole context."""
    base = tiny.base("llama-tied", tmp_path / "base", max_position_embeddings=131072)
    export(base, onnx={"f32": tmp_path / "folder"})
    used = {length: _memory(tmp_path / "folder", length) for length in (None, 131072)}
    whole = 3 * 2 * 2 * 24 * 4 * 131072 // 1024  # layers, keys and values, heads, head size, bytes of f32
    assert used[131072] - used[None] > whole * 0.8
