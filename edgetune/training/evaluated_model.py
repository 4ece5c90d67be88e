"""The trained model (base and adapter in torch) as `edgetune evaluate` scores it and lets it answer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgetune.config import parse_config
from edgetune.data.chat import ChatTemplate
from edgetune.data.text_tokenizer import TextTokenizer
from edgetune.errors import ConfigError, RunDirectoryError
from edgetune.evaluation.evaluate import LONGEST_CONTEXT
from edgetune.evaluation.models import PromptToAnswer, cut
from edgetune.evaluation.results import TRAINED
from edgetune.planning.base_model import find_base
from edgetune.runs.directory import RunDirectory
from edgetune.runtime.interface import Scoring
from edgetune.training import adapters, environment
from edgetune.training.adapters.virtual_tokens import with_task
from edgetune.training.capture import forward, generate
from edgetune.training.capture.long_rows import longest_context
from edgetune.training.capture.recapture import check_base
from edgetune.training.loading import load_model


@contextmanager
def open_trained(
    run: RunDirectory, context: int | None = None, batch_size: int | None = None, base: Path | None = None
) -> Iterator[TrainedModel]:
    """Load the trained model of a finished run, on a GPU or on the CPU.

    Args:
        run: The run.
        context: Tokens that a prompt and its answer may have together; None: the base's own, at most 4096.
        batch_size: Prompts at a time; None: as many as the device takes in the capture of the reference.
        base: Directory or GGUF file of the base, if it has moved.

    Raises:
        RunDirectoryError: The base is not the one that the run was trained on.
        ConfigError: The base has no positions for such a context.
    """
    config = parse_config(run.config_here(base), str(run.manifest_file))
    with environment.silence_libraries():
        found = find_base(config)
        check_base(run, found)
        taken = config.adapter.virtual_tokens
        if context and found.context and found.context.is_fixed and context + taken > found.context.tokens:
            raise ConfigError(
                f"--context is {context}, and the base has {found.context.tokens} positions",
                f"Set --context to {found.context.tokens - taken} or less",
            )
        model = with_task(adapters.load_adapter(load_model(found, config, run.base), run.adapter), config)
        generate.prepare_for_capture(model)
        _, products = generate.capture_precision(model, config)
        tokenizer = TextTokenizer.from_directory(run.tokenizer, found.rows)
        with torch.inference_mode(), products():
            yield TrainedModel(model, tokenizer, run, context, batch_size, taken)


class TrainedModel:
    """See `edgetune.evaluation.models.EvaluatedModel`."""

    name = TRAINED

    def __init__(
        self, model: Any, tokenizer: TextTokenizer, run: RunDirectory, context: int | None, batch_size: int | None,
        virtual_tokens: int,
    ) -> None:  # fmt: skip
        self._model, self._tokenizer, self._batch_size = model, tokenizer, batch_size
        self.trained_context = longest_context(model.get_base_model().config.get_text_config()) - virtual_tokens
        self.context = context or min(self.trained_context, LONGEST_CONTEXT)
        manifest = run.manifest
        template = ChatTemplate.find(run.tokenizer)
        self.chat_template = template and template.with_options(manifest.template_options).at(manifest.rendered_at)
        self._stop_ids = sorted(_ids(tokenizer, run.train_results.stop_tokens) | tokenizer.stop_ids)
        first = (tokenizer.bos_id, tokenizer.id_of(tokenizer.named.get("eos_token")), *self._stop_ids)
        known = [id_ for id_ in first if id_ is not None]
        if not known:
            raise RunDirectoryError(
                f"the tokenizer in {run.tokenizer} names neither BOS nor EOS, one of which stands before a text "
                "without context",
                "Name one in tokenizer_config.json of the base, and train again",
            )
        self.prefix_token = known[0]
        self._pad_id = tokenizer.choose_pad()[0]

    def tokenize(self, text: str) -> list[int]:
        """Return the ids that training gives the text."""
        return self._tokenizer.encode(text)[0]

    def score_batch(self, texts: Sequence[Scoring]) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """Score texts of similar length together."""
        for batch in self._batches(texts):
            counts = [len(texts[index][1]) for index in batch]
            blocks = forward.compute_logits(
                self._model, forward.Batch([texts[i][0] for i in batch], [texts[i][1] for i in batch])
            )
            # a block of logits may not reach over the end of a row
            for index, count in zip(batch, counts, strict=True):
                done = 0
                while done < count:
                    logits = next(blocks)
                    done += len(logits)
                    yield index, logits

    def _batches(self, texts: Sequence[Scoring]) -> Iterator[list[int]]:
        """Yield indices of texts, the longest first; so many that they fit the device."""
        limit = forward.BATCH_TOKENS.get(self._model.device.type, forward.BATCH_TOKENS["cpu"])
        batch: list[int] = []
        for index in sorted(range(len(texts)), key=lambda index: -len(texts[index][0])):
            longest = len(texts[(batch or [index])[0]][0])
            is_full = len(batch) == self._batch_size if self._batch_size else longest * (len(batch) + 1) > limit
            if batch and is_full:
                yield batch
                batch = []
            batch.append(index)
        if batch:
            yield batch

    def answer(self, prompts: Sequence[PromptToAnswer]) -> Iterator[str]:
        """Generate greedily; prompts with the same ends are answered together."""
        answers: dict[int, str] = {}
        for key in dict.fromkeys((prompt.until, prompt.max_tokens) for prompt in prompts):
            members = [i for i, prompt in enumerate(prompts) if (prompt.until, prompt.max_tokens) == key]
            self._answer_group(prompts, members, answers)
        return (answers[index] for index in range(len(prompts)))

    def _answer_group(self, prompts: Sequence[PromptToAnswer], members: list[int], answers: dict[int, str]) -> None:
        until, max_tokens = prompts[members[0]].until, prompts[members[0]].max_tokens
        settings = generate.GreedySettings(
            self._stop_ids, self._pad_id, max_tokens, self._batch_size or generate.GENERATION_BATCH,
            (lambda ids: any(text in self._tokenizer.decode(ids) for text in until)) if until else None,
        )  # fmt: skip

        def keep(done: dict[int, list[int]]) -> None:
            for number, ids in done.items():
                answers[members[number]] = cut(self._text(prompts[members[number]].ids, ids), until)

        generate.generate_greedy(self._model, [prompts[index].ids for index in members], settings, keep)

    def _text(self, prompt: list[int], answer: list[int]) -> str:
        """Return the text of an answer behind its prompt: some tokenizers drop a space at the beginning of a text."""
        before = self._tokenizer.decode(prompt, skip_special=True)
        return self._tokenizer.decode([*prompt, *answer], skip_special=True)[len(before) :]


def _ids(tokenizer: TextTokenizer, texts: Sequence[str]) -> set[int]:
    return {id_ for text in texts if (id_ := tokenizer.id_of(text)) is not None}
