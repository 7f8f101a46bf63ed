"""Intervals that cover, comparisons that find nothing where there is nothing."""

import numpy as np
import pytest

from diffbuf_lib.evaluation.bootstrap import bootstrap, compare_methods, group


@pytest.mark.law
def test_the_interval_covers_the_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    draws = rng.exponential(2.0, size=(400, 60))  # skewed, mean 2
    found = [bootstrap(row, seed=i, resamples=500) for i, row in enumerate(draws)]
    covered = np.mean([interval.low <= 2.0 <= interval.high for interval in found])
    assert 0.90 < covered < 0.98  # 95 % at 60 values; the percentile interval is a little short


@pytest.mark.law
def test_the_interval_agrees_with_the_normal_one():
    values = np.random.default_rng(1).normal(3.0, 2.0, 4000)
    interval = bootstrap(values)
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    assert interval.mean == pytest.approx(values.mean(), abs=1e-5)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval == bootstrap(values)
    assert interval != bootstrap(values, seed=1)
    assert bootstrap([]) is None
    assert bootstrap([1.5]) == (1.5, None, None, 1)


def test_bands_are_centred_on_multiples_of_five():
    bands = group({"a": 4.0, "b": -10.0004, "c": None, "d": -9.9996, "e": -7.4})
    assert list(bands.values()) == [["a", "b", "c", "d", "e"], ["b", "d"], ["e"], ["a"]]


@pytest.mark.law
def test_methods_are_compared_on_the_clips_that_all_have():
    table = {
        "noisy": {"a": 1.0, "b": 2.0, "c": 100.0},
        "gate": {"a": 2.0, "b": 2.0},
        "diffbuf": {"a": 4.0, "b": 6.0, "c": 0.0},
    }
    found = compare_methods(table, ["a", "b", "c"])
    assert found["clips"] == 2
    ours, noisy, gate = (found["methods"][name] for name in ("diffbuf", "noisy", "gate"))
    assert (ours["mean"].mean, ours["gain"].mean, gate["lead"].mean) == (5.0, 3.5, 3.0)
    assert noisy["gain"] is ours["lead"] is None
