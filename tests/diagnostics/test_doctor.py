"""The doctor: nothing wrong with a good set, and for each broken one the right finding first."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from diffbuf_lib import load_config
from diffbuf_lib.diagnostics import checks_run, examine, examine_paths, has_error
from diffbuf_lib.diagnostics.checks_run import resolve_device
from diffbuf_lib.diagnostics.findings import Finding, render, to_json, worst_first
from diffbuf_lib.registry import OPTIMIZERS
from tests.conftest import TINY, call, seeded
from tests.diagnostics.clips import Items, config, make_split, opened, samples, stem, write

PAPER = "sde={type: bbed, diffusion: {c: 0.08}}"  # the c that the paper prints


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


@pytest.mark.law
@pytest.mark.parametrize("path", sorted(Path("configs").glob("*.yaml")), ids=lambda p: p.stem)
def test_the_doctor_accepts_every_config(path):
    cfg = load_config(path, ["model.base_channels=8", "training.batch_size=1"])
    target, noise = 0.1 * torch.randn(2, 1, cfg.audio.chunk_size, generator=seeded())
    findings = examine(cfg, Items((target + noise, target)), device="cpu")
    assert not has_error(findings), render(findings)
    assert of(findings, "model.step").severity == "ok"


@pytest.mark.law
@pytest.mark.parametrize("optimizer", OPTIMIZERS.names())
def test_the_doctor_accepts_every_optimizer(paths, optimizer):
    findings = examine_paths(**paths, overrides=[f"training.optimizer={optimizer}"])
    assert not has_error(findings), render(findings)
    assert of(findings, "model.memory").severity == "ok"


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("diffusion_buffer.buffer_size=99", "diffusion_buffer.buffer_size"),
        ("diffusion_buffer.t_max=1.0", "diffusion_buffer.t_max"),
        ("training.lrr=1", "training.lr"),
        ("sde={type: bbed, diffusion: {c: 0.3, theta: 0.08}}", "sde.diffusion.c"),
    ],
)
def test_a_config_that_cannot_be_opened_is_the_only_finding(paths, override, key):
    (finding,) = examine_paths(**paths, overrides=[override])
    assert (finding.severity, finding.check) == ("error", "config")
    assert key in finding.fix or finding.config_key == key


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


STEMS = ("vocals", "mixture", "noise")


def rewrite(root, change, names=STEMS, clips=(1,)):
    for path in (stem(root, name, clip) for clip in clips for name in names):
        write(path, change(samples(path)))


def with_nan(root):
    rewrite(root, lambda x: np.where(np.arange(len(x)) // 3 == 33, np.nan, x), ["mixture"])


def silent(root):
    rewrite(root, np.zeros_like, ["vocals"], range(4))
    for clip in range(4):
        shutil.copy(stem(root, "noise", clip), stem(root, "mixture", clip))


def swapped(root):
    for clip in range(4):
        mixture, vocals = stem(root, "mixture", clip), stem(root, "vocals", clip)
        mixture.rename(root / "other.wav")
        vocals.rename(mixture)
        (root / "other.wav").rename(vocals)


def cut_short(root):
    path = stem(root, "vocals")
    path.write_bytes(path.read_bytes()[:1000])


def twice(wave):
    return np.stack([wave, wave], axis=1)


def without_noise(root):
    rewrite(root, np.zeros_like, ["noise"], range(4))
    for clip in range(4):
        shutil.copy(stem(root, "vocals", clip), stem(root, "mixture", clip))


def too_loud(root):
    for clip in range(4):
        stem(root, "noise", clip).unlink()
    rewrite(root, lambda wave: wave * 7e38, ["vocals", "mixture"], range(4))


@pytest.mark.law
@pytest.mark.parametrize(
    ("damage", "check", "says"),
    [
        (with_nan, "data.files", "3 NaN or Inf"),
        (silent, "data.silence", "4 of 4 targets are silent"),
        (swapped, "data.mixture", "not vocals + noise in 4 of 4"),
        (cut_short, "data.files", "cut short"),
        (lambda root: rewrite(root, twice), "data.channels", "3 of 1 and 1 of 2"),
        (lambda root: rewrite(root, twice, ["mixture"]), "data.files", "2 channels"),
        (without_noise, "data.noise", "the same in 4 of 4"),
        (lambda root: rewrite(root, lambda x: x[:1500], ["vocals"]), "data.files", "1500"),
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


def quiet(paths):
    rewrite(paths["data_path"], lambda wave: 0.01 * wave, clips=range(4))


def with_offset(paths):
    rewrite(paths["data_path"], lambda wave: wave + 0.03, ["vocals", "mixture"], range(4))


def clip_off(paths):
    path = stem(paths["data_path"], "mixture")
    stem(paths["data_path"], "noise").unlink()
    write(path, (5 * samples(path)).clip(-1, 1))


@pytest.mark.law
@pytest.mark.parametrize(
    ("overrides", "change", "check"),
    [
        ([PAPER], None, "schedule.c_theta"),
        (["diffusion_buffer.num_frames=128"], None, "frames.window"),
        (["diffusion_buffer.buffer_size=40", "diffusion_buffer.num_frames=45"], None,
         "frames.buffer"),
        (["audio.chunk_size=4000"], None, "data.padding"),
        (["training.batch_size=5"], None, "data.batches"),
        (["diffusion_buffer.t_max=0.2"], None, "schedule.times"),
        ([], quiet, "data.level"),
        ([], with_offset, "data.dc"),
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
    wave = 0.05 * torch.randn(1, 1600, generator=seeded())
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


def test_devices_are_looked_for_before_they_are_touched(paths, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert {str(resolve_device(d)) for d in ("auto", "cpu", "cuda", "cuda:3")} == {"cpu"}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for device, says in (("cuda:7", "2 GPUs"), ("tpu", "auto, cpu")):
        findings = examine_paths(**paths, device=device)
        assert (findings[0].severity, findings[0].check) == ("error", "machine.device")
        assert says in findings[0].message
        assert not any(finding.check.startswith("model") for finding in findings)


def test_findings_are_sorted_rendered_and_told_as_json():
    findings = [
        Finding("ok", "a", "fine"),
        Finding("error", "b", "broken", value=float("inf"), why="bad", fix="replace it"),
        Finding("warning", "c", "odd", value={1: (2, float("nan"))}, overrides=("x.y=1",)),
    ]
    ordered = worst_first(findings)
    assert [finding.check for finding in ordered] == ["b", "c", "a"]
    told = json.loads(to_json(ordered))
    assert told["ok"] is False
    assert told["counts"] == {"error": 1, "warning": 1, "info": 0, "ok": 1}
    assert [each["value"] for each in told["findings"]] == [None, {"1": [2, None]}, None]
    plain = render(ordered, width=60)
    assert "\x1b[" not in plain
    assert "\x1b[31;1merror" in render(ordered, colour=True)
    assert "fix: replace it" in plain
    assert "--set x.y=1" in plain
    assert all(len(line) <= 60 for line in plain.splitlines())


def test_the_command_prints_a_table_or_json_and_fails_on_an_error(paths, monkeypatch, capsys):
    args = ["doctor", *(str(x) for name, path in paths.items() for x in (f"--{name}", path))]
    status, out, err = call(monkeypatch, capsys, *args)
    assert (status, err) == (0, "")
    assert "\x1b[" not in out
    assert out.splitlines()[-1].startswith("0 error, 0 warning")
    with_nan(paths["data_path"])
    status, out, _ = call(monkeypatch, capsys, *args, "--json")
    assert (status, json.loads(out)["ok"]) == (1, False)
    assert json.loads(out)["findings"][0]["check"] == "data.files"


def test_training_asks_the_doctor_first(paths, monkeypatch, capsys, tmp_path):
    results = tmp_path / "results"
    args = [
        "train", "--config_path", paths["config_path"], "--data_path", paths["data_path"],
        "--results_path", results, "--device_ids", "--max_steps", "1",
    ]  # fmt: skip
    with_nan(paths["data_path"])
    status, _, err = call(monkeypatch, capsys, *args, "--set", PAPER)
    assert status == 1
    lines = err.splitlines()
    assert lines[0].startswith("doctor: error: ")
    assert "sample_00001" in lines[0]
    assert [line.startswith("doctor: ") for line in lines] == [True] * 3  # c_theta, and the end
    assert not results.exists()
    status, _, err = call(monkeypatch, capsys, *args, "--skip_doctor", "--set", "training.seed=2")
    assert "doctor: " not in err
    assert results.exists()
