"""Scores against formulas written out here, and clips for which there is no score."""

import importlib.util

import numpy as np
import pytest
import torch
from pesq import pesq
from pystoi import stoi

from diffbuf_lib.training import mean_scores, score_clips
from tests.conftest import refused, seeded

ALL = ["si_sdr", "sdr", "pesq", "estoi"]


def speech(seconds=1.0, seed=0):
    """[1, T]: a voice-like buzz in syllables, enough for PESQ and ESTOI to find speech."""
    time = torch.arange(int(16000 * seconds)) / 16000
    buzz = sum(torch.sin(2 * torch.pi * 150 * h * time) / h for h in range(1, 12))
    noise = 0.01 * torch.randn(len(time), generator=seeded(seed))
    return (0.1 * buzz * (1 + torch.sin(2 * torch.pi * 4 * time)) + noise)[None]


def noisy(wave, level, seed=1):
    return wave + level * torch.randn(wave.shape, generator=seeded(seed))


def score(metric, estimate, target, rate=16000):
    return score_clips(estimate, target, rate, [metric])[metric]


@pytest.mark.law
def test_si_sdr_by_hand():
    target = torch.cat([speech(), speech(seed=5)])
    estimate = noisy(target, 0.05)
    s, e = target.double().numpy(), estimate.double().numpy()
    scaled = (s * e).sum(1, keepdims=True) / (s * s).sum(1, keepdims=True) * s
    expected = 10 * np.log10((scaled**2).sum(1) / ((e - scaled) ** 2).sum(1))
    for gain in (1, 7):
        np.testing.assert_allclose(score("si_sdr", gain * estimate, target), expected, rtol=1e-4)


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
    assert score("sdr", estimate, target).item() == pytest.approx(expected, abs=0.01)


@pytest.mark.law
@pytest.mark.parametrize("level", [0.003, 0.1])
def test_pesq_and_estoi_are_those_of_their_packages(level):
    target, estimate = speech(2.0), noisy(speech(2.0), level)
    s, e = target[0].numpy(), estimate[0].numpy()
    for rate, mode in ((16000, "wb"), (8000, "nb")):
        found = score("pesq", estimate, target, rate).item()
        assert found == pytest.approx(pesq(rate, s, e, mode), abs=1e-4)
    found = score("estoi", estimate, target).item()
    assert found == pytest.approx(stoi(s, e, 16000, extended=True), abs=1e-4)


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
    refused(lambda: score("pesq", speech(), speech(), 44100), "8000 and 16000")
    refused(lambda: score("si_sdr", speech()[None], speech()[None]), "[B, T]")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None)
    for metric in ("pesq", "estoi"):
        refused(lambda m=metric: score(m, speech(), speech()), "diffbuf[metrics]")
