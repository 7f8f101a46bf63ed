"""The doctor: nothing wrong with a good set, and for each broken one the right finding first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffbuf_lib.diagnostics import checks_run, examine, examine_paths, has_error
from diffbuf_lib.diagnostics.checks_run import resolve_device
from diffbuf_lib.diagnostics.findings import Finding, render, to_json, worst_first
from tests.conftest import TINY, call
from tests.diagnostics.clips import Items, config, make_split, opened, samples, stem, write

PAPER = ("sde.type=bbed", "sde.diffusion={c: 0.08}")  # the c that the paper prints


@pytest.fixture
def paths(tmp_path) -> dict[str, Path]:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(TINY))
    return {
        "config_path": tmp_path / "c.yaml",
        "data_path": make_split(tmp_path / "train"),
        "valid_path": make_split(tmp_path / "valid", 2, seed=1),
    }


def of(findings, check) -> Finding:
    (finding,) = [finding for finding in findings if finding.check == check]
    return finding


@pytest.mark.law
def test_a_good_set_has_no_error_and_no_warning(paths):
    findings = examine_paths(**paths)
    assert [f for f in findings if f.severity in ("error", "warning")] == []
    checks = {finding.check.partition(".")[0] for finding in findings}
    assert checks == {"machine", "data", "valid", "frames", "schedule", "model"}


@pytest.mark.parametrize(
    ("overrides", "check", "key"),
    [
        (["diffusion_buffer.buffer_size=99"], "config", "diffusion_buffer.buffer_size"),
        (["diffusion_buffer.t_max=1.0"], "config", "diffusion_buffer.t_max"),
        (["training.lrr=1"], "config", "training.lr"),
        (["sde.type=bbed", "sde.diffusion={c: 0.3, theta: 0.08}"], "config", "sde.diffusion.c"),
    ],
)
def test_a_config_that_cannot_be_opened_is_the_only_finding(paths, overrides, check, key):
    (finding,) = examine_paths(**paths, overrides=overrides)
    assert (finding.severity, finding.check) == ("error", check)
    assert key in finding.fix or finding.config_key == key
    assert finding.fix


@pytest.mark.law
@pytest.mark.parametrize(
    ("overrides", "check", "key"),
    [
        (
            ["sde.type=bbed", "sde.diffusion={c: 1.0e-30}", "training.loss=score"],
            "schedule.score_target",
            "sde.diffusion",
        ),
        (
            ["diffusion_buffer.t_eps=1.0e-9", "model.output_scale=none", "training.use_amp=true"],
            "schedule.score_target",
            "diffusion_buffer.t_eps",
        ),
        (["training.batch_size=10000000"], "model.memory", "training.batch_size"),
        (["audio.sample_rate=8000"], "data.files", "audio.sample_rate"),
    ],
)
def test_a_broken_config_gives_the_right_finding_first_and_its_overrides_mend_it(
    paths, overrides, check, key
):
    first = examine_paths(**paths, overrides=overrides)[0]
    assert (first.severity, first.check, first.config_key) == ("error", check, key)
    assert key.partition(".")[0] in first.fix
    assert first.why
    assert first.overrides
    mended = examine_paths(**paths, overrides=[*overrides, *first.overrides])
    assert not has_error(mended), render(mended)


def with_nan(root):
    wave = samples(stem(root, "mixture"))
    wave[100:103] = np.nan
    write(stem(root, "mixture"), wave)


def silent(root):
    for clip in range(4):
        for name in ("vocals", "mixture", "noise"):
            wave = samples(stem(root, name, clip))
            write(stem(root, name, clip), wave * (name == "noise") * 1.0)
        shutil.copy(stem(root, "noise", clip), stem(root, "mixture", clip))


def swapped(root):
    for clip in range(4):
        mixture, vocals = stem(root, "mixture", clip), stem(root, "vocals", clip)
        one, other = samples(mixture), samples(vocals)
        write(mixture, other)
        write(vocals, one)


def cut_short(root):
    path = stem(root, "vocals")
    path.write_bytes(path.read_bytes()[:1000])


def stereo(root):
    for name in ("vocals", "mixture", "noise"):
        wave = samples(stem(root, name))
        write(stem(root, name), np.stack([wave, wave], axis=1))


def half_stereo(root):
    wave = samples(stem(root, "mixture"))
    write(stem(root, "mixture"), np.stack([wave, wave], axis=1))


def without_noise(root):
    for clip in range(4):
        shutil.copy(stem(root, "vocals", clip), stem(root, "mixture", clip))
        write(stem(root, "noise", clip), np.zeros(1600))


def shorter_target(root):
    write(stem(root, "vocals"), samples(stem(root, "vocals"))[:1500])


def too_loud(root):
    for clip in range(4):
        stem(root, "noise", clip).unlink()
        for name in ("vocals", "mixture"):
            write(stem(root, name, clip), samples(stem(root, name, clip)) * 7e38)


@pytest.mark.law
@pytest.mark.parametrize(
    ("damage", "check", "says"),
    [
        (with_nan, "data.files", "3 NaN or Inf"),
        (silent, "data.silence", "4 of 4 targets are silent"),
        (swapped, "data.mixture", "not vocals + noise in 4 of 4"),
        (cut_short, "data.files", "cut short"),
        (stereo, "data.channels", "3 of 1 and 1 of 2"),
        (half_stereo, "data.files", "2 channels"),
        (without_noise, "data.noise", "the same in 4 of 4"),
        (shorter_target, "data.files", "1500"),
        (too_loud, "model.step", "stage Y"),
        (lambda root: stem(root, "vocals").unlink(), "data.open", "no vocals.wav"),
        (shutil.rmtree, "data.open", "does not exist"),
    ],
)
def test_broken_data_gives_the_right_finding_first_and_mended_data_none(paths, damage, check, says):
    good = paths["data_path"].parent / "good"
    shutil.copytree(paths["data_path"], good)
    damage(paths["data_path"])
    findings = examine_paths(**paths)
    assert (findings[0].severity, findings[0].check) == ("error", check), render(findings)
    assert says in findings[0].message
    assert findings[0].fix
    assert findings[0].why
    if check in ("data.files", "data.channels", "data.open") and damage is not shutil.rmtree:
        assert "sample_00001" in findings[0].message
    if check == "data.open":
        assert sum(finding.severity == "error" for finding in findings) == 1  # told once
    if findings[0].overrides:
        assert not has_error(examine_paths(**paths, overrides=findings[0].overrides))
    shutil.rmtree(paths["data_path"], ignore_errors=True)
    good.rename(paths["data_path"])
    assert not has_error(examine_paths(**paths))


def duplicate(paths):
    shutil.copy(stem(paths["data_path"], "vocals", 2), stem(paths["valid_path"], "vocals", 0))
    stem(paths["valid_path"], "noise", 0).unlink()  # else vocals + noise is not the mixture


def scaled(factor, offset=0.0):
    def change(paths):
        for clip in range(4):
            for name in ("vocals", "mixture", "noise"):
                wave = samples(stem(paths["data_path"], name, clip)) * factor
                write(stem(paths["data_path"], name, clip), wave + offset * (name != "noise"))

    return change


def clip_off(paths):
    path = stem(paths["data_path"], "mixture")
    stem(paths["data_path"], "noise").unlink()
    write(path, (5 * samples(path)).clip(-1, 1))


@pytest.mark.law
@pytest.mark.parametrize(
    ("overrides", "change", "check"),
    [
        ([*PAPER], None, "schedule.c_theta"),
        (["diffusion_buffer.num_frames=128"], None, "frames.window"),
        (["diffusion_buffer.buffer_size=40", "diffusion_buffer.num_frames=45"], None,
         "frames.buffer"),
        (["audio.chunk_size=4000"], None, "data.padding"),
        (["training.batch_size=5"], None, "data.batches"),
        (["diffusion_buffer.t_max=0.2"], None, "schedule.times"),
        ([], scaled(0.01), "data.level"),
        ([], scaled(1, offset=0.03), "data.dc"),
        ([], clip_off, "data.clipping"),
        ([], duplicate, "valid.duplicates"),
    ],
)  # fmt: skip
def test_what_is_only_unwise_is_a_warning_and_its_overrides_clear_it(
    paths, overrides, change, check
):
    if change is not None:
        change(paths)
    findings = examine_paths(**paths, overrides=overrides)
    assert not has_error(findings), render(findings)
    finding = of(findings, check)
    assert finding.severity == "warning", render(findings)
    assert finding.fix
    assert finding.value is not None
    if finding.overrides:
        mended = examine_paths(**paths, overrides=[*overrides, *finding.overrides])
        assert {f.severity for f in mended if f.check == check} <= {"ok", "info"}


@pytest.mark.law
@pytest.mark.parametrize(("center", "frames"), [(True, 63), (False, 61)])
def test_frames_of_a_one_second_clip_are_counted_exactly(paths, center, frames):
    stft = f"audio.stft={{n_fft: 510, win_length: 510, hop_length: 256, center: {center}}}"
    small = ["audio.chunk_size=16000", stft]
    findings = examine_paths(**paths, overrides=small)
    assert of(findings, "frames.count").value == frames
    latency = of(findings, "frames.latency")
    assert latency.value == pytest.approx(3 * 16 + 510 / 16)
    window = of(
        examine_paths(**paths, overrides=[*small, "diffusion_buffer.num_frames=128"]),
        "frames.window",
    )
    assert window.severity == "warning"
    assert str(127 * 256 + (0 if center else 510)) in window.message


@pytest.mark.law
def test_everything_is_left_as_it_was(paths):
    cfg = config("training.deterministic=true")
    state = torch.get_rng_state()
    examine(cfg, opened(paths["data_path"], cfg))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()


def test_a_data_set_in_memory_is_examined_too():
    wave = 0.05 * torch.randn(1, 1600, generator=torch.Generator().manual_seed(0))
    findings = examine(config(), Items((3 * wave.flip(-1), wave), (2 * wave.flip(-1), wave)))
    assert not has_error(findings)
    bad = wave.clone()
    bad[0, 5] = torch.inf
    first = examine(config(), Items((bad, wave)))[0]
    assert (first.severity, first.check) == ("error", "data.nonfinite")
    assert examine(config(), Items())[0].check == "data.size"


def test_mixed_precision_is_tried_and_blamed_only_where_float32_is_finite(paths, monkeypatch):
    cfg = config("training.use_amp=true", "training.amp_dtype=bf16")
    dataset = opened(paths["data_path"], cfg)
    assert of(examine(cfg, dataset), "model.step_amp").severity == "ok"
    real = checks_run.run_pass

    def overflowing(model, mix, target, precision):
        outcome = real(model, mix, target, precision)
        if precision is None:
            return outcome
        return checks_run.Pass(torch.inf, torch.nan, 7, 0.1, outcome.saved)

    monkeypatch.setattr(checks_run, "run_pass", overflowing)
    first = examine(cfg, dataset)[0]
    assert (first.severity, first.check) == ("error", "model.step_amp")
    assert first.overrides == ("training.use_amp=false",)
    assert "in float32 the same clip is finite" in first.message
    assert not has_error(examine(cfg.override(*first.overrides), dataset))


def test_running_out_of_memory_is_a_finding(paths, monkeypatch):
    def forward(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(checks_run.DiffusionBufferModel, "trace", forward)
    cfg = config()
    first = examine(cfg, opened(paths["data_path"], cfg))[0]
    assert (first.severity, first.check) == ("error", "model.memory")
    assert "20.00 GiB" in first.message
    assert "model.base_channels" in first.fix


def test_without_a_gpu_every_device_is_the_cpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {str(resolve_device(d)) for d in ("auto", "cpu", "cuda", "cuda:3")} == {"cpu"}


def test_a_gpu_that_is_not_there_is_an_error_before_it_is_touched(paths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert {str(resolve_device(d)) for d in ("auto", "cuda")} == {"cuda:0"}
    findings = examine_paths(**paths, device="cuda:7")
    assert findings[0].check == "machine.device"
    assert "this machine has 2" in findings[0].message


def test_an_unknown_device_stops_before_the_model(paths):
    findings = examine_paths(**paths, device="tpu")
    assert findings[0].check == "machine.device"
    assert not any(finding.check.startswith("model") for finding in findings)


def test_findings_are_sorted_rendered_and_told_as_json():
    findings = [
        Finding("ok", "a", "fine"),
        Finding("error", "b", "broken", value=float("inf"), why="bad", fix="mend it"),
        Finding("warning", "c", "odd", value={1: (2, float("nan"))}, overrides=("x.y=1",)),
        Finding("error", "d", "also broken"),
    ]
    ordered = worst_first(findings)
    assert [finding.check for finding in ordered] == ["b", "d", "c", "a"]
    told = json.loads(to_json(ordered))
    assert told["ok"] is False
    assert told["counts"] == {"error": 2, "warning": 1, "info": 0, "ok": 1}
    assert told["findings"][0]["value"] is None
    assert told["findings"][2]["value"] == {"1": [2, None]}
    plain, coloured = render(ordered), render(ordered, colour=True)
    assert "\x1b[" not in plain
    assert "\x1b[31;1merror" in coloured
    assert "fix: mend it" in plain
    assert "--set x.y=1" in plain
    assert all(len(line) <= 60 for line in render(ordered, width=60).splitlines())


def sets(overrides):
    return [word for override in overrides for word in ("--set", override)]


def test_the_command_prints_a_table_or_json_and_fails_on_an_error(paths, monkeypatch, capsys):
    args = ["doctor", *(str(x) for name, path in paths.items() for x in (f"--{name}", path))]
    status, out, err = call(monkeypatch, capsys, *args)
    assert (status, err) == (0, "")
    assert "\x1b[" not in out
    assert out.splitlines()[-1].startswith("0 error, 0 warning")
    status, out, _ = call(monkeypatch, capsys, *args, "--json", *sets(PAPER))
    assert status == 0
    assert json.loads(out)["ok"] is True
    with_nan(paths["data_path"])
    status, out, _ = call(monkeypatch, capsys, *args, "--json")
    assert status == 1
    assert json.loads(out)["findings"][0]["check"] == "data.files"
    status, out, _ = call(monkeypatch, capsys, *args, "--set", "training.lrr=1")
    assert status == 1
    assert out.startswith("error     config")


def test_training_asks_the_doctor_first(paths, monkeypatch, capsys, tmp_path):
    results = tmp_path / "results"
    args = [
        "train", "--config_path", paths["config_path"], "--data_path", paths["data_path"],
        "--results_path", results, "--device_ids", "--max_steps", "1",
    ]  # fmt: skip
    with_nan(paths["data_path"])
    status, _, err = call(monkeypatch, capsys, *args, *sets(PAPER))
    assert status == 1
    lines = err.splitlines()
    assert lines[0].startswith("doctor: error: ")
    assert "sample_00001" in lines[0]
    assert [line.startswith("doctor: ") for line in lines] == [True] * 3  # c_theta, and the end
    assert not results.exists()
    status, _, err = call(monkeypatch, capsys, *args, "--skip_doctor", "--set", "training.seed=2")
    assert "doctor: " not in err
    assert results.exists()
