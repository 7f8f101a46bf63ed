"""Every score, and a reason where there is none."""

import importlib.util

import numpy as np
import pytest
import torch

from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.evaluation.scores import check_scoring, score
from diffbuf_lib.registry import METRICS
from diffbuf_lib.training import score_clips
from tests.evaluation.conftest import voice

FOUR = ["si_sdr", "sdr", "pesq", "estoi"]


def pair(seconds=2.0, level=0.05):
    target = torch.from_numpy(voice(seconds))
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal(len(target))).float()
    return target + level * noise, target


@pytest.mark.law
def test_scores_are_those_of_training():
    estimate, target = pair()
    expected = score_clips(estimate[None], target[None], 16000, FOUR)
    found = score(estimate, target, 16000, FOUR)
    assert not found.undefined
    for name in FOUR:
        assert found.values[name] == pytest.approx(expected[name].item(), abs=1e-4)
        assert found.seconds[name] > 0


def test_estimates_of_listeners_opinion():
    names = check_scoring(["distillmos", "dnsmos"], 16000)
    (noisy, target), (cleaner, _) = pair(level=0.1), pair(level=0.0)
    bad, good = (score(wave, target, 16000, names).values for wave in (noisy, cleaner))
    assert set(good) == set(names)
    assert all(1 <= value <= 5 for value in good.values())
    assert good["dnsmos_bak"] > bad["dnsmos_bak"]
    assert good["distillmos"] != bad["distillmos"]
    quiet = score(0.1 * noisy, target, 16000, ["distillmos"])  # which does not mind the level
    assert quiet.values["distillmos"] == pytest.approx(bad["distillmos"], abs=1e-3)
    louder = score(
        noisy * 20 / noisy.abs().max(), target, 16000, ["dnsmos_sig"]
    )  # beyond full scale
    peak = score(noisy / noisy.abs().max(), target, 16000, ["dnsmos_sig"])
    assert louder.values == pytest.approx(peak.values, abs=0.01)


@pytest.mark.parametrize(
    ("spoil", "metrics", "reason"),
    [
        (lambda e, t: (e, 0 * t), FOUR, "target is silent"),
        (lambda e, t: (0 * e, t), [*FOUR, "distillmos", "dnsmos_bak"], "estimate is silent"),
        (lambda e, t: (e * torch.nan, t), [*FOUR, "dnsmos_bak"], "NaN or Inf"),
        (lambda e, t: (e, 1e-4 * t), ["pesq", "estoi", "distillmos"], "below -80 dB"),
        (lambda e, t: (e[:3000], t[:3000]), ["pesq", "estoi", "dnsmos_sig"], "too short"),
        (lambda e, t: (t, t), ["si_sdr", "sdr"], "infinite"),
        (
            lambda e, t: (e, torch.cat([t[:5000], torch.zeros(len(t) - 5000)])),
            ["estoi"],
            "too little speech",
        ),
    ],
    ids=["silent speech", "silent output", "nan", "dither", "short", "identical", "a syllable"],
)
def test_what_cannot_be_scored_has_a_reason_and_no_number(spoil, metrics, reason):
    estimate, target = spoil(*pair())
    found = score(estimate, target, 16000, metrics)
    assert found.values == {}
    assert set(found.undefined) == set(metrics)
    for why in found.undefined.values():
        assert reason in why


@pytest.mark.parametrize(
    ("metrics", "rate", "message"),
    [
        ([], 16000, "at least one"),
        (["mos"], 16000, "mos"),
        (["pesq", "pesq"], 16000, "once"),
        (["dnsmos"], 8000, "16000"),
    ],
)
def test_metrics_that_cannot_be_are_refused_before_anything_runs(metrics, rate, message):
    with pytest.raises(ConfigError, match=message):
        check_scoring(metrics, rate)


def test_a_missing_package_names_the_command(monkeypatch):
    check_scoring(METRICS.names(), 16000)
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda n, *a: None if n == "distillmos" else find(n, *a)
    )
    with pytest.raises(MissingExtraError, match=r"pip install 'diffbuf\[metrics\]'"):
        check_scoring(["distillmos"], 16000)
