"""Scores against formulas written out here, and clips for which there is no score."""

import importlib.util

import numpy as np
import pytest
import torch

from diffbuf_lib.errors import ConfigError, MissingExtraError, ShapeError
from diffbuf_lib.training import mean_scores, score_clips

ALL = ["si_sdr", "sdr", "pesq", "estoi"]


def speech(seconds=1.0, seed=0):
    """[1, T]: a voice-like buzz in syllables, enough for PESQ and ESTOI to find speech."""
    time = torch.arange(int(16000 * seconds)) / 16000
    buzz = sum(torch.sin(2 * torch.pi * 150 * h * time) / h for h in range(1, 12))
    noise = 0.01 * torch.randn(len(time), generator=torch.Generator().manual_seed(seed))
    return (0.1 * buzz * (1 + torch.sin(2 * torch.pi * 4 * time)) + noise)[None]


def noisy(wave, level, seed=1):
    noise = torch.randn(wave.shape, generator=torch.Generator().manual_seed(seed))
    return wave + level * noise


@pytest.mark.law
def test_si_sdr_by_hand():
    target = torch.cat([speech(), speech(seed=5)])
    estimate = noisy(target, 0.05)
    s, e = target.double().numpy(), estimate.double().numpy()
    scaled = (s * e).sum(1, keepdims=True) / (s * s).sum(1, keepdims=True) * s
    expected = 10 * np.log10((scaled**2).sum(1) / ((e - scaled) ** 2).sum(1))
    scores = score_clips(estimate, target, 16000, ["si_sdr"])["si_sdr"]
    np.testing.assert_allclose(scores.numpy(), expected, rtol=1e-4)
    louder = score_clips(7 * estimate, target, 16000, ["si_sdr"])["si_sdr"]
    torch.testing.assert_close(louder, scores, rtol=1e-4, atol=1e-4)


@pytest.mark.law
def test_sdr_by_hand():
    """The projection on 512 shifts of the target, by least squares."""
    target = speech(0.1)
    estimate = noisy(target, 0.1)
    s, e = target[0].double().numpy(), estimate[0].double().numpy()
    e = np.concatenate([e, np.zeros(511)])
    shifts = np.stack([np.concatenate([np.zeros(d), s, np.zeros(511 - d)]) for d in range(512)], 1)
    projected = shifts @ np.linalg.solve(shifts.T @ shifts, shifts.T @ e)
    expected = 10 * np.log10((projected**2).sum() / ((e - projected) ** 2).sum())
    score = score_clips(estimate, target, 16000, ["sdr"])["sdr"].item()
    assert score == pytest.approx(expected, abs=0.01)


@pytest.mark.law
def test_better_estimates_score_better():
    target = speech(2.0)
    good, bad = (score_clips(noisy(target, level), target, 16000, ALL) for level in (0.003, 0.1))
    for metric in ALL:
        assert good[metric].item() > bad[metric].item(), metric
    assert 1 < bad["pesq"].item() < good["pesq"].item() < 4.65
    assert 0 < good["estoi"].item() <= 1


@pytest.mark.law
def test_wide_and_narrow_band():
    from pesq import pesq

    target, estimate = speech(2.0), noisy(speech(2.0), 0.01)
    for rate, mode in ((16000, "wb"), (8000, "nb")):
        score = score_clips(estimate, target, rate, ["pesq"])["pesq"].item()
        expected = pesq(rate, target[0].numpy(), estimate[0].numpy(), mode)
        assert score == pytest.approx(expected, abs=1e-4)


@pytest.mark.law
def test_one_bad_clip_does_not_spoil_the_others():
    target = speech(2.0).repeat(5, 1)
    estimate = noisy(target, 0.02)
    target[1] = 0
    estimate[2] = 0
    estimate[3, 5] = torch.nan
    scores = score_clips(estimate, target, 16000, ALL)
    for metric in ALL:
        assert scores[metric].isnan().tolist() == [False, True, True, True, False], metric
        mean, scored, total = mean_scores(scores)[metric]
        assert (scored, total) == (2, 5)
        assert mean == pytest.approx(scores[metric][[0, 4]].mean().item(), rel=1e-6)


def test_metrics_that_cannot_be_computed_are_refused_at_once(monkeypatch):
    for rate, metric, part in ((44100, "pesq", "8000 and 16000"), (16000, "snr", "unknown")):
        with pytest.raises(ConfigError, match=part):
            score_clips(speech(), speech(), rate, [metric])
    with pytest.raises(ShapeError):
        score_clips(speech()[None], speech()[None], 16000, ["si_sdr"])
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    for metric in ("pesq", "estoi"):
        with pytest.raises(MissingExtraError, match=r"pip install 'diffbuf\[metrics\]'"):
            score_clips(speech(), speech(), 16000, [metric])
