"""sigma against numerical integration, and the SDE's own consistency."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate

from diffbuf_lib.diffusion.sde import BBED, OUVE
from tests.conftest import refused, seeded

pytestmark = pytest.mark.law

TIMES = np.concatenate([np.geomspace(1e-4, 0.1, 12), np.linspace(0.15, 0.999, 12)])


def integrated_variance(sde, t, mean_factor):
    """Var X_t = int_0^t (m(t) / m(s))^2 g(s)^2 ds, with m the factor of x0 in the mean."""

    def integrand(s):
        g = sde.diffusion(torch.tensor(s, dtype=torch.float64)).item()
        return (mean_factor(t) / mean_factor(s) * g) ** 2

    value, _ = integrate.quad(integrand, 0, t, epsabs=0, epsrel=1e-11, limit=500)
    return value


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("sde", "mean_factor"),
    [
        (BBED(), lambda t: 1 - t),
        (BBED(c=0.08), lambda t: 1 - t),
        (BBED(k=10.0, theta=0.5), lambda t: 1 - t),
        (BBED(k=0.4), lambda t: 1 - t),
        (OUVE(), lambda t: math.exp(-1.5 * t)),
        (OUVE(gamma=2.0, sigma_min=0.01, sigma_max=1.0), lambda t: math.exp(-2 * t)),
    ],
)
def test_sigma_agrees_with_numerical_integration(sde, mean_factor, dtype):
    t = torch.tensor(TIMES, dtype=dtype)
    expected = [math.sqrt(integrated_variance(sde, s, mean_factor)) for s in t.double().tolist()]
    torch.testing.assert_close(
        sde.std(t).double(), torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=0
    )
    assert sde.std(t).dtype == dtype


def test_bbed_sigma_is_zero_at_both_ends_and_has_the_published_maxima():
    t = torch.linspace(0, 1, 20001)
    assert BBED().std(t)[[0, -1]].tolist() == [0, 0]
    assert BBED(theta=0.08).std(t).max().item() == pytest.approx(0.212, abs=5e-4)
    assert BBED(c=0.08).std(t).max().item() == pytest.approx(0.060, abs=5e-4)
    torch.testing.assert_close(BBED(theta=0.08).std(t), BBED(c=math.sqrt(0.08)).std(t))
    refused(lambda: BBED(c=0.08, theta=0.08), "both given")


@pytest.mark.parametrize("sde", [BBED(), OUVE()])
def test_mean_follows_the_drift_and_denoised_undoes_it(sde):
    """d mean / dt = f(mean, y), whatever t_max is."""
    x0, y = torch.randn(2, 1, 3, 5, dtype=torch.complex128).unbind(0)
    t = torch.rand(1, 5, dtype=torch.float64) * 0.9
    step = 1e-6
    slope = (sde.mean(x0, y, t + step) - sde.mean(x0, y, t - step)) / (2 * step)
    torch.testing.assert_close(slope, sde.drift(sde.mean(x0, y, t), y, t), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(sde.denoised(sde.mean(x0, y, t), y, t), x0)


@pytest.mark.parametrize("sde", [BBED(), OUVE()])
def test_simulated_paths_have_mean_and_sigma(sde):
    """Euler-Maruyama of dX = f dt + g dw, 4000 paths: an oracle that knows no closed form."""
    generator = seeded()
    paths, steps, end = 4000, 400, 0.7
    x, y = torch.tensor([[1.0], [-0.5]], dtype=torch.complex128).expand(2, paths)
    dt = end / steps
    for step in range(steps):
        t = torch.tensor(step * dt, dtype=torch.float64)
        dw = torch.randn(paths, dtype=torch.complex128, generator=generator) * math.sqrt(dt)
        x = x + sde.drift(x, y, t) * dt + sde.diffusion(t) * dw
    t = torch.tensor(end, dtype=torch.float64)
    sigma = sde.std(t).item()
    assert abs(x.mean() - sde.mean(x[0] * 0 + 1, y[0], t)) < 4 * sigma / math.sqrt(paths)
    assert x.std().item() == pytest.approx(sigma, rel=0.05)
