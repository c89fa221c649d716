import pytest
import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler

from localdit.core.diffusion import NOISE_SCHEDULE, Objective
from localdit.training.methods import Inputs, predict
from localdit.training.methods.distillation import (
    TEACHER,
    ContinuousConsistency,
    LatentConsistency,
    TrajectoryDistillation,
)
from localdit.training.state import TRANSFORMER
from tests.tiny import TEXT_WIDTH, tiny_components

KINDS = [LatentConsistency, TrajectoryDistillation, ContinuousConsistency]
OBJECTIVES = [Objective(), Objective("v_prediction"), Objective("flow", flow_shift=2.0)]


@pytest.fixture(scope="module")
def inputs():
    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(3, 4, 8, 8, generator=generator)
    text = torch.randn(3, 8, TEXT_WIDTH, generator=generator)
    empty = torch.randn(2, TEXT_WIDTH, generator=generator)
    conditions = {"resolution": torch.full((1, 2), 64.0), "aspect_ratio": torch.ones(1, 1)}
    return Inputs(latents, text, torch.ones(3, 8), conditions, empty)


class Ideal(torch.nn.Module):
    """A denoiser that knows the only latents there are, so its ODE has straight answers."""

    def __init__(self, objective, latents):
        super().__init__()
        self.objective, self.latents = objective, latents

    def forward(self, noised, timestep, **conditions):
        alpha, sigma = self.objective.levels(timestep)
        latents = self.latents.repeat(len(noised) // len(self.latents), 1, 1, 1)
        noise = (noised - alpha * latents) / sigma
        return (self.objective.target(latents, noise, timestep),)


def make(kind, objective, guidance_scale=1.0, teacher_steps=50, student_steps=4):
    student, teacher = (tiny_components()["transformer"] for _ in range(2))
    settings = (guidance_scale, teacher_steps, student_steps)
    return kind(student, objective, False, {TEACHER: teacher}, *settings)


def losses(method, inputs, student=None, teacher=None, positions=(0.1, 0.5, 0.99)):
    models = {
        TRANSFORMER: student or method.trained[TRANSFORMER],
        TEACHER: teacher or method.frozen[TEACHER],
    }
    noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
    return method.losses(models, inputs, noise, torch.tensor(positions))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.prediction_type)
def test_a_consistent_student_has_nothing_to_learn(kind, objective, inputs):
    ideal = Ideal(objective, inputs.latents)
    found = losses(make(kind, objective), inputs, ideal, ideal)
    assert found.shape == (3,)
    # In continuous time, the tangent of rounding errors is small beside its normalisation.
    assert (found < (2e-3 if kind is ContinuousConsistency else 1e-6)).all()


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.prediction_type)
def test_the_lowest_step_is_compared_with_the_step_of_the_teacher(objective, inputs):
    """Check that a consistency model returns clean latents as they are."""
    method = make(LatentConsistency, objective, teacher_steps=10)
    noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0.0, 0.05, 0.099])
    timesteps, lower = objective.grid(positions, 10)
    assert lower.tolist() == [objective.clean_timestep] * 3
    noised = objective.add_noise(inputs.latents, noise, timesteps)
    prediction = predict(method.frozen[TEACHER], noised, inputs, timesteps)
    expected = objective.denoised(noised, prediction, timesteps)
    _, target = method.answers(
        method.trained[TRANSFORMER], method.frozen[TEACHER], inputs, noise, positions
    )
    torch.testing.assert_close(target, expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_only_the_answer_of_the_student_has_a_gradient(kind, inputs):
    method = make(kind, Objective("v_prediction"), guidance_scale=3.0)
    losses(method, inputs).sum().backward()
    gradients = [p.grad for p in method.trained[TRANSFORMER].parameters()]
    assert any(grad is not None and grad.abs().sum() > 0 for grad in gradients)
    assert all(p.grad is None for p in method.frozen[TEACHER].parameters())


def test_the_gradient_of_continuous_consistency_is_that_of_the_derivative(inputs):
    """Check the direction: a small step makes the answer at t agree better with that below it."""
    objective = Objective("v_prediction")
    method = make(ContinuousConsistency, objective)
    student = method.trained[TRANSFORMER]
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    check = make(LatentConsistency, objective, teacher_steps=100)
    check.frozen = method.frozen
    noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
    positions = torch.tensor([0.75, 0.8, 0.85])

    def distance():
        with torch.no_grad():
            return check.validation_errors(student, inputs, noise, positions).mean().item()

    before = distance()
    for _ in range(5):
        optimizer.zero_grad()
        losses(method, inputs, positions=positions.tolist()).sum().backward()
        optimizer.step()
    assert distance() < before


def test_the_teacher_is_guided(inputs):
    method = make(LatentConsistency, Objective("v_prediction"), guidance_scale=3.0)
    teacher, noised = method.frozen[TEACHER], torch.randn(3, 4, 8, 8)
    timesteps = torch.tensor([5, 500, 990])
    found = method.teacher_prediction(teacher, noised, inputs, timesteps)
    text = predict(teacher, noised, inputs, timesteps)
    empty = inputs._replace(
        text=inputs.empty_text.expand(3, -1, -1), text_mask=torch.ones(3, len(inputs.empty_text))
    )
    uncond = predict(teacher, noised, empty, timesteps)
    torch.testing.assert_close(found, uncond + 3.0 * (text - uncond), rtol=0, atol=1e-5)
    assert not torch.allclose(text, uncond, atol=1e-4)


def test_operations_count_all_passes(inputs):
    objective = Objective()
    one = make(LatentConsistency, objective).step_flops(inputs)
    guided = make(LatentConsistency, objective, guidance_scale=2.0).step_flops(inputs)
    continuous = make(ContinuousConsistency, objective, guidance_scale=2.0).step_flops(inputs)
    # Three for the student, and one for each pass of the teacher or without gradient.
    assert (one * 6, one * 7) == (guided * 5, continuous * 5)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda one: one.prediction_type)
def test_trajectories_are_those_of_the_teacher_in_its_pipeline(objective, inputs):
    """Check the points against DDIM's, or Euler's for flow matching."""
    method = make(TrajectoryDistillation, objective, guidance_scale=3.0, teacher_steps=5)
    teacher = method.frozen[TEACHER]
    noise = torch.randn(inputs.latents.shape, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        points, timesteps, end = method.trajectory(teacher, inputs, noise)
    if objective.is_flow:
        scheduler = FlowMatchEulerDiscreteScheduler(shift=objective.flow_shift)
        scheduler.set_timesteps(sigmas=[1 - i / 5 for i in range(5)])
    else:
        scheduler = DDIMScheduler(
            prediction_type=objective.prediction_type, timestep_spacing="trailing",
            clip_sample=False, **NOISE_SCHEDULE,
        )  # fmt: skip
        scheduler.set_timesteps(5)
    assert [one[0].item() for one in timesteps] == pytest.approx(scheduler.timesteps.tolist())
    latents = points[0]
    for point, timestep in zip(points, scheduler.timesteps, strict=True):
        torch.testing.assert_close(point, latents, rtol=0, atol=1e-4)
        with torch.no_grad():
            now = timestep.expand(3)
            prediction = method.teacher_prediction(teacher, latents, inputs, now)
        latents = scheduler.step(prediction, timestep, latents).prev_sample
    torch.testing.assert_close(end, latents, rtol=0, atol=1e-4)


@pytest.mark.parametrize("steps, student_steps", [(8, 4), (8, 3), (8, 1), (5, 5), (50, 4)])
def test_the_student_answers_where_it_is_sampled(steps, student_steps, inputs):
    objective = Objective("v_prediction")
    method = make(TrajectoryDistillation, objective, 1.0, steps, student_steps)
    ideal, seen = Ideal(objective, inputs.latents), []

    def student(noised, timestep, **conditions):
        seen.extend(timestep[:: len(inputs.latents)].tolist())
        return ideal(noised, timestep)

    losses(method, inputs, student, ideal)
    scheduler = objective.few_step_scheduler(steps)
    scheduler.set_timesteps(student_steps)
    assert seen == scheduler.timesteps.tolist()


@pytest.mark.parametrize("kind", KINDS)
def test_losses_depend_on_the_options_that_the_command_line_takes(kind, inputs):
    """Check what `parse_args` says: weights for none, positions for all but trajectories."""

    def found(objective, positions=(0.1, 0.5, 0.99)):
        method = make(kind, objective, teacher_steps=4, student_steps=2)
        return losses(method, inputs, positions=positions)

    plain = found(Objective())
    assert torch.equal(found(Objective(min_snr_gamma=0.1)), plain)
    assert torch.equal(found(Objective(), (0.3, 0.6, 0.7)), plain) == (
        kind is TrajectoryDistillation
    )
    flow = found(Objective("flow"))
    assert not torch.equal(found(Objective("flow", flow_shift=3.0)), flow)


def test_few_step_schedulers_are_those_of_the_grid():
    scheduler = Objective("v_prediction").few_step_scheduler(10)
    scheduler.set_timesteps(4)
    grid, _ = Objective().grid(torch.arange(10) / 10 + 0.05, 10)
    assert set(scheduler.timesteps.tolist()) <= set(grid.tolist())
    assert scheduler.timesteps[0] == 999
    assert scheduler.config.prediction_type == "v_prediction"
    assert Objective("flow", flow_shift=3.0).few_step_scheduler(10).config.shift == 3.0
