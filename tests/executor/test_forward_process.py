"""What is recorded and trained under `executor.loss diffusion_nft`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from tempact.executor.executor import Executor
from tempact.executor.sampler import NoiseSource, gaussian_noise
from tempact.types import Batch, Plan, Step, Transition

Make = Callable[..., Executor]
COUNT, FORKS = 3, [6, 3]


def plan(*bounds: int) -> Plan:
    return Plan("instruction", tuple(Step(a, b, f"step {a}") for a, b in pairwise(bounds)))


PLANS = [plan(0, 6, 12), plan(0, 3, 12)]


def rolled(executor: Executor) -> tuple[Tensor, Transition, NoiseSource]:
    noise = gaussian_noise(3, executor.noise_shape(2, COUNT), torch.device("cpu"))
    latents, record = executor.roll_out(PLANS, FORKS, noise)
    assert record is not None
    return latents, record, noise


def batch_of(record: Transition, advantage: Tensor) -> Batch:
    mask = torch.ones(2, COUNT, dtype=torch.bool)
    return Batch(torch.zeros(2), torch.ones(2, dtype=torch.bool), advantage, mask, None, record)


ADVANTAGE = torch.tensor([[1.0, -1.0, 0.0], [-0.5, 1.5, -1.0]])


def test_videos_are_those_of_flow_grpo_and_the_record_is_their_clean_chunk_noised_anew(make_executor: Make) -> None:
    executor = make_executor(frames=12, loss="diffusion_nft")
    latents, record, noise = rolled(executor)
    assert torch.equal(latents, rolled(make_executor(frames=12))[0])
    assert record.states.shape[:3] == record.noises.shape[:3] == (2, COUNT, 4)
    sigmas = torch.tensor(executor.settings.schedule.sigmas[:4]).view(4, 1, 1, 1, 1)
    for p, start in enumerate(FORKS):
        for n in range(COUNT):
            clean = record.states[p, n] - sigmas * record.noises[p, n]
            torch.testing.assert_close(clean, latents[p, n, :, start : start + 3].expand(4, -1, -1, -1, -1))
            fresh = record.noises[p, n] + latents[p, n, :, start : start + 3]
            assert torch.equal(fresh.isclose(noise.draw(p, n, 4 + start // 3), atol=1e-5), torch.ones_like(fresh) > 0)
    fresh = record.states[:, :, 0].flatten(2)  # at sigma 1 the chunk is its noise
    drawn = torch.stack([torch.stack([noise.draw(p, n, FORKS[p] // 3)[0] for n in range(COUNT)]) for p in range(2)])
    both = torch.cat([fresh, drawn.flatten(2)]).flatten(0, 1)
    assert torch.corrcoef(both).fill_diagonal_(0).abs().max() < 0.3  # no two of them are one noise


def test_a_process_with_a_part_of_the_continuations_records_the_same(make_executor: Make) -> None:
    executor = make_executor(frames=12, loss="diffusion_nft")
    _, whole, noise = rolled(executor)
    _, part = executor.roll_out(PLANS, FORKS, noise.block(range(1, 3), [frame // 3 for frame in FORKS]))
    torch.testing.assert_close(part.states, whole.states[:, 1:], rtol=0, atol=1e-5)
    torch.testing.assert_close(part.noises, whole.noises[:, 1:], rtol=0, atol=1e-5)


def gradients(executor: Executor) -> Tensor:
    return torch.cat([p.grad.flatten() for p in executor.parameters().values()])


def test_every_call_is_trained_and_micro_batches_change_nothing(make_executor: Make) -> None:
    found = []
    for size in (64, 8, 3):
        executor = make_executor(frames=12, loss="diffusion_nft", micro_batch=size)
        _, record, _ = rolled(executor)
        metrics = executor.update(batch_of(record, ADVANTAGE), [0, 1])
        assert metrics["velocity_change"] == 0.0 and metrics["kl"] == 0.0 and metrics["clean_error"] > 0
        assert set(metrics) == {"loss", "kl", "clean_error", "velocity_change"}
        found.append(gradients(executor))
    for own in found[1:]:
        torch.testing.assert_close(own, found[0], rtol=1e-3, atol=1e-7)
    assert found[0].norm() > 0
    # autograd of the on-policy loss, over all calls and over all but the last
    executor = make_executor(frames=12, loss="diffusion_nft")
    _, record, _ = rolled(executor)
    wanted = []
    for calls in (4, 3):
        for entries, velocity in executor._forward(record, [0, 1], grad=True):
            target = entries.of(record.noises, executor.device)
            error = velocity - target
            sigma = torch.tensor(executor.settings.schedule.sigmas[:4]).repeat(len(error) // 4)
            size = error.abs().flatten(1).mean(1).detach()
            each = sigma * entries.of(ADVANTAGE[..., None].expand(-1, -1, 4), executor.device) / size
            counted = torch.arange(4).repeat(len(error) // 4) < calls
            ((each * error.square().flatten(1).mean(1))[counted].sum() / (6 * 4)).backward()
        wanted.append(gradients(executor))
        for parameter in executor.parameters().values():
            parameter.grad = None
    torch.testing.assert_close(found[0], wanted[0], rtol=1e-3, atol=1e-7)
    assert (found[0] - wanted[1]).norm() > 0.05 * found[0].norm()


def test_equal_rewards_leave_no_gradient(make_executor: Make) -> None:
    executor = make_executor(frames=12, loss="diffusion_nft", kl_weight=0.0)
    _, record, _ = rolled(executor)
    executor.update(batch_of(record, torch.zeros(2, COUNT)), [0, 1])
    assert gradients(executor).abs().max() < 1e-7


@pytest.mark.parametrize(
    "changes",
    [{"loss": "flow_grpo"}, {"loss": "diffusion_nft"}, {"ratio_norm": False, "reweight": True}],
    ids=["flow_grpo", "diffusion_nft", "plain_ratio"],
)
def test_steps_move_towards_the_better_chunks(make_executor: Make, changes: dict) -> None:
    """After some steps the better continuations' clean chunks are predicted better than before, against the worse
    ones', from new noise: under every loss."""
    executor = make_executor(frames=12, clip_velocity_rms=1.0, **changes)
    _, record, noise = rolled(executor)
    judge = make_executor(frames=12, loss="diffusion_nft")
    other = gaussian_noise(99, noise.shape, torch.device("cpu"))
    fresh = replace(noise, draw=lambda p, n, chunk: (other if chunk >= 4 else noise).draw(p, n, chunk))
    _, test = judge.roll_out(PLANS, FORKS, fresh)

    def errors() -> Tensor:
        judge.model.load_state_dict(executor.model.state_dict())
        return (judge.velocities(test, [0, 1]) - test.noises).square().flatten(3).mean((2, 3)).detach()

    with torch.no_grad():
        before = errors()
    for _ in range(20):
        executor.update(batch_of(record, ADVANTAGE), [0, 1])
        with torch.no_grad():
            norm = gradients(executor).norm()
            for parameter in executor.parameters().values():
                parameter.sub_(0.02 / norm * parameter.grad)
                parameter.grad = None
    with torch.no_grad():
        gain = before - errors()
    assert (gain * ADVANTAGE).sum() > 0
