"""The figures of 04 to 06 show the numbers they are given, and the oracle is one."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.data import collate
from diffbuf_lib.diagnostics import gradient_statistics, score_statistics
from diffbuf_lib.diffusion.buffer import perturb
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.figures import to_pixels
from diffbuf_lib.notebook import oracle, plots
from diffbuf_lib.notebook.clips import FirstClips
from diffbuf_lib.notebook.plots.stepping import stepping
from tests.conftest import TINY, make_model, seeded
from tests.training.helpers import Clips, config, fit

SDES = [
    ["sde.type=bbed"],
    ["sde.type=bbed", "sde.diffusion.c=0.08"],
    ["sde.type=bbed", "sde.diffusion.theta=0.52", "sde.diffusion.k=1.4"],
    ["sde.type=ouve"],
    ["sde.type=ouve", "sde.diffusion.gamma=0.7"],
]


def batch(size=2):
    wave = torch.randn(size, 1, 1600, generator=seeded(3)) * 0.1
    return wave + torch.randn(size, 1, 1600, generator=seeded(4)) * 0.1, wave


@pytest.fixture
def model(tiny_cfg):
    return make_model(tiny_cfg)


@pytest.fixture
def trace(model):
    return model.trace(*batch(), seeded())


@pytest.fixture
def statistics(model):
    return score_statistics(model, [batch()], time_bins=3, bands=4)


def is_drawn(figure):
    """Whether a figure is more than its background, and fits a page."""
    pixels = to_pixels(figure)
    assert pixels.shape[1] <= 1000
    return pixels.std() > 5


def lines(axes):
    return {line.get_label(): line.get_xydata() for line in axes.get_lines()}


@pytest.mark.parametrize("overrides", SDES, ids=" ".join)
def test_sigma_of_the_oracle_is_that_of_the_sde(overrides):
    sde = build_config({}, overrides).sde
    t = torch.linspace(1e-3, 0.99, 40, dtype=torch.float64)
    torch.testing.assert_close(oracle.sigma(sde, t), make_sde(sde).std(t), rtol=1e-5, atol=0)


@pytest.mark.parametrize("overrides", SDES, ids=" ".join)
def test_v_of_the_oracle_is_that_of_the_buffer(overrides):
    sde = build_config({}, overrides).sde
    S, Y, z = (torch.randn(2, 5, n, dtype=torch.complex64, generator=seeded(n)) for n in (7, 7, 3))
    t = torch.rand(2, 3, generator=seeded()).sort().values * 0.9 + 0.05
    V = perturb(S, Y, t, z, make_sde(sde))
    torch.testing.assert_close(oracle.perturbed(S, Y, t, z, sde), V, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["audio.stft.n_fft=80", "audio.stft.hop_length=20"],
        ["audio.stft.center=false"],
        ["audio.stft.window=sqrt_hann", "preprocessing.magnitude_compression.alpha=1"],
        ["audio.stft.window=hamming"],
    ],
)
def test_spectrum_of_the_oracle_is_that_of_the_model(overrides):
    cfg = build_config(TINY, overrides)
    mix, _ = batch()
    spectral = Spectral.from_config(cfg.audio.stft, cfg.preprocessing.magnitude_compression)
    expected = spectral(mix.mean(1))
    torch.testing.assert_close(oracle.spectrum(mix, cfg), expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "override",
    [
        "sde={type: bbed, diffusion: {c: 0.08}}",
        "audio.stft.hop_length=31",
        "audio.stft.window=hamming",
    ],
)
def test_the_oracle_notices_what_is_wrong(trace, override):
    """What the notebooks assert does not hold for a model of another config."""
    cfg = build_config(TINY, [override])
    Y = oracle.spectrum(trace.mix, cfg)
    same_Y = Y.shape == trace.Y.shape and torch.allclose(trace.Y, Y, atol=1e-3)
    assert not (same_Y and torch.allclose(oracle.sigma(cfg.sde, trace.t), trace.sigma, rtol=1e-3))


def test_every_figure_is_drawn(trace, statistics, model, tiny_cfg):
    trace.loss.backward()
    gradients = gradient_statistics(model)
    t = torch.linspace(0.1, 0.7, 20)
    both = {"plain": statistics, "weighted": statistics}
    figures = [
        plots.target_histogram(trace),
        plots.target_by_time(statistics, t, oracle.sigma(tiny_cfg.sde, t)),
        plots.loss_shares(both),
        plots.score_quality(both),
        plots.correlation_map(statistics),
        plots.precision_errors(trace, {"bfloat16": trace}),
        plots.compare_gradients({"plain": gradients, "weighted": gradients}),
        plots.gradients(gradients),
        stepping([3.0, 2.0], gradients, trace, "V", tiny_cfg),
        stepping([], None, trace, "V", tiny_cfg),
    ]
    assert all(is_drawn(figure) for figure in figures)


def test_target_by_time_draws_the_rows(statistics):
    t = torch.tensor([0.2, 0.4])
    axes = plots.target_by_time(statistics, t, torch.tensor([0.5, 0.25])).axes[0]
    heights = [bar.get_height() for bar in axes.patches]
    np.testing.assert_allclose(heights, [row.target_rms for row in statistics.by_time])
    np.testing.assert_allclose(lines(axes)["1 / sigma(t)"][:, 1], [2, 4])


def test_loss_shares_add_up_to_100_percent(statistics):
    axes = plots.loss_shares({"one": statistics, "two": statistics}).axes[0]
    for bars in axes.containers:
        assert sum(bar.get_height() for bar in bars) == pytest.approx(100)


def test_an_empty_range_of_times_is_left_out(model):
    """With more ranges than frames, some have none: NaN, and no warning."""
    sparse = score_statistics(model, [batch(1)], time_bins=40, bands=2)
    assert any(row.count == 0 for row in sparse.by_time)
    for figure in (
        plots.loss_shares({"one": sparse}),
        plots.score_quality({"one": sparse}),
        plots.correlation_map(sparse),
    ):
        assert is_drawn(figure)


def test_gradient_bars_are_the_norms(trace, model):
    trace.loss.backward()
    gradients = gradient_statistics(model)
    axes = plots.compare_gradients({"one": gradients}).axes[0]
    assert [bar.get_width() for bar in axes.patches] == [row.norm for row in gradients]


def test_precision_errors_are_relative(trace):
    other = replace(trace, score=trace.score * 1.02)
    axes = plots.precision_errors(trace, {"other": other}).axes[0]
    np.testing.assert_allclose(lines(axes)["other"][:, 1], 2, rtol=1e-3)


@pytest.mark.parametrize("name", ["mix", "Y", "t", "z", "V", "loss_map", "loss"])
def test_a_stage_with_nan_is_drawn(trace, tiny_cfg, name):
    """The debugger is for runs that went wrong."""
    getattr(trace, name).data.flatten()[:1] = math.nan
    assert to_pixels(plots.stage(trace, name, tiny_cfg)).std() > 1


def test_a_stage_of_the_buffer_stands_at_its_time(trace, tiny_cfg):
    """The last frame of z lies where the last frame of V does."""
    hop = tiny_cfg.audio.stft.hop_length / tiny_cfg.audio.sample_rate
    last = (trace.V.shape[-1] - 1) * hop
    for name in ("V", "z"):
        low, high = plots.stage(trace, name, tiny_cfg).axes[0].get_xlim()
        assert low < last <= high + hop / 2
        assert high - low == pytest.approx(getattr(trace, name).shape[-1] * hop, abs=hop)


STEPS = [
    {"step": i, "loss": 1 / i, "grad_norm": 0.1, "lr": 1e-3, "epoch": 0, "valid": None}
    for i in range(1, 31)
]
VALID = {"step": 30, "epoch": 0, "valid": {"loss": 0.2, "si_sdr": 3.0}, "final": False}


@pytest.mark.parametrize("history", [[], STEPS[:1], STEPS, [*STEPS, VALID]])
def test_progress_is_drawn_from_the_first_step_on(tiny_cfg, history):
    clip = {"mix": torch.randn(1600), "target": torch.zeros(1600)}
    figure = plots.training_progress(history, clip, tiny_cfg.audio)
    assert is_drawn(figure)
    scores = figure.axes[1]
    assert bool(len(scores.get_yticks())) == (VALID in history), "a scale without a score"


def test_progress_draws_loss_and_scores(tiny_cfg):
    figure = plots.training_progress([*STEPS, VALID], {}, tiny_cfg.audio)
    loss, scores = figure.axes[0], figure.axes[1]
    np.testing.assert_allclose(loss.get_lines()[0].get_ydata(), [1 / i for i in range(1, 31)])
    assert lines(loss)["validation"].tolist() == [[30, 0.2]]
    assert lines(scores)["si_sdr"].tolist() == [[30, 3.0]]


def test_progress_of_a_run_with_numbers_that_are_not_finite(tiny_cfg):
    bad = [{**STEPS[0], "loss": None, "grad_norm": math.inf}, *STEPS[1:]]
    assert is_drawn(plots.training_progress(bad, {}, tiny_cfg.audio))


def test_runs_are_compared_from_their_folders(tmp_path):
    for name in ("one", "two"):
        fit(config(), tmp_path / name)
    runs = {"one": tmp_path / "one", "two": tmp_path / "two", "lines": STEPS, "none": tmp_path}
    left, right = plots.compare_runs(runs).axes
    assert list(lines(left)) == list(runs)
    assert len(lines(left)["one"]) == 6
    assert len(lines(right)["one"]) == 2


def test_first_clips():
    clips = Clips(5)
    first = FirstClips(clips, 3)
    assert len(first) == 3
    mix, _ = collate([first[i] for i in range(3)])
    torch.testing.assert_close(mix[2], clips[2][0])
    assert first.name(1) == "clip_001.wav"
    first.set_epoch(4)
    assert clips.epoch == 4
    with pytest.raises(IndexError):
        first[3]


def test_first_clips_of_a_small_dataset_are_repeated():
    clips = Clips(5)
    more = FirstClips(clips, 12)
    assert len(more) == 12
    assert [more.name(i) for i in (4, 5, 11)] == [clips.name(i) for i in (4, 0, 1)]
    torch.testing.assert_close(more[11][0], clips[1][0])
    assert len(FirstClips(Clips(0), 12)) == 0
