"""Figures of the noise schedule show what the SDE says, and where float16 ends."""

import math

import numpy as np
import pytest
import torch

from diffbuf_lib.diffusion.sde import BBED, OUVE
from diffbuf_lib.notebook import plots
from diffbuf_lib.notebook.plots.schedule import FLOAT16_MAX, weight_of_y

SDES = {"bbed": BBED(), "ouve": OUVE()}


def curve(axes, name):
    (found,) = (line for line in axes.get_lines() if line.get_label() == name)
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


@pytest.mark.parametrize("name", SDES)
def test_four_curves_are_those_of_the_sde(name):
    figure = plots.noise_schedule(SDES, 0.03, 0.8)
    sigma_axes, weight_axes, g_axes, inverse_axes = figure.axes
    t, sigma = curve(sigma_axes, name)
    time = torch.from_numpy(t)
    np.testing.assert_allclose(sigma, SDES[name].std(time))
    np.testing.assert_allclose(curve(g_axes, name)[1], SDES[name].diffusion(time))
    np.testing.assert_allclose(curve(inverse_axes, name)[1], 1 / sigma)
    weight = t if name == "bbed" else 1 - np.exp(-1.5 * t)
    np.testing.assert_allclose(curve(weight_axes, name)[1], weight)


def test_c_and_theta_are_told_apart():
    figure = plots.noise_schedule({"theta": BBED(theta=0.08), "c": BBED(c=0.08)}, 0.03, 0.8)
    theta, c = (curve(figure.axes[0], name)[1] for name in ("theta", "c"))
    np.testing.assert_allclose(theta / c, math.sqrt(0.08) / 0.08)
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["theta", "c"]


def test_times_outside_the_buffer_are_grey():
    axes = plots.noise_schedule({"bbed": BBED()}, 0.1, 0.7).axes[0]
    spans = [patch.get_extents().transformed(axes.transData.inverted()) for patch in axes.patches]
    assert [(round(s.x0, 6), round(s.x1, 6)) for s in spans] == [(0, 0.1), (0.7, 1)]


def test_times_down_to_a_small_t_eps_are_drawn():
    figure = plots.noise_schedule({"bbed": BBED()}, 1e-9, 0.8)
    t, inverse = curve(figure.axes[3], "bbed")
    assert t[0] == pytest.approx(1e-9)
    assert inverse[0] > FLOAT16_MAX


def test_float16_ends_where_the_line_is():
    assert torch.tensor(FLOAT16_MAX).half().isfinite()
    assert torch.tensor(FLOAT16_MAX * 1.001).half().isinf()
    for axes in (
        plots.score_limits(SDES, 0.03).axes[0],
        plots.noise_schedule(SDES, 0.03, 0.8).axes[3],
    ):
        assert FLOAT16_MAX in [line.get_ydata()[0] for line in axes.get_lines()]


def test_score_limits_are_inverse_sigma_and_its_square():
    (axes,) = plots.score_limits(SDES, 0.03).axes
    t, target = curve(axes, "1 / sigma, ouve")
    np.testing.assert_allclose(target, 1 / OUVE().std(torch.from_numpy(t)))
    np.testing.assert_allclose(curve(axes, "1 / sigma^2, ouve")[1], target**2)


def test_weight_of_y_goes_from_none_to_all_for_a_bridge():
    t = torch.tensor([0.0, 0.25, 1.0], dtype=torch.float64)
    assert weight_of_y(BBED(), t).tolist() == [0, 0.25, 1]
    assert weight_of_y(OUVE(), t)[-1] == pytest.approx(1 - math.exp(-1.5))
