"""Figures of signals and of the buffer show the numbers they are given, on axes with units."""

import math

import numpy as np
import pytest
import torch
from matplotlib import pyplot

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.figures import to_jpeg
from diffbuf_lib.notebook import plots
from diffbuf_lib.notebook.plots.buffer import refused
from diffbuf_lib.notebook.plots.signals import frame_times

AUDIO = AudioConfig()


def meshes(figure):
    """The spectrogram of every axes that has one, without the colour bars."""
    return [axes.collections[0] for axes in figure.axes if axes.get_ylabel() == "frequency (Hz)"]


def noise(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.complex64)


def line(axes, label):
    (found,) = (one for one in axes.get_lines() if one.get_label() == label)
    return found


@pytest.mark.parametrize(("center", "first"), [(True, 0.0), (False, 255 / 16000)])
def test_a_frame_is_drawn_at_the_middle_of_its_window(center, first):
    """A click in the middle of the third window is loudest in the column drawn at its time."""
    audio = AudioConfig(stft={"center": center})
    times = frame_times(10, audio)
    assert times[0] == pytest.approx(first)
    wave = torch.zeros(1, 4000)
    wave[0, round(times[3] * 16000)] = 1
    spec = Spectral(**audio.stft.model_dump(), alpha=1)(wave)[0]
    assert spec.abs().sum(0)[:10].argmax() == 3


def test_spectra_have_hertz_seconds_and_one_scale():
    loud, quiet = noise(256, 63), 0.1 * noise(256, 63, seed=1)
    figure = plots.spectra({"loud": loud, "quiet": quiet}, AUDIO)
    first, second = meshes(figure)
    np.testing.assert_allclose(first.get_array(), 20 * loud.abs().log10(), rtol=1e-4)
    assert first.get_clim() == second.get_clim()
    assert first.get_clim()[1] == pytest.approx(20 * math.log10(loud.abs().max()), abs=1e-3)
    below = figure.axes[1]
    assert below.get_xlabel() == "time (s)"
    assert below.get_ylim()[1] == pytest.approx(8000, rel=0.01)
    assert below.get_xlim()[1] == pytest.approx(62.5 * 256 / 16000)


def test_a_full_scale_sine_is_0_db():
    bin_width = AUDIO.sample_rate / AUDIO.stft.n_fft
    sine = torch.sin(2 * torch.pi * 32 * bin_width / AUDIO.sample_rate * torch.arange(16000))
    level = meshes(plots.wave_spectra({"sine": sine}, AUDIO))[0].get_array()
    assert level[:, 30].argmax() == 32
    assert level[32, 30] == pytest.approx(0, abs=0.01)


def test_silence_is_dark():
    (mesh,) = meshes(plots.spectra({"silence": torch.zeros(256, 63, dtype=torch.complex64)}, AUDIO))
    assert mesh.get_array().max() <= mesh.get_clim()[0]


def test_nan_and_inf_can_be_drawn():
    spec = noise(256, 63)
    spec[3, 4], spec[5, 6] = float("nan"), float("inf")
    (mesh,) = meshes(plots.spectra({"broken": spec}, AUDIO))
    assert np.ma.count_masked(mesh.get_array()) == 0
    assert np.isfinite(mesh.get_clim()).all()


def test_waveforms_share_one_scale():
    figure = plots.waveforms({"loud": torch.ones(1600), "quiet": 0.1 * torch.ones(1600)}, 16000)
    first, second = figure.axes
    assert first.get_ylim() == second.get_ylim()
    assert second.get_lines()[0].get_xdata()[-1] == pytest.approx(1599 / 16000)


def test_clips_without_an_snr_are_counted_and_not_drawn():
    (axes,) = plots.snr_histogram([-5.0, 0.0, 0.0, 5.0, math.inf, -math.inf]).axes
    assert sum(bar.get_height() for bar in axes.patches) == 4
    assert axes.get_title("left").startswith("4 clips; 2 ")
    assert plots.snr_histogram([]).axes[0].get_title("left") == "0 clips"


def test_round_trip_shows_the_error_in_db():
    wave = torch.rand(800)
    below = plots.round_trip(wave, wave + 1e-3, 16000).axes[1]
    np.testing.assert_allclose(below.get_lines()[0].get_ydata(), -60, atol=0.01)


def test_compression_is_drawn_linear():
    raw = noise(256, 63)
    before, after = meshes(plots.compression(raw, 0.15 * raw, AUDIO))
    np.testing.assert_allclose(before.get_array(), raw.abs(), rtol=1e-6)
    np.testing.assert_allclose(after.get_array(), 0.15 * raw.abs(), rtol=1e-5)


def test_the_mark_stands_before_the_first_frame_of_the_buffer():
    t = torch.linspace(0.1, 0.8, 20)
    figure = plots.buffer_spectra({"V": noise(256, 63)}, t, 0.2 * t, AUDIO)
    picture, curves = figure.axes[:2]
    hop = 256 / 16000
    for axes in (picture, curves):
        (mark,) = (one for one in axes.get_lines() if one.get_linestyle() == "--")
        assert mark.get_xdata()[0] == pytest.approx((63 - 20 - 0.5) * hop)
    drawn = line(curves, "diffusion time t").get_ydata()
    np.testing.assert_allclose(drawn, np.concatenate([np.zeros(43), t]))
    assert "last 20 of 63 frames" in curves.get_title("right")


def test_a_buffer_of_all_frames_is_marked_at_the_left_edge():
    t = torch.linspace(0.1, 0.8, 63)
    picture = plots.buffer_spectra({"V": noise(256, 63)}, t, t, AUDIO).axes[0]
    (mark,) = picture.get_lines()
    assert mark.get_xdata()[0] == pytest.approx(-0.5 * 256 / 16000)


def test_a_refusal_is_written_above_the_picture():
    figure = refused(noise(256, 63), "buffer_size 80 is too long", AUDIO)
    assert figure.axes[0].get_title("left") == "buffer_size 80 is too long"


def test_frame_counts_are_those_of_torch(tiny_cfg):
    stft = tiny_cfg.audio.stft
    (axes,) = plots.frame_counts(tiny_cfg).axes
    for label, center in (("centred frames (this config)", True), ("frames from sample 0", False)):
        drawn = line(axes, label)
        for x, y in list(zip(drawn.get_xdata(), drawn.get_ydata(), strict=True))[::50]:
            wave = torch.zeros(round(x * tiny_cfg.audio.sample_rate))
            if not center and len(wave) < stft.n_fft:
                assert y == 0
                continue
            frames = torch.stft(
                wave,
                stft.n_fft,
                stft.hop_length,
                window=torch.hann_window(stft.n_fft),
                center=center,
                pad_mode="constant",
                return_complex=True,
            )
            assert y == frames.shape[-1]


def test_noise_along_the_buffer_draws_both():
    sigma = torch.linspace(0.1, 0.2, 5)
    (axes,) = plots.noise_along_buffer(sigma, 2 * sigma).axes
    formula, measured = axes.get_lines()
    np.testing.assert_allclose(measured.get_ydata(), 2 * formula.get_ydata())
    assert formula.get_xdata().tolist() == [1, 2, 3, 4, 5]


def test_a_figure_becomes_a_jpeg():
    assert to_jpeg(plots.waveforms({"wave": torch.rand(100)}, 16000))[:2] == b"\xff\xd8"


def test_pyplot_keeps_no_figure():
    """It would keep every one that it knows of, and is not thread-safe."""
    plots.wave_spectra({"wave": torch.rand(4000)}, AUDIO)
    assert pyplot.get_fignums() == []
