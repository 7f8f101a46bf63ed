"""A sweep is one evaluation a point: its table says what was asked, its figure shows all of it."""

import csv
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from diffbuf_lib.evaluation.evaluate import Evaluator
from diffbuf_lib.evaluation.sweep import run_sweep
from tests.conftest import TINY, call, make_model, refused


@pytest.fixture
def short(job):
    return replace(job, metrics=("si_sdr", "estoi"), limit=2, seconds=0.5)


@pytest.fixture
def score_path(tiny_cfg, tmp_path):
    path = tmp_path / "score"
    make_model(tiny_cfg).save_pretrained(path)
    return path


def read_sweep(path):
    return list(csv.DictReader((path / "sweep.csv").read_text().splitlines()))


def test_auto_varies_delay_or_buffer(short, model_path, score_path, tmp_path, monkeypatch):
    models = [str(model_path), str(score_path)]
    points = run_sweep(models, short, tmp_path / "s", processes=1)
    assert [(p.varied, p.delay, p.buffer_size) for p in points] == [
        ("delay", 1, 4), ("delay", 4, 4), ("buffer_size", 5, 5), ("buffer_size", 10, 10),
    ]  # fmt: skip
    # A hop is 2 ms; d - 1 hops and a window of 62 samples.
    assert [p.latency_ms for p in points] == pytest.approx(
        [1e3 * (62 + 32 * (p.delay - 1)) / 16000 for p in points]
    )
    rows = read_sweep(tmp_path / "s")
    assert len(rows) == 4 * 2
    means = [p.scores["si_sdr"]["mean"]["mean"] for p in points]
    assert len(set(means)) == 4
    mean, gain, noisy = (float(rows[0][name]) for name in ("mean", "gain", "noisy"))
    assert mean == means[0] == pytest.approx(noisy + gain)
    assert (tmp_path / "s" / "sweep.png").read_bytes().startswith(b"\x89PNG")
    monkeypatch.setattr(Evaluator, "run", lambda *_: pytest.fail("done already"))
    again = run_sweep(models[::-1], short, tmp_path / "s", processes=1)
    assert [p.scores for p in again] == [p.scores for p in points[2:] + points[:2]]


def test_t_max_and_models_as_they_were_trained(short, model_path, score_path, tmp_path):
    models, options = [str(model_path), str(score_path)], {"processes": 1}
    points = run_sweep(models[:1], short, tmp_path, vary="t_max", values=[0.4, 0.7], **options)
    assert [p.t_max for p in points] == [0.4, 0.7]
    both = run_sweep(models, short, tmp_path, vary="none", **options)
    assert [p.loss for p in both] == ["data_prediction", "weighted_score"]


@pytest.mark.parametrize(
    ("vary", "value"), [("delay", 9), ("delay", 1.5), ("buffer_size", 1000), ("t_max", 1.0)]
)
def test_values_that_cannot_be_are_refused(short, model_path, tmp_path, vary, value):
    options = {"vary": vary, "values": [value]}
    refused(lambda: run_sweep([str(model_path)], short, tmp_path / "s", **options), vary, value)
    assert not (tmp_path / "s").exists()


@pytest.fixture
def run(monkeypatch, capsys):
    def run(*command):
        status, out, err = call(monkeypatch, capsys, *command)
        assert status == 0, err
        return out

    return run


def test_the_commands(model_path, data, finished, tmp_path, run):
    common = ["--data_path", data, "--processes", 1, "--limit", 3, "--device", "cpu"]
    common += ["--results_path", tmp_path, "--metrics", "si_sdr"]
    out = run("evaluate", "--model", model_path, *common, "--baselines", "noisereduce")
    assert "noisereduce" in out
    assert (tmp_path / "report.html").exists()
    assert "6" in run("compare", finished, finished)
    assert "d 2" in run("sweep", "--models", model_path, *common, "--values", 2)


def test_a_grid_is_trained_in_parts_and_scored(data, tmp_path, run, monkeypatch, capsys):
    config = tmp_path / "tiny.yaml"
    config.write_text(yaml.safe_dump({**TINY, "training": {**TINY["training"], "num_steps": 1}}))
    command = ["sweep", "--train", config, "--train_path", data, "--data_path", data, "--limit", 1]
    command += ["--results_path", tmp_path / "s", "--metrics", "si_sdr", "--processes", 1]
    command += ["--over", "training.lr=1e-3,3e-3", "--over", "model.base_channels=4", "--part"]
    run(*command, "1/2")
    assert not (tmp_path / "s" / "sweep.csv").exists()
    run(*command, "2/2")
    runs = sorted(path.name for path in (tmp_path / "s" / "runs").iterdir())
    assert runs == [f"training.lr={lr}_model.base_channels=4" for lr in ("1e-3", "3e-3")]
    assert [Path(row["model"]).name for row in read_sweep(tmp_path / "s")] == runs
    assert call(monkeypatch, capsys, *command[:5], *command[7:], "1/1")[0] == 2  # no data_path
