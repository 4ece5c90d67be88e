"""Distillation from a local teacher: the divergence of GKD on our token ids and labels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar
from trl.experimental.gkd import GKDTrainer

from edgetune.errors import ConfigError
from edgetune.objectives import Objective
from edgetune.objectives.distillation import Distillation
from edgetune.training.loading import compute_dtype
from edgetune.training.objectives.inputs import TrainerInputs
from edgetune.training.objectives.sft import SftTrainer, build_sft


class TeacherTrainer(SftTrainer):
    """SFTTrainer that learns the probabilities of a teacher at the tokens that are trained on."""

    teacher: Any
    objective: Distillation

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the divergence from the teacher per trained token, with a share of cross-entropy if it has a weight.

        `num_items_in_batch` is the number of trained tokens of all batches of the step.
        """
        ids, attended = inputs["input_ids"], inputs["attention_mask"]
        labels = inputs["labels"][:, 1:]
        trained = labels != -100
        outputs = model(input_ids=ids, attention_mask=attended, use_cache=False)
        with torch.no_grad():
            logits = self.teacher(input_ids=ids, attention_mask=attended, use_cache=False).logits
        # rows behind the vocabulary pad the matrices of some models, to different lengths
        width = min(logits.shape[-1], outputs.logits.shape[-1])
        teacher, student = (each[:, :-1, :width][trained].float() for each in (logits, outputs.logits))
        count = int(trained.sum()) if num_items_in_batch is None else num_items_in_batch
        divergence = GKDTrainer.generalized_jsd_loss(
            student, teacher, beta=self.objective.beta, temperature=self.objective.temperature,
            num_items_in_batch=count,
        )  # fmt: skip
        # with the temperature T, gradients shrink by its square (arXiv:1503.02531, section 2)
        loss = divergence * self.objective.temperature**2
        targets = labels[trained]
        if self.objective.sft_weight:
            entropy = torch.nn.functional.cross_entropy(student, targets, reduction="sum") / count
            loss = loss + self.objective.sft_weight * entropy
        self._log_figures(student.detach(), teacher, targets, int(attended.sum()))
        return (loss, outputs) if return_outputs else loss

    def _log_figures(self, student: torch.Tensor, teacher: torch.Tensor, targets: torch.Tensor, tokens: int) -> None:
        mode = "train" if self.model.training else "eval"
        logs = torch.log_softmax(student, -1)
        divergence = torch.nn.functional.kl_div(logs, torch.log_softmax(teacher, -1), reduction="sum", log_target=True)
        self._metrics[mode]["teacher_kl"].append(float(divergence) / max(1, len(targets)))
        self._metrics[mode]["mean_token_accuracy"].append(float((student.argmax(-1) == targets).float().mean()))
        if mode == "train":
            self._total_train_tokens += tokens
        self._metrics[mode]["num_tokens"] = [self._total_train_tokens]


def build_distillation(inputs: TrainerInputs) -> SftTrainer:
    """Build the trainer of a distillation; the answers of an endpoint are rows of supervised fine-tuning by now."""
    config = inputs.prepared.config
    objective: Objective = config.objective
    assert isinstance(objective, Distillation)
    if objective.is_remote:
        return build_sft(inputs)
    trainer = build_sft(inputs, TeacherTrainer)
    assert isinstance(trainer, TeacherTrainer)
    trainer.objective = objective
    trainer.teacher = _load_teacher(Path(objective.teacher), compute_dtype(config), config.trust_remote_code)
    return trainer


def _load_teacher(directory: Path, dtype: torch.dtype, trust_remote_code: bool) -> Any:
    """Load the teacher unquantized, in the compute type on a GPU and in float32 on the CPU."""
    disable_progress_bar()
    on_gpu = torch.cuda.is_available()
    try:
        teacher = AutoModelForCausalLM.from_pretrained(
            directory, dtype=dtype if on_gpu else torch.float32, device_map={"": 0 if on_gpu else "cpu"},
            use_safetensors=True, trust_remote_code=trust_remote_code,
        )  # fmt: skip
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(
            f"objective.teacher: {directory} cannot be loaded: {str(error).splitlines()[0]}",
            "Give a model directory of transformers with safetensors weights",
        ) from None
    return teacher.eval().requires_grad_(False)
