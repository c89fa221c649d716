"""Knowledge distillation: a transformer learns the predictions of a frozen teacher."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch
from torch import nn

from localdit.core.diffusion import denoising_errors
from localdit.models import LocalDiTTransformer2DModel
from localdit.models.flops import forward_flops
from localdit.training.initialization import load_frozen
from localdit.training.methods import Inputs, noised_prediction
from localdit.training.methods.fine_tuning import FineTuning
from localdit.training.state import TRANSFORMER

TEACHER = "teacher"


class KnowledgeDistillation(FineTuning):
    """Train a student on the prediction of a teacher instead of the noise that was added.

    This is output-level knowledge distillation (BK-SDM, Kim et al., 2023, eq. 3). The teacher
    predicts for the same noised latents, text and picture sizes.
    """

    @classmethod
    def frozen_models(
        cls, args: argparse.Namespace, transformer: LocalDiTTransformer2DModel
    ) -> dict[str, nn.Module]:
        """Load the teacher that `--teacher` names."""
        return {TEACHER: load_frozen(args.teacher, transformer)}

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted mean squared distance of each sample's predictions, `(B,)`."""
        with torch.no_grad():
            wanted, _, timesteps = noised_prediction(
                models[TEACHER], self.objective, inputs, noise, positions
            )
        prediction, _, _ = noised_prediction(
            models[TRANSFORMER], self.objective, inputs, noise, positions
        )
        return denoising_errors(prediction, wanted) * self.objective.weights(timesteps)

    def step_flops(self, inputs: Inputs) -> int:
        """Return the operations of the student's step and of the teacher's forward pass."""
        rows, _, height, width = inputs.latents.shape
        sizes = (height, width, inputs.text.shape[1])
        teacher = self.frozen[TEACHER]
        assert isinstance(teacher, LocalDiTTransformer2DModel)
        return super().step_flops(inputs) + rows * forward_flops(teacher.config, *sizes)
