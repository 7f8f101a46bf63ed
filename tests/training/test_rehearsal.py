"""Rehearsals: a range test of the learning rate, and where a step's time goes."""

import json
import time

import pytest
import torch

from diffbuf_lib.config import describe_keys
from diffbuf_lib.registry import OPTIMIZERS
from diffbuf_lib.training.rehearsal import RangeTest, find_lr
from diffbuf_lib.training.timing import PARTS, Timing, time_steps
from tests.conftest import refused
from tests.training.helpers import Clips, config


@pytest.mark.parametrize("optimizer", list(OPTIMIZERS))
def test_a_range_test_finds_a_rate_that_learns_and_leaves_nothing(optimizer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state, clips = torch.get_rng_state(), Clips(80)
    found = find_lr(config(f"training.optimizer={optimizer}"), clips, "cpu")
    assert len(found.lrs) == len(found.losses) <= 40, "one epoch at most"
    assert found.proposed <= 1.001 * found.lrs[found.lowest]
    assert min(found.losses) < 0.99 * found.losses[0]
    assert not list(tmp_path.iterdir())
    assert torch.equal(torch.get_rng_state(), state)


def test_the_proposal_is_where_the_loss_falls_fastest():
    lrs = [10.0**-k for k in range(6, 0, -1)]
    assert RangeTest(lrs, [5.0, 5.0, 5.0, 2.0, 1.9, 9.0]).proposed == pytest.approx(1e-4)
    assert RangeTest(lrs, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).proposed is None


def test_too_few_steps_for_a_range_test_name_the_key():
    refused(lambda: find_lr(config(), Clips(7), "cpu"), "7 clips", "training.batch_size 2")


def test_a_slow_reader_is_seen_and_the_trace_names_the_parts(tmp_path):
    trace, cfg = tmp_path / "trace.json", config("training.accumulation_steps=2")
    slow, valid = Clips(on_read=lambda index: time.sleep(0.05)), Clips(3, seed=1)
    found = time_steps(cfg, slow, "cpu", valid_set=valid, steps=2, trace=trace)
    assert tuple(found.seconds) == PARTS
    assert found.seconds["waiting for data"] >= 0.2, "two batches of two clips"
    names = {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
    assert set(PARTS[:-1]) <= names
    assert [path.name for path in tmp_path.iterdir()] == ["trace.json"]


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("part", PARTS)
def test_what_takes_longest_names_its_key(part, device):
    seconds = {each: 0.9 if each == part else 0.02 for each in PARTS}
    timing = Timing(config(), torch.device(device), seconds)
    sentence, key = timing.verdict
    assert key in sentence
    assert key in {known for known, *_ in describe_keys()}
    assert sum(timing.shares.values()) == pytest.approx(1)
