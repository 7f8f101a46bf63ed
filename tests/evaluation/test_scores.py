"""Every score, and a reason where there is none."""

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from diffbuf_lib.data import read_audio
from diffbuf_lib.evaluation.scores import check_scoring, score
from diffbuf_lib.training import score_clips
from tests.conftest import refused, seeded
from tests.evaluation.conftest import noisy_voice

FOUR = ["si_sdr", "sdr", "pesq", "estoi"]


@pytest.mark.law
def test_scores_are_those_of_training():
    estimate, target = noisy_voice()
    expected = score_clips(estimate[None], target[None], 16000, FOUR)
    found = score(estimate, target, 16000, FOUR)
    assert not found.undefined
    for name in FOUR:
        assert found.values[name] == pytest.approx(expected[name].item(), abs=1e-4)
        assert found.seconds[name] > 0


def test_estimates_of_listeners_opinion():
    names = check_scoring(["distillmos", "dnsmos"], 16000)
    noisy, target = noisy_voice(level=0.1)
    bad, good = (score(wave, target, 16000, names).values for wave in (noisy, target))
    assert set(good) == set(names)
    assert all(1 <= value <= 5 for value in good.values())
    assert good["dnsmos_bak"] > bad["dnsmos_bak"]
    assert good["distillmos"] != bad["distillmos"]
    peak, louder = (noisy * level / noisy.abs().max() for level in (1, 20))  # beyond full scale
    found, expected = (score(x, target, 16000, ["dnsmos_sig"]).values for x in (louder, peak))
    assert found == pytest.approx(expected, abs=0.01)


def test_other_words_lose_their_phonemes_and_noise_only_some():
    names = check_scoring(["lps"], 16000)
    (package,) = find_spec("pytest_audioeval").submodule_search_locations
    folder = Path(package) / "samples" / "audio" / "en"
    target, wrong = (
        read_audio(folder / f"{name}.wav", 0, 40000)[0][0]
        for name in ("quick_brown_fox", "counting")
    )
    noise = torch.randn(len(target), generator=seeded()) * target.std()
    found = [score(target + x, target, 16000, names).values["lps"] for x in (0, 0.03 * noise)]
    assert found[0] == 1
    assert 0.4 < found[1] < 1
    assert score(wrong, target, 16000, names).values["lps"] < 0.3


@pytest.mark.parametrize(
    ("spoil", "metrics", "reason"),
    [
        (lambda e, t: (e, 0 * t), FOUR[:2], "target is silent"),
        (lambda e, t: (0 * e, t), [*FOUR, "distillmos", "dnsmos_bak"], "estimate is silent"),
        (lambda e, t: (e * torch.nan, t), [*FOUR, "dnsmos_bak"], "NaN or Inf"),
        (lambda e, t: (e, 1e-4 * t), ["pesq", "estoi", "distillmos"], "below -80 dB"),
        (lambda e, t: (e[:3000], t[:3000]), ["pesq", "estoi", "dnsmos_sig"], "too short"),
        (lambda e, t: (t, t), ["si_sdr", "sdr"], "infinite"),
        (lambda e, t: (e, t * (torch.arange(len(t)) < 5000)), ["estoi"], "too little speech"),
    ],
    ids=["silent speech", "silent output", "nan", "dither", "short", "identical", "a syllable"],
)
def test_what_cannot_be_scored_has_a_reason_and_no_number(spoil, metrics, reason):
    estimate, target = spoil(*noisy_voice())
    found = score(estimate, target, 16000, metrics)
    assert found.values == {}
    assert [reason in found.undefined[name] for name in metrics] == [True] * len(metrics)


@pytest.mark.parametrize(
    ("metrics", "rate"),
    [([], 16000), (["mos"], 16000), (["pesq", "pesq"], 16000), (["dnsmos"], 8000)],
)
def test_metrics_that_cannot_be_are_refused_before_anything_runs(metrics, rate):
    refused(lambda: check_scoring(metrics, rate), *metrics)
