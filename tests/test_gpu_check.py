"""What `make gpu-check` runs, rehearsed on the CPU."""

import json

import torch

from benchmarks import gpu


def test_without_a_gpu_it_says_so_and_succeeds(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert gpu.main(["--out", str(tmp_path / "gpu.json")]) == 0
    assert capsys.readouterr().out.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_rehearsal_checks_parity_precision_capsules_and_streams(monkeypatch, tmp_path):
    areas = (gpu.parity, gpu.precision, gpu.capsules, gpu.stream_speed)
    monkeypatch.setattr(gpu, "AREAS", areas)
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")]) == 0
    rows = json.loads((tmp_path / "gpu.json").read_text())["rows"]
    assert {row["name"].partition(":")[0] for row in rows} >= {"ncsnpp", "block_causal"}
    assert all(row["ok"] for row in rows)


def test_a_check_that_fails_is_told_and_fails_the_run(monkeypatch, capsys, tmp_path):
    def broken(bench):
        yield gpu.Row("a", 2, "", "below 1", ok=False)
        raise RuntimeError("no card like this")

    monkeypatch.setattr(gpu, "AREAS", (broken,))
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "gpu.json")]) == 1
    assert "no card like this" in capsys.readouterr().out
