"""Muon turns a matrix's momentum into a step of equal size in all directions; the rate falls."""

import pytest
import torch
from torch import nn

from diffbuf_lib.training import load_checkpoint
from diffbuf_lib.training.optimizer import Muon, make_optimizer, make_scheduler, orthogonalise
from tests.conftest import refused, seeded
from tests.training.helpers import assert_same_state, config, fit


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
@pytest.mark.parametrize("shape", [(6, 4, 1, 3), (48, 16), (16, 24, 3)])
def test_the_first_step_of_a_kernel_is_its_gradient_orthogonalised(shape):
    """The longer side brings its size to that of Adam's: one learning rate serves both."""
    torch.manual_seed(0)
    kernel = nn.Parameter(torch.randn(shape))
    before = kernel.detach().clone()
    kernel.grad = gradient = torch.randn(shape)
    Muon([kernel], lr=0.1, weight_decay=0.5).step()
    moved = (before * (1 - 0.1 * 0.5) - kernel.detach()).flatten(1) / 0.1
    ahead = 0.05 * gradient + 0.95 * 0.05 * gradient  # Nesterov's, from a momentum of zero
    expected = orthogonalise(ahead.flatten(1)) * 0.2 * max(moved.shape) ** 0.5
    torch.testing.assert_close(moved, expected, atol=0.01, rtol=0)
    assert 0.1 < float(moved.square().mean().sqrt()) < 0.4
    assert torch.equal(kernel.grad, gradient)  # left for whoever looks at it afterwards


@pytest.mark.law
def test_all_else_moves_as_with_adamw():
    vectors = [nn.Parameter(torch.ones(5)) for _ in range(2)]
    for rule, vector in zip((Muon, torch.optim.AdamW), vectors, strict=True):
        optimizer, generator = rule([vector], lr=0.01, weight_decay=0.1), seeded()
        for _ in range(3):
            vector.grad = torch.randn(5, generator=generator)
            optimizer.step()
    assert torch.equal(*vectors)


LINEAR = "training.lr_schedule=linear"


@pytest.mark.law
def test_a_resumed_run_with_muon_is_one_that_was_never_stopped(tmp_path):
    cfg = config("training.optimizer=muon", LINEAR, "training.warmup_steps=2")
    whole = fit(cfg, tmp_path / "whole")
    parts = [*fit(cfg, tmp_path / "cut", steps=2), *fit(cfg, tmp_path / "cut", resume=True)]
    assert [(r.loss, r.lr) for r in parts] == [(r.loss, r.lr) for r in whole]
    assert_same_state(tmp_path / "whole", tmp_path / "cut")


@pytest.mark.law
def test_a_linear_rate_rises_stays_and_falls_to_nothing():
    training = config("training.lr=1", LINEAR, "training.warmup_steps=4").training
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
    ends = "training.num_steps=2", "training.valid_every=9", "training.metric_for_scheduler=loss"
    records = fit(config(LINEAR, *ends), tmp_path)
    assert [record.valid is not None for record in records] == [False, True]
    assert load_checkpoint(tmp_path / "checkpoints" / "best.pt")["step"] == 2
    assert (tmp_path / "model" / "model.safetensors").is_file()
    longer = config(LINEAR, *ends, "training.num_steps=3")
    refused(lambda: fit(longer, tmp_path, resume=True), "training.num_steps")
