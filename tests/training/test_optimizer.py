"""Muon turns a matrix's momentum into a step of equal size in all directions; the rate falls."""

import copy

import pytest
import torch
from torch import nn

from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.training import load_checkpoint
from diffbuf_lib.training.optimizer import Muon, make_optimizer, make_scheduler, orthogonalise
from tests.training.helpers import config, fit


def descend(optimizer, parameters, steps=1, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()


@pytest.mark.law
@pytest.mark.parametrize("shape", [(8, 24), (24, 8), (16, 16)])
def test_singular_values_come_close_to_one_and_directions_stay(shape):
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    U, _, Vh = torch.linalg.svd(matrix, full_matrices=False)
    out = orthogonalise(matrix)
    rotated = U.T @ out @ Vh.T
    values = rotated.diagonal()
    assert 0.6 < float(values.min()) <= float(values.max()) < 1.3
    assert float((rotated - values.diag()).abs().max()) < 0.1  # bfloat16
    assert torch.equal(orthogonalise(128 * matrix), out)  # a power of 2: rounding is the same
    assert not orthogonalise(torch.zeros(shape)).any()


@pytest.mark.law
def test_the_first_step_of_a_kernel_is_its_gradient_orthogonalised():
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(6, 4, 1, 3))
    before = kernel.detach().clone()
    optimizer = Muon([kernel], lr=0.1, weight_decay=0.5)
    kernel.grad = torch.randn_like(kernel)
    gradient = kernel.grad.clone()
    optimizer.step()
    moved = (before * (1 - 0.1 * 0.5) - kernel.detach()).flatten(1) / 0.1
    ahead = 0.05 * gradient + 0.95 * 0.05 * gradient  # Nesterov's, from a momentum of zero
    expected = orthogonalise(ahead.flatten(1)) * 0.2 * 12**0.5
    torch.testing.assert_close(moved, expected, atol=0.01, rtol=0)
    assert torch.equal(kernel.grad, gradient)  # left for whoever looks at it afterwards


@pytest.mark.law
def test_an_update_has_the_size_of_adams():
    """So that one learning rate serves both."""
    torch.manual_seed(0)
    for shape in ((64, 64), (48, 144, 1, 3), (256, 16)):
        weight = nn.Parameter(torch.zeros(shape))
        descend(Muon([weight], lr=1.0, weight_decay=0), [weight])
        assert 0.1 < float(weight.detach().square().mean().sqrt()) < 0.4


@pytest.mark.law
def test_all_else_moves_as_with_adamw():
    vectors = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    descend(Muon([vectors[0]], lr=0.01, weight_decay=0.1), vectors[:1], steps=3)
    descend(torch.optim.AdamW([vectors[1]], lr=0.01, weight_decay=0.1), vectors[1:], steps=3)
    assert torch.equal(vectors[0], vectors[1])


@pytest.mark.law
def test_a_restored_state_goes_on_alike():
    def start():
        torch.manual_seed(0)
        parameters = list(nn.Linear(4, 6).parameters())
        return parameters, Muon(parameters, lr=0.01)

    one, optimizer = start()
    descend(optimizer, one, steps=2)
    two, other = start()
    with torch.no_grad():
        for p, q in zip(one, two, strict=True):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    descend(optimizer, one, seed=1)
    descend(other, two, seed=1)
    assert all(torch.equal(p, q) for p, q in zip(one, two, strict=True))


@pytest.mark.law
def test_a_resumed_run_with_muon_is_one_that_was_never_stopped(tmp_path):
    cfg = config(
        "training.optimizer=muon", "training.lr_schedule=linear", "training.warmup_steps=2"
    )
    whole = fit(cfg, tmp_path / "whole")
    first = fit(cfg, tmp_path / "cut", steps=2)
    rest = fit(cfg, tmp_path / "cut", resume=True)
    assert [r.loss for r in first + rest] == [r.loss for r in whole]
    assert [r.lr for r in first + rest] == [r.lr for r in whole]


@pytest.mark.law
def test_a_linear_rate_rises_stays_and_falls_to_nothing():
    training = config(
        "training.lr=1", "training.lr_schedule=linear", "training.warmup_steps=4"
    ).training
    optimizer = make_optimizer(training, nn.Linear(2, 2))
    schedule = make_scheduler(training, optimizer, total_steps=100)
    rates = []
    for _ in range(100):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates[:6] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1, 1])
    assert rates[30] == 1
    assert rates[65] == pytest.approx(0.5)
    assert rates[99] == pytest.approx(1 / 70)
    assert optimizer.param_groups[0]["lr"] == 0


def test_the_end_of_a_linear_run_is_judged_and_cannot_be_moved(tmp_path):
    """Its last weights are what the falling rate was for."""
    cfg = config(
        "training.lr_schedule=linear", "training.num_steps=2", "training.valid_every=9",
        "training.metric_for_scheduler=loss",
    )  # fmt: skip
    records = fit(cfg, tmp_path)
    assert [record.valid is not None for record in records] == [False, True]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == 2
    assert (tmp_path / "model" / "model.safetensors").is_file()
    with pytest.raises(CheckpointError, match=r"training.num_steps was 2, is 3"):
        fit(cfg.override("training.num_steps=3"), tmp_path, resume=True)
