"""Distillation: a student learns from a frozen teacher.

By knowledge distillation, it learns the teacher's predictions. The other methods make it a
consistency model (Song et al., 2023), which draws in one to four passes what its teacher draws in
forty: it maps a point of the teacher's ODE at any timestep to the clean latents at its end.
Guidance is part of the ODE, so the student needs no second pass for it.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from localdit.core.diffusion import NUM_TIMESTEPS, Objective, denoising_errors
from localdit.core.samplers import SamplingSettings
from localdit.models import LocalDiTTransformer2DModel
from localdit.training.initialization import load_frozen
from localdit.training.methods import Inputs, Method, Sampling, noised_prediction, predict
from localdit.training.state import TRANSFORMER

TEACHER = "teacher"
HUBER = 0.001  # c of the pseudo-Huber loss (Luo et al., 2023)
TRAJECTORY_HUBER = 0.03
DIFFERENCE = 5  # timesteps to either side in finite differences
TANGENT = 0.1  # c in the normalised tangent g / (|g| + c) (Lu & Song, 2024, section 4.1)


class Distillation(Method):
    """The frozen teacher that `--teacher` names, beside the transformer in training."""

    passes = 0  # of the student without gradient

    @classmethod
    def frozen_models(
        cls, args: argparse.Namespace, transformer: LocalDiTTransformer2DModel
    ) -> dict[str, nn.Module]:
        """Load the teacher."""
        return {TEACHER: load_frozen(args.teacher, transformer)}

    @property
    def teacher_passes(self) -> int:
        """The number of the teacher's predictions for a batch."""
        return 1

    def step_flops(self, inputs: Inputs) -> int:
        """Return the operations of the student's step and of the passes without gradient."""
        passes = self.teacher_passes * (1 + self.guided) * self.forward_flops(TEACHER, inputs)
        passes += self.passes * self.forward_flops(TRANSFORMER, inputs)
        return super().step_flops(inputs) + len(inputs.latents) * passes


class KnowledgeDistillation(Distillation):
    """Trains a student on the prediction of a teacher instead of the noise that was added.

    This is output-level knowledge distillation (BK-SDM, Kim et al., 2023, eq. 3). The teacher
    predicts for the same noised latents, text and picture sizes.
    """

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the weighted mean squared distance of each sample's predictions, `(B,)`."""
        with torch.no_grad():
            wanted = noised_prediction(models[TEACHER], self.objective, inputs, noise, positions)
        found = noised_prediction(models[TRANSFORMER], self.objective, inputs, noise, positions)
        errors = denoising_errors(found.prediction, wanted.prediction)
        return errors * self.objective.weights(found.timesteps)


class FewStepDistillation(Distillation):
    """Trains a consistency model on the guided ODE of a teacher.

    Attributes:
        guidance_scale: g in `uncond + g * (text - uncond)` of the teacher.
        teacher_steps: number of timesteps on the grid that the student is sampled on.
        student_steps: number of those at which it is sampled by default.
    """

    def __init__(
        self,
        transformer: LocalDiTTransformer2DModel,
        objective: Objective,
        adapters: bool,
        frozen: Mapping[str, nn.Module],
        guidance_scale: float,
        teacher_steps: int,
        student_steps: int,
    ) -> None:
        super().__init__(transformer, objective, adapters, frozen)
        self.guidance_scale = guidance_scale
        self.teacher_steps, self.student_steps = teacher_steps, student_steps
        self.guided = guidance_scale > 1

    @classmethod
    def settings(cls, args: argparse.Namespace, num_layers: int) -> dict[str, Any]:
        """Return the guidance of the teacher, and both steps."""
        return {
            "guidance_scale": args.teacher_guidance_scale,
            "teacher_steps": args.teacher_steps,
            "student_steps": args.student_steps,
        }

    @classmethod
    def sampling(
        cls, args: argparse.Namespace, objective: Objective, start: Path | None
    ) -> Sampling:
        """Return the consistency model's scheduler, and `--student-steps` without guidance."""
        scheduler = objective.few_step_scheduler(args.teacher_steps)
        return Sampling(scheduler, SamplingSettings(args.student_steps, guidance_scale=1.0))

    def teacher_prediction(
        self, teacher: nn.Module, noised: torch.Tensor, inputs: Inputs, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the teacher's prediction `(B, C, h, w)` with classifier-free guidance."""
        text = predict(teacher, noised, inputs, timesteps)
        if not self.guided:
            return text
        uncond = predict(teacher, noised, inputs.without_captions(), timesteps)
        return uncond + self.guidance_scale * (text - uncond)

    def consistent(
        self, student: nn.Module, noised: torch.Tensor, inputs: Inputs, timesteps: torch.Tensor
    ) -> torch.Tensor:
        """Return the clean latents that the student sees in noised ones, `(B, C, h, w)`."""
        # Without noise the timestep may be -1, which the model has not learned. It does not matter:
        # then the latents are returned as they are, whatever the model predicts.
        prediction = predict(student, noised, inputs, timesteps.clamp(min=0))
        return self.objective.denoised(noised, prediction, timesteps)

    def answers(
        self,
        student: nn.Module,
        teacher: nn.Module,
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the student's answer at a timestep of the grid, and its answer one step further.

        The step is one of the teacher along its ODE. The second answer has no gradient.
        """
        timesteps, lower = self.objective.grid(positions, self.teacher_steps)
        noised = self.objective.add_noise(inputs.latents, noise, timesteps)
        with torch.no_grad():
            guided = self.teacher_prediction(teacher, noised, inputs, timesteps)
            further = self.objective.move(noised, guided, timesteps, lower)
            target = self.consistent(student, further, inputs, lower)
        return self.consistent(student, noised, inputs, timesteps).float(), target.float()

    def validation_errors(
        self, model: nn.Module, inputs: Inputs, noise: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        """Return the mean squared distance of each sample's two answers, `(B,)`."""
        return denoising_errors(
            *self.answers(model, self.frozen[TEACHER], inputs, noise, positions)
        )


class LatentConsistency(FewStepDistillation):
    """Latent consistency distillation (Luo et al., 2023, algorithm 1).

    The student's answer at a timestep of the grid is compared with its answer one step of the grid
    further along the teacher's ODE. It is its own target, without an average of the weights (Song &
    Dhariwal, 2023, section 3.2), and there is one guidance scale, which is not an input.
    """

    passes = 1

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the pseudo-Huber distance of each sample's two answers, `(B,)`."""
        answer, target = self.answers(
            models[TRANSFORMER], models[TEACHER], inputs, noise, positions
        )
        return _huber(answer - target, HUBER)


class TrajectoryDistillation(FewStepDistillation):
    """Regression on the ends of the teacher's trajectories (Luhman & Luhman, 2021, section 3).

    The teacher draws from noise in `teacher_steps` steps, and the student answers with the picture
    at the end, from each of the `student_steps` that it will be sampled at. In the paper, it only
    answers from the noise. The targets do not depend on the student, so it learns sooner than by
    consistency if the teacher needs few steps. Of the data, only the captions matter.
    """

    @property
    def repeats(self) -> int:
        """The number of the student's steps, which it learns in one pass."""
        return self.student_steps

    @property
    def teacher_passes(self) -> int:
        """The number of the teacher's steps."""
        return self.teacher_steps

    def trajectory(
        self, teacher: nn.Module, inputs: Inputs, noise: torch.Tensor
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
        """Return noised latents `(B, C, h, w)`, their timesteps `(B,)`, and the latents at the end.

        There are `teacher_steps` of the first two, and the first ones have the most noise.
        """
        steps, objective = self.teacher_steps, self.objective
        positions = torch.arange(steps, device=noise.device).flip(0).add(0.5).div(steps)
        levels = zip(*objective.grid(positions, steps), strict=True)
        points, timesteps = [], []
        noised: torch.Tensor | None = None
        for now, lower in levels:
            timestep, goal = (one.expand(len(noise)) for one in (now, lower))
            if noised is None:
                noised = objective.add_noise(inputs.latents, noise, timestep)
            points.append(noised)
            timesteps.append(timestep)
            guided = self.teacher_prediction(teacher, noised, inputs, timestep)
            noised = objective.move(noised, guided, timestep, goal).float()
        assert noised is not None
        return points, timesteps, noised

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the mean pseudo-Huber distance of each sample's answers from its end, `(B,)`."""
        with torch.no_grad():
            points, timesteps, end = self.trajectory(models[TEACHER], inputs, noise)
        count = self.student_steps
        sampled = [number * self.teacher_steps // count for number in range(count)]  # as LCM's
        points, timesteps = ([of_all[one] for one in sampled] for of_all in (points, timesteps))
        everywhere = inputs.repeated(count)
        answers = self.consistent(
            models[TRANSFORMER], torch.cat(points), everywhere, torch.cat(timesteps)
        )
        distances = _huber(answers.float() - end.repeat(count, 1, 1, 1), TRAJECTORY_HUBER)
        return distances.view(count, -1).mean(dim=0)


class ContinuousConsistency(FewStepDistillation):
    """Consistency distillation in continuous time, sCM (Lu & Song, 2024, section 4).

    The student's answer must not change along the teacher's ODE. Its derivative is taken by central
    differences, so attention needs no derivative in forward mode, and is normalised.
    """

    passes = 2

    def losses(
        self,
        models: Mapping[str, nn.Module],
        inputs: Inputs,
        noise: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Return the squared distance of each sample's prediction from one that changes less.

        Its value says little, because the derivative is normalised; its gradient is that of the
        paper's equation 8.
        """
        student, objective = models[TRANSFORMER], self.objective
        timesteps = objective.timesteps(positions)
        noised = objective.add_noise(inputs.latents, noise, timesteps)
        prediction = predict(student, noised, inputs, timesteps).float()
        upper = (timesteps + DIFFERENCE).clamp(max=objective.timesteps(torch.ones(1)).item())
        lower = (timesteps - DIFFERENCE).clamp(min=objective.clean_timestep)
        with torch.no_grad():
            guided = self.teacher_prediction(models[TEACHER], noised, inputs, timesteps)
            answers = [
                self.consistent(
                    student, objective.move(noised, guided, timesteps, goal), inputs, goal
                ).float()
                for goal in (lower, upper)
            ]
            share = ((upper - lower) / NUM_TIMESTEPS).view(-1, 1, 1, 1)
            tangent = objective.levels(timesteps)[0] * (answers[1] - answers[0]) / share
            size = tangent.square().mean(dim=(1, 2, 3), keepdim=True).sqrt()
            target = prediction + tangent / (size + TANGENT)
        return (prediction - target).square().flatten(1).mean(dim=1)


def _huber(difference: torch.Tensor, c: float) -> torch.Tensor:
    """Return the mean pseudo-Huber norm of each sample's difference `(B, C, h, w)`, `(B,)`."""
    return ((difference.square() + c**2).sqrt() - c).flatten(1).mean(dim=1)
