"""The doctor: nothing wrong with a good set, and for each broken one the right finding first."""

import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml

from diffbuf_lib import load_config
from diffbuf_lib.config import build_config
from diffbuf_lib.data import open_dataset
from diffbuf_lib.diagnostics import checks_run, examine, examine_paths, has_error
from diffbuf_lib.diagnostics.checks_data import audit, measure, shared_targets
from diffbuf_lib.diagnostics.findings import Finding, render
from diffbuf_lib.registry import OPTIMIZERS
from tests.conftest import TINY, call, seeded

PAPER = "sde={type: bbed, diffusion: {c: 0.08}}"  # the c that the paper prints


def config(*overrides):
    return build_config(TINY, overrides)


def write(path, wave):
    """Write [T] or [T, C] as it is, NaN and all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(path, wave, 16000, subtype="FLOAT")


def make_split(root, count=4, seed=0):
    """Make a split whose clips are white noise (target) in white noise, SNR -6 dB."""
    rng = np.random.default_rng(seed)
    for i in range(count):
        target, noise = 0.05 * rng.standard_normal((2, 1600)) * np.array([[1], [2]])
        folder = root / f"sample_{i:05}"
        write(folder / "vocals.wav", target)
        write(folder / "noise.wav", noise)
        write(folder / "mixture.wav", target + noise)
    return root


def stem(root, name, clip=1):
    return root / f"sample_{clip:05}" / f"{name}.wav"


def samples(path):
    return soundfile.read(path)[0]


def opened(root, cfg):
    return open_dataset(1, root, cfg, training=True)


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
    findings = examine(cfg, [(target + noise, target)], device="cpu")
    assert not has_error(findings), render(findings)
    assert of(findings, "model.step").severity == "ok"


@pytest.mark.law
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_the_doctor_accepts_every_optimizer(paths, optimizer):
    findings = examine_paths(**paths, overrides=[f"training.optimizer={optimizer}"])
    assert not has_error(findings), render(findings)
    assert of(findings, "model.memory").severity == "ok"


@pytest.mark.law
@pytest.mark.parametrize(
    ("overrides", "check", "key"),
    [
        (["sde={type: bbed, diffusion: {c: 1.0e-30}}", "training.loss=score"],
         "schedule.score_target", "sde.diffusion"),
        (["diffusion_buffer.t_eps=1.0e-9", "model.output_scale=none", "training.use_amp=true"],
         "schedule.score_target", "diffusion_buffer.t_eps"),
        (["training.batch_size=10000000"], "model.memory", "training.batch_size"),
        (["audio.sample_rate=8000"], "data.files", "audio.sample_rate"),
    ],
)  # fmt: skip
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


def stereo(wave):
    return np.stack([wave, wave], axis=1)


def rewrite(root, change, names=("vocals", "mixture", "noise"), clips=(1,)):
    for path in (stem(root, name, clip) for clip in clips for name in names):
        write(path, change(samples(path)))


def with_nan(root):
    rewrite(root, lambda x: np.where(np.arange(len(x)) // 3 == 33, np.nan, x), ["mixture"])


def without(root, name, other):
    rewrite(root, np.zeros_like, [name], range(4))
    for clip in range(4):
        shutil.copy(stem(root, other, clip), stem(root, "mixture", clip))


def swapped(root):
    for clip in range(4):
        mixture, vocals = stem(root, "mixture", clip), stem(root, "vocals", clip)
        mixture.rename(root / "other.wav")
        vocals.rename(mixture)
        (root / "other.wav").rename(vocals)


def cut_short(root):
    path = stem(root, "vocals")
    path.write_bytes(path.read_bytes()[:1000])


def too_loud(root):
    for clip in range(4):
        stem(root, "noise", clip).unlink()
    rewrite(root, lambda wave: wave * 7e38, ["vocals", "mixture"], range(4))


@pytest.mark.law
@pytest.mark.parametrize(
    ("damage", "check", "says"),
    [
        (with_nan, "data.files", "3 NaN or Inf"),
        (lambda r: without(r, "vocals", "noise"), "data.silence", "4 of 4 targets are silent"),
        (swapped, "data.mixture", "not vocals + noise in 4 of 4"),
        (cut_short, "data.files", "cut short"),
        (lambda r: rewrite(r, stereo), "data.channels", "3 of 1 and 1 of 2"),
        (lambda r: rewrite(r, stereo, ["mixture"]), "data.files", "2 channels"),
        (lambda r: without(r, "noise", "vocals"), "data.noise", "the same in 4 of 4"),
        (lambda r: rewrite(r, lambda x: x[:1100], ["vocals"]), "data.files", "1100"),
        (too_loud, "model.step", "stage Y"),
        (lambda r: stem(r, "vocals").unlink(), "data.open", "no vocals.wav"),
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


def clip_off(paths):
    path = stem(paths["data_path"], "mixture")
    stem(paths["data_path"], "noise").unlink()
    write(path, (5 * samples(path)).clip(-1, 1))


@pytest.mark.law
def test_a_running_level_makes_quiet_data_as_good_as_loud(paths):
    ratios = []
    for gain in (1, 0.01):
        rewrite(paths["data_path"], lambda x, gain=gain: gain * x, clips=range(4))
        findings = examine_paths(**paths, overrides=["preprocessing.level_seconds=1"])
        ratios.append(of(findings, "data.level").value)
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)  # 16 bits are left


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
        ([], lambda p: rewrite(p["data_path"], lambda x: 0.01 * x, clips=range(4)), "data.level"),
        ([], lambda p: rewrite(p["data_path"], lambda x: x + 0.03, ["vocals", "mixture"], range(4)),
         "data.dc"),
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
    small.append("diffusion_buffer.num_frames=128")
    window = of(examine_paths(**paths, overrides=small), "frames.window")
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
    assert not has_error(examine(config(), [(3 * wave.flip(-1), wave)]))
    bad = wave.where(torch.arange(1600) != 5, torch.inf)
    assert examine(config(), [(bad, wave)])[0].check == "data.nonfinite"
    assert examine(config(), [])[0].check == "data.size"
    assert "clip 0: TypeError" in examine(config(), [None])[0].message


def test_what_config_or_machine_cannot_do_is_a_finding(paths, monkeypatch):
    (finding,) = examine_paths(**paths, overrides=["diffusion_buffer.buffer_size=99"])
    assert (finding.severity, finding.check) == ("error", "config")
    assert finding.config_key == "diffusion_buffer.buffer_size"
    findings = examine_paths(**paths, overrides=["training={use_amp: true, amp_dtype: bf16}"])
    assert of(findings, "model.step_amp").severity == "ok"
    assert examine_paths(**paths, device="tpu")[0].check == "machine.device"

    def trace(self, *args, **kwargs):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")

    monkeypatch.setattr(checks_run.DiffusionBufferModel, "trace", trace)
    first = examine_paths(**paths)[0]
    assert (first.severity, first.check) == ("error", "model.memory")
    assert "20.00 GiB" in first.message


def test_training_and_the_command_fail_on_an_error(paths, monkeypatch, capsys, tmp_path):
    flags = [part for name in paths for part in (f"--{name}", paths[name])]
    monkeypatch.setenv("COLUMNS", "70")
    status, out, err = call(monkeypatch, capsys, "doctor", *flags)
    assert (status, err) == (0, "")
    assert out.splitlines()[-1].startswith("0 error, 0 warning")
    assert max(map(len, out.splitlines())) <= 70
    with_nan(paths["data_path"])
    status, out, _ = call(monkeypatch, capsys, "doctor", *flags, "--json")
    assert (status, json.loads(out)["findings"][0]["check"]) == (1, "data.files")
    results = tmp_path / "results"
    train = ["train", *flags, "--results_path", results, "--device_ids", "--max_steps", "1"]
    status, _, err = call(monkeypatch, capsys, *train)
    assert status == 1
    assert "sample_00001" in err.splitlines()[0]
    assert not results.exists()
    call(monkeypatch, capsys, *train, "--skip_doctor", "--set", "training.seed=2")
    assert results.exists()


@pytest.mark.law
def test_facts_of_a_clip_are_those_of_its_files(tmp_path):
    root = make_split(tmp_path, 3)
    facts = audit(opened(root, config()))
    assert facts.size == len(facts.clips) == 3
    for i, clip in enumerate(sorted(facts.clips, key=lambda clip: clip.name)):
        mix, target, noise = (samples(stem(root, n, i)) for n in ("mixture", "vocals", "noise"))
        assert clip.target.rms == pytest.approx(np.sqrt((target**2).mean()))
        assert clip.mix.peak == pytest.approx(abs(mix).max())
        assert clip.mix.dc == pytest.approx(mix.mean(), abs=1e-7)
        expected = 10 * np.log10((target**2).mean() / (noise**2).mean())
        assert clip.snr_db == pytest.approx(expected, abs=1e-3)
        assert clip.residual_db < -100
        assert clip.wave.shape == (1, 1600)


@pytest.mark.law
def test_a_residual_is_found_in_dB(tmp_path):
    root = make_split(tmp_path, 2)
    target = samples(stem(root, "vocals", 0))
    write(stem(root, "mixture", 0), samples(stem(root, "mixture", 0)) + 0.1 * target)
    by_name = {clip.name: clip for clip in audit(opened(root, config())).clips}
    (clip,) = [clip for name, clip in by_name.items() if "sample_00000" in name]
    assert clip.residual_db == pytest.approx(-20, abs=0.01)


@pytest.mark.law
def test_non_finite_and_clipped_samples_are_counted():
    wave = torch.tensor([[0.5, torch.nan, -1.0, torch.inf], [0.25, 0.25, 0.25, 0.25]])
    facts = measure(wave)
    assert facts.nonfinite == 2
    assert facts.clipped == pytest.approx(1 / 8)
    assert facts.peak == 1.0
    assert facts.dc == 0.25
    assert not facts.silent
    assert measure(torch.zeros(1, 8)).silent


@pytest.mark.law
def test_a_sample_spans_the_set_and_keeps_to_its_limits(tmp_path):
    wave = torch.rand(1, 16)

    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.02)
            return wave, wave

    many = Slow([(wave, wave)] * 1000)
    facts = audit(many, limit=20)
    names = sorted(int(clip.name.split()[-1]) for clip in facts.clips)
    assert names == list(range(0, 1000, 50))
    short = audit(many, limit=1000, seconds=0.1)
    assert 1 <= len(short.clips) < 50
    assert max(int(clip.name.split()[-1]) for clip in short.clips) > 0


@pytest.mark.law
def test_shared_targets_are_found_by_content_not_by_name(tmp_path):
    cfg = config()
    train, valid = make_split(tmp_path / "t", 4), make_split(tmp_path / "v", 3, seed=9)
    assert shared_targets(opened(train, cfg), opened(valid, cfg)) == []
    # the same size, the same middle, another end: not the same file
    path = stem(valid, "vocals", 0)
    content = bytearray(stem(train, "vocals", 0).read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert shared_targets(opened(train, cfg), opened(valid, cfg)) == []
    shutil.copy(stem(train, "vocals", 3), stem(valid, "vocals", 2))
    pair = (str(stem(train, "vocals", 3)), str(stem(valid, "vocals", 2)))
    assert shared_targets(opened(train, cfg), opened(valid, cfg)) == [pair]
