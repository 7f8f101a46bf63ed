"""An evaluation may be stopped, go on and be cut among processes: its scores stay the same."""

import json
import os
import shutil
import signal
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from diffbuf_lib.evaluation import compare_folders, evaluate_folder, evaluate_part
from diffbuf_lib.evaluation.evaluate import Evaluator, make_evaluator
from diffbuf_lib.evaluation.scores import read_scores
from diffbuf_lib.model import load_model
from diffbuf_lib.training.feed import Stream, example_generators
from tests.conftest import refused

METRICS = ("si_sdr", "pesq", "estoi")


def run(job, path, **options):
    return evaluate_folder(job, path, processes=options.pop("processes", 1), **options)


def scores_of(path):
    return [(path / name).read_bytes() for name in ("scores.csv", "summary.json")]


def test_every_clip_and_method_has_a_row_and_undefined_scores_a_reason(job, tmp_path):
    found = run(replace(job, baselines=("noisy", "noisereduce")), tmp_path)
    columns, rows = read_scores(tmp_path)
    assert columns == list(METRICS)
    assert [row.values for row in rows] == [row.values for row in found.rows]
    methods = ("noisy", "noisereduce", "diffbuf")
    wanted = [(f"sample_0000{i}", method) for i in range(6) for method in methods]
    assert [(row.clip, row.method) for row in found.rows] == wanted
    assert len({row.values["si_sdr"] for row in rows[:3]}) == 3, "a method changes nothing"
    for row in found.rows:
        assert sorted([*row.values, *row.undefined]) == sorted(METRICS)
    assert json.loads((tmp_path / "summary.json").read_text()) == found.summary
    reasons = {(x["clip"], x["metric"]): x["reason"] for x in found.summary["undefined"]}
    assert "silent" in reasons["sample_00004", "si_sdr"]
    assert "short" in reasons["sample_00005", "pesq"]
    overall = found.summary["bands"]["all"]["columns"]
    assert [overall[name]["clips"] for name in ("pesq", "si_sdr")] == [4, 5]
    assert "<audio" in (tmp_path / "report.html").read_text()


@pytest.mark.law
def test_the_noisy_input_scores_what_was_mixed(finished):
    _, rows = read_scores(finished)
    noisy = {row.clip: row for row in rows if row.method == "noisy"}
    # White noise and speech are all but orthogonal: SI-SDR of the mixture is its SNR.
    for clip in ("sample_00000", "sample_00001", "sample_00002"):
        assert noisy[clip].values["si_sdr"] == pytest.approx(noisy[clip].snr, abs=0.3)
    assert noisy["sample_00001"].snr > noisy["sample_00000"].snr > noisy["sample_00002"].snr
    assert noisy["sample_00004"].snr is None


@pytest.mark.law
@pytest.mark.parametrize("cut", ["between lines", "within a line", "before the tables"])
def test_a_stopped_evaluation_goes_on_to_the_same_bytes(job, finished, tmp_path, cut, monkeypatch):
    shutil.copytree(finished, tmp_path / "stopped")
    journal = tmp_path / "stopped" / "journal.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == 3
    kept = {"between lines": lines[:1], "within a line": [lines[0], lines[1][:-20]]}
    journal.write_bytes(b"".join(kept.get(cut, lines)))
    for name in ("scores.csv", "summary.json"):
        (tmp_path / "stopped" / name).unlink()
    done = []
    original = Evaluator.run
    monkeypatch.setattr(Evaluator, "run", lambda self, i: done.append(i) or original(self, i))
    run(job, tmp_path / "stopped", page=False)
    assert len(done) == (0 if cut == "before the tables" else 2)  # what was done is not done again
    assert scores_of(tmp_path / "stopped") == scores_of(finished)


@pytest.mark.law
def test_batches_processes_and_parts_of_a_job_array_do_not_change_the_bytes(
    job, finished, tmp_path
):
    run(replace(job, batch_size=3), tmp_path / "two", processes=2, page=False)
    assert scores_of(tmp_path / "two") == scores_of(finished)

    def do(path, part):
        return evaluate_part(job, tmp_path / path, part, processes=1, page=False)

    assert [do("parts", part) for part in ("3/3", "1/3", "1/3")] == [None] * 3
    assert not (tmp_path / "parts" / "scores.csv").exists()
    assert len(do("parts", "2/3").rows) == 6 * 2
    assert scores_of(tmp_path / "parts") == scores_of(finished)
    do("rest", "2/3")
    do("rest", "1/1")  # the whole does what parts have left
    assert scores_of(tmp_path / "rest") == scores_of(finished)
    refused(lambda: do("wrong", "4/3"), "--part")


def test_other_arguments_or_weights_are_refused_and_a_moved_model_is_not(job, tmp_path, model_path):
    job, out = replace(job, limit=1, metrics=("si_sdr",)), tmp_path / "r"
    run(job, out, page=False)
    before = scores_of(out)
    moved = shutil.copytree(model_path, tmp_path / "elsewhere")
    run(replace(job, model=str(moved)), out, page=False)
    assert scores_of(out) == before
    model = load_model(moved, "cpu")
    with torch.no_grad():
        next(model.parameters()).view(-1)[0] += 1e-3
    model.save_pretrained(moved)
    for change in ({"seed": 1}, {"metrics": ("sdr",)}, {"model": str(moved)}):
        refused(lambda c=change: run(replace(job, **c), out), out, *change)


def kill_worker(*job):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_process_is_told_and_what_was_scored_stays(job, tmp_path, monkeypatch):
    home = sys.modules[evaluate_folder.__module__]
    monkeypatch.setattr(home, "_score_in_process", kill_worker)
    refused(lambda: run(job, tmp_path / "r", processes=2, page=False), "--processes")
    monkeypatch.undo()
    assert len(run(job, tmp_path / "r", page=False).rows) == 6 * 2


def test_wrong_use_is_refused_before_any_work(job, tmp_path):
    for change in ({"delay": 9}, {"limit": 0}, {"seconds": 0.0}, {"metrics": ()}):
        refused(lambda c=change: run(replace(job, **c), tmp_path / "r"), *change)
    refused(lambda: run(job, tmp_path / "r", processes=0), "--processes 0")
    assert not (tmp_path / "r").exists()


def test_batches_are_of_like_lengths_and_no_longer_than_asked(job):
    clips = make_evaluator(job)
    assert clips.batches(2) == [[5, 4], [1, 3], [0, 2]]
    assert clips.batches(3, seconds=1.9) == [[5, 4], [1, 3], [0], [2]]


@pytest.mark.law
def test_a_comparison_is_paired_turns_its_sign_and_is_zero_of_equals(job, finished, tmp_path):
    run(replace(job, seed=1, metrics=("estoi", "si_sdr")), tmp_path, page=False)
    there, back = compare_folders(finished, tmp_path), compare_folders(tmp_path, finished)
    (_, a), (_, b) = read_scores(finished), read_scores(tmp_path)
    pairs = [
        y.values["si_sdr"] - x.values["si_sdr"]
        for x, y in zip(a, b, strict=True)
        if x.method == "diffbuf" and "si_sdr" in x.values
    ]
    row, other = (next(x for x in found if x[:2] == ("si_sdr", "all")) for found in (there, back))
    assert row.difference.mean == pytest.approx(np.mean(pairs), abs=1e-5)
    assert row.difference.mean == -other.difference.mean != 0
    assert (row.a, row.b) == pytest.approx((other.b, other.a))
    assert (row.difference.clips, row.clips) == (5, 6)
    for other, method in ((tmp_path, "noisy"), (finished, "diffbuf")):
        equal = compare_folders(finished, other, method=method)
        assert {row.column for row in equal} >= {"si_sdr", "estoi"}
        defined = [row for row in equal if row.difference]
        assert {row.difference[:3] for row in defined} == {(0.0, 0.0, 0.0), (0.0, None, None)}
        assert not any(row.better for row in defined)


def test_a_comparison_of_other_clips_names_them(job, finished, tmp_path):
    run(replace(job, metrics=("si_sdr",), limit=5), tmp_path / "few", page=False)
    run(replace(job, metrics=("si_sdr",), seconds=0.9), tmp_path / "short", page=False)
    for other, method, message in (
        (tmp_path / "few", "diffbuf", "few lacks sample_00005"),
        (tmp_path / "short", "diffbuf", "sample_00000, sample_00002"),
        (tmp_path, "diffbuf", "scores.csv"),
        (finished, "x", "'x'"),
    ):
        refused(lambda o=other, m=method: compare_folders(finished, o, method=m), message)


@pytest.mark.law
def test_every_seed_and_clip_has_noise_of_its_own():
    drawn = {
        torch.randn(1, generator=generator).item()
        for seed in range(3)
        for generator in example_generators([(0,), (1,), (2,)], seed, Stream.VALID, "cpu")
    }
    assert len(drawn) == 9
