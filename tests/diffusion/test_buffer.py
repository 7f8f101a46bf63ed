"""The perturbed input by formula, the times, the noise, and the steps back."""

import pytest
import torch

from diffbuf_lib.diffusion.buffer import (
    complex_normal,
    draw_times,
    inference_times,
    next_times,
    perturb,
    renoise_step,
    reverse_step,
)
from diffbuf_lib.diffusion.losses import LossInputs
from diffbuf_lib.diffusion.sde import BBED, OUVE
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.registry import LOSSES
from tests.conftest import refused, seeded

pytestmark = pytest.mark.law

SHAPE = (2, 3, 9)


def spectra(dtype=torch.complex128):
    return (torch.randn(SHAPE, dtype=dtype, generator=seeded(i)) for i in range(2))


@pytest.mark.parametrize("sde", [BBED(), OUVE()])
@pytest.mark.parametrize("Kb", [1, 4, 9])
def test_perturbed_input_frame_by_frame(sde, Kb):
    x0, y = spectra()
    t = torch.rand(2, Kb, dtype=torch.float64, generator=seeded(3)).sort().values * 0.9
    z = complex_normal((2, 3, Kb), seeded(4), dtype=torch.complex128)
    V, before = perturb(x0, y, t, z, sde), next(spectra())
    assert torch.equal(x0, before)
    for b in range(2):
        for k in range(9):
            i = k - (9 - Kb)
            if i < 0:
                expected = x0[b, :, k]
            else:
                moment = t[b, i]
                factor = (1 - moment) if isinstance(sde, BBED) else torch.exp(-sde.gamma * moment)
                expected = factor * x0[b, :, k] + (1 - factor) * y[b, :, k]
                expected = expected + sde.std(moment) * z[b, :, i]
            torch.testing.assert_close(V[b, :, k], expected)


def test_misfitting_shapes_are_refused():
    x0, y = spectra()
    for parts in (
        (x0, y[..., :-1], torch.rand(2, 3), y[..., :3]),
        (x0, y, torch.rand(2, 10), torch.zeros(2, 3, 10)),
    ):
        refused(lambda parts=parts: perturb(*parts, BBED()), "1 <= Kb <= K")
    refused(lambda: complex_normal((2, 5), [seeded() for _ in range(3)]), "3 generators")


def test_noise_has_total_variance_one_and_each_example_may_have_its_own():
    z = complex_normal((1000, 100), seeded())
    assert z.real.var().item() == pytest.approx(0.5, abs=0.01)
    assert z.imag.var().item() == pytest.approx(0.5, abs=0.01)
    assert (z * z).mean().abs() < 0.01  # circular
    both = complex_normal((2, 5), [seeded(1), seeded(2)])
    assert torch.equal(both[1:], complex_normal((1, 5), [seeded(2)]))


def test_drawn_times_rise_from_t_eps_within_t_max_and_those_of_inference_evenly(tiny_cfg):
    cfg = tiny_cfg.diffusion_buffer.model_copy(update={"buffer_size": 50})
    t = draw_times(cfg, 200, seeded())
    assert t.shape == (200, 50)
    assert (t[:, 0] == t.new_tensor(cfg.t_eps)).all()
    assert (t.diff() >= 0).all()
    assert t.max() <= cfg.t_max
    # Uniform: the mean of all but the first is the middle of the interval.
    assert t[:, 1:].mean().item() == pytest.approx((cfg.t_eps + cfg.t_max) / 2, abs=0.01)
    cfg = cfg.model_copy(update={"time_sampling": "linspace"})
    t = draw_times(cfg, 3)
    assert torch.equal(t[2], inference_times(cfg))
    torch.testing.assert_close(t[0], torch.linspace(cfg.t_eps, cfg.t_max, 50))


def test_reverse_step_by_formula():
    sde = BBED()
    x, y, score, z = (torch.randn(1, 2, 3, dtype=torch.complex128) for _ in range(4))
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    stepped = reverse_step(x, y, score, t, z, sde)
    for i, (now, before) in enumerate([(0.1, 0.0), (0.4, 0.1), (0.8, 0.4)]):
        dt, g = now - before, 0.08**0.5 * 2.6**now
        f = (y[..., i] - x[..., i]) / (1 - now)
        noise = g * dt**0.5 * z[..., i] if i else 0
        torch.testing.assert_close(
            stepped[..., i], x[..., i] - (f - g**2 * score[..., i]) * dt + noise
        )


def test_renoise_step_puts_each_frame_to_the_time_before():
    sde = OUVE()
    x0, y, z = (torch.randn(1, 2, 3, dtype=torch.complex128) for _ in range(3))
    t = torch.tensor([0.1, 0.4, 0.8], dtype=torch.float64)
    after = next_times(t)
    moved = renoise_step(x0, y, after, sde.std(after), z, sde)
    torch.testing.assert_close(moved[..., 0], x0[..., 0])  # no noise at t = 0
    torch.testing.assert_close(
        moved[..., 2], sde.mean(x0, y, t[1])[..., 2] + sde.std(t[1]) * z[..., 2]
    )


@pytest.mark.parametrize("sde", [BBED(), OUVE(gamma=1.5)])
def test_closed_form_score_recovers_the_clean_spectrum(sde):
    """With the true score of one known clean signal, the reverse process ends there."""
    torch.manual_seed(0)
    x0, y = (torch.randn(1, 16, 1, dtype=torch.complex128) for _ in range(2))
    steps = torch.linspace(1e-3, 0.8, 800, dtype=torch.float64)
    x = sde.mean(x0, y, steps[-1]) + sde.std(steps[-1]) * torch.randn_like(x0)
    start = (x - x0).abs().mean()
    for i in range(len(steps) - 1, -1, -1):
        pair = steps[max(i - 1, 0) : i + 1]
        t = pair[-1:]
        score = (sde.mean(x0, y, t.expand(1, 1)) - x) / sde.std(t) ** 2
        # The last entry of a two-frame buffer goes from t_i to t_{i-1}.
        frames = [v.expand(1, 16, len(pair)) for v in (x, y, score)]
        z = torch.randn(1, 16, len(pair), dtype=torch.complex128)
        x = reverse_step(*frames, pair, z, sde)[..., -1:]
    assert (x - x0).abs().mean() < 0.03 * start


def test_losses_by_formula_and_at_their_optimum():
    z = torch.randn(2, 3, 4, dtype=torch.complex128)
    S, x0_hat, score = (torch.randn_like(z) for _ in range(3))
    sigma = torch.rand(2, 1, 4, dtype=torch.float64) + 0.1

    def loss(name, score):
        return LOSSES[name].load()(LossInputs(score, x0_hat, S, z, sigma, Spectral()))

    plain = loss("score", score)
    weighted = loss("weighted_score", score)
    torch.testing.assert_close(plain, (score + z / sigma).abs() ** 2)
    torch.testing.assert_close(weighted, sigma**2 * plain)
    torch.testing.assert_close(loss("data_prediction", score), (x0_hat - S).abs() ** 2)
    for name in ("score", "weighted_score"):
        assert loss(name, -z / sigma).max() < 1e-25
