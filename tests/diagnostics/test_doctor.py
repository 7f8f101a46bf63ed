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
def test_a_good_set_has_no_error_and_no_warning_and_nothing_changes(paths):
    state = torch.get_rng_state()
    findings = examine_paths(**paths, overrides=["training.deterministic=true"])
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.are_deterministic_algorithms_enabled()
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


def stereo(wave):
    return np.stack([wave, wave], axis=1)


def rewrite(root, change, names=("vocals", "mixture", "noise"), clips=(1,)):
    for path in (stem(root, name, clip) for clip in clips for name in names):
        write(path, change(samples(path)))


def drop_noise(root):  # else vocals + noise is not the mixture
    for path in root.glob("*/noise.wav"):
        path.unlink()


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


def too_loud(root):
    drop_noise(root)
    rewrite(root, lambda wave: wave * 7e38, ["vocals", "mixture"], range(4))


def clip_off(root):
    drop_noise(root)
    rewrite(root, lambda wave: (5 * wave).clip(-1, 1), ["mixture"])


def duplicate(root):
    valid = root.parent / "valid"
    drop_noise(valid)
    shutil.copy(stem(root, "vocals", 2), stem(valid, "vocals", 0))


ERRORS = [
    (["sde={type: bbed, diffusion: {c: 1.0e-30}}", "training.loss=score"],
     "schedule.score_target", "sde.diffusion"),
    (["diffusion_buffer.t_eps=1.0e-9", "model.output_scale=none", "training.use_amp=true"],
     "schedule.score_target", "diffusion_buffer.t_eps"),
    (["training.batch_size=10000000"], "model.memory", "training.batch_size"),
    (["audio.sample_rate=8000"], "data.files", "audio.sample_rate"),
    (with_nan, "data.files", "3 NaN or Inf"),
    (lambda r: without(r, "vocals", "noise"), "data.silence", "4 of 4"),
    (swapped, "data.mixture", "4 of 4"),
    (lambda r: rewrite(r, stereo), "data.channels", "3 of 1 and 1 of 2"),
    (lambda r: without(r, "noise", "vocals"), "data.noise", "4 of 4"),
    (lambda r: rewrite(r, lambda x: x[:1100], ["vocals"]), "data.files", "1100"),
    (too_loud, "model.step", "stage Y"),
    (lambda r: stem(r, "vocals").unlink(), "data.open", "no vocals.wav"),
]  # fmt: skip
WARNINGS = [
    (["sde={type: bbed, diffusion: {c: 0.08}}"], "schedule.c_theta"),  # as the paper prints it
    (["diffusion_buffer.num_frames=128"], "frames.window"),
    (["diffusion_buffer={buffer_size: 40, num_frames: 45}"], "frames.buffer"),
    (["audio.chunk_size=4000"], "data.padding"),
    (["training.batch_size=5"], "data.batches"),
    (["diffusion_buffer.t_max=0.2"], "schedule.times"),
    (lambda r: rewrite(r, lambda x: 0.01 * x, clips=range(4)), "data.level"),
    (lambda r: rewrite(r, lambda x: x + 0.03, ["vocals", "mixture"], range(4)), "data.dc"),
    (clip_off, "data.clipping"),
    (duplicate, "valid.duplicates"),
]


def spoil(paths, damage):
    """Return overrides, or damage the training set; and what is then found."""
    overrides = damage if isinstance(damage, list) else []
    if not overrides:
        damage(paths["data_path"])
    return overrides, examine_paths(**paths, overrides=overrides)


@pytest.mark.law
@pytest.mark.parametrize(("damage", "check", "says"), ERRORS)
def test_what_is_broken_comes_first_and_its_overrides_mend_it(paths, damage, check, says):
    overrides, findings = spoil(paths, damage)
    first = findings[0]
    assert (first.severity, first.check) == ("error", check), render(findings)
    assert says in f"{first.config_key} {first.message}"
    assert first.why
    assert first.fix
    if overrides:
        assert says.partition(".")[0] in first.fix
        assert first.overrides
    elif check in ("data.files", "data.channels"):
        assert "sample_00001" in first.message
    if check == "data.open":
        assert sum(finding.severity == "error" for finding in findings) == 1  # told once
    if first.overrides:
        mended = examine_paths(**paths, overrides=[*overrides, *first.overrides])
        assert not has_error(mended), render(mended)


@pytest.mark.law
@pytest.mark.parametrize(("damage", "check"), WARNINGS)
def test_what_is_only_unwise_is_a_warning_and_its_overrides_clear_it(paths, damage, check):
    overrides, findings = spoil(paths, damage)
    assert not has_error(findings), render(findings)
    finding = of(findings, check)
    assert finding.severity == "warning", render(findings)
    assert finding.fix
    assert finding.value is not None
    if finding.overrides:
        mended = examine_paths(**paths, overrides=[*overrides, *finding.overrides])
        assert {f.severity for f in mended if f.check == check} <= {"ok", "info"}


@pytest.mark.law
def test_a_running_level_makes_quiet_data_as_good_as_loud(paths):
    ratios = []
    for gain in (1, 0.01):
        rewrite(paths["data_path"], lambda x, gain=gain: gain * x, clips=range(4))
        findings = examine_paths(**paths, overrides=["preprocessing.level_seconds=1"])
        ratios.append(of(findings, "data.level").value)
    assert ratios[1] == pytest.approx(ratios[0], rel=0.05)  # 16 bits are left


@pytest.mark.law
@pytest.mark.parametrize(("center", "frames"), [(True, 63), (False, 61)])
def test_frames_of_a_one_second_clip_are_counted_exactly(paths, center, frames):
    stft = f"audio.stft={{n_fft: 510, win_length: 510, hop_length: 256, center: {center}}}"
    small = ["audio.chunk_size=16000", stft, "diffusion_buffer.num_frames=128"]
    findings = examine_paths(**paths, overrides=small)
    assert of(findings, "frames.count").value == frames
    assert of(findings, "frames.latency").value == pytest.approx(3 * 16 + 510 / 16)
    window = of(findings, "frames.window")
    assert window.severity == "warning"
    assert str(127 * 256 + (0 if center else 510)) in window.message


def test_a_data_set_in_memory_is_examined_too():
    wave = 0.05 * torch.randn(1, 1600, generator=seeded())
    assert not has_error(examine(config(), [(3 * wave.flip(-1), wave)]))
    bad = wave.where(torch.arange(1600) != 5, torch.inf)
    for clips, check in (([(bad, wave)], "data.nonfinite"), ([], "data.size"), ([0], "data.files")):
        assert examine(config(), clips)[0].check == check


def test_what_config_or_machine_cannot_do_is_a_finding(paths, monkeypatch):
    both = [paths["data_path"], paths["valid_path"]]
    assert not has_error(examine_paths(paths["config_path"], both))
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
    target = samples(stem(root, "vocals", 0))  # a tenth of which is in no file of the first clip
    write(stem(root, "mixture", 0), samples(stem(root, "mixture", 0)) + 0.1 * target)
    facts = audit(opened(root, config()))
    assert facts.size == len(facts.clips) == 3
    for i, clip in enumerate(sorted(facts.clips, key=lambda clip: clip.name)):
        mix, target = (samples(stem(root, name, i)) for name in ("mixture", "vocals"))
        assert clip.target.rms == pytest.approx(np.sqrt((target**2).mean()))
        assert clip.mix.peak == pytest.approx(abs(mix).max())
        assert clip.mix.dc == pytest.approx(mix.mean(), abs=1e-7)
        expected = 10 * np.log10((target**2).mean() / ((mix - target) ** 2).mean())
        assert clip.snr_db == pytest.approx(expected, abs=1e-3)
        assert (
            clip.residual_db == pytest.approx(-20, abs=0.01) if i == 0 else clip.residual_db < -100
        )
        assert clip.wave.shape == (1, 1600)
    first = min(facts.clips, key=lambda clip: clip.name)
    assert first.residual_db == pytest.approx(-20, abs=0.01)


@pytest.mark.law
def test_non_finite_and_clipped_samples_are_counted():
    wave = torch.tensor([[0.5, torch.nan, -1.0, torch.inf], [0.25, 0.25, 0.25, 0.25]])
    facts = measure(wave)
    assert (facts.nonfinite, facts.clipped) == (2, pytest.approx(1 / 8))
    assert (facts.peak, facts.dc, facts.silent) == (1.0, 0.25, False)
    assert measure(torch.zeros(1, 8)).silent


@pytest.mark.law
def test_a_sample_spans_the_set_and_keeps_to_its_limits():
    class Slow(list):
        def __getitem__(self, index):
            time.sleep(0.02)
            return super().__getitem__(index)

    def indices(**limits):
        facts = audit(Slow([(torch.ones(1, 16), torch.ones(1, 16))] * 1000), **limits)
        return sorted(int(clip.name.split()[-1]) for clip in facts.clips)

    assert indices(limit=20) == list(range(0, 1000, 50))
    short = indices(limit=1000, seconds=0.1)
    assert 1 <= len(short) < 50
    assert short[-1] > 0


@pytest.mark.law
def test_shared_targets_are_found_by_content_not_by_name(tmp_path):
    train, valid = make_split(tmp_path / "t", 4), make_split(tmp_path / "v", 3, seed=9)

    def shared():
        return shared_targets(opened(train, config()), opened(valid, config()))

    assert shared() == []
    # the same size, the same middle, another end: not the same file
    content = bytearray(stem(train, "vocals", 0).read_bytes())
    content[-1] ^= 1
    stem(valid, "vocals", 0).write_bytes(content)
    assert shared() == []
    shutil.copy(stem(train, "vocals", 3), stem(valid, "vocals", 2))
    assert shared() == [(str(stem(train, "vocals", 3)), str(stem(valid, "vocals", 2)))]


@pytest.mark.parametrize(("last", "told"), [(0.5, []), (0.99, ["run.learning"]), (-1.0, [])])
def test_a_run_that_does_not_learn_is_told_to_overfit(tmp_path, last, told):
    losses = [1 + (last - 1) * step / 200 for step in range(200)]
    lines = [json.dumps({"step": i + 1, "loss": loss}) for i, loss in enumerate(losses)]
    (tmp_path / "history.jsonl").write_text("\n".join(lines))
    findings = list(checks_run.check_history(tmp_path))
    assert [finding.check for finding in findings] == told
    assert all("--overfit_batches" in finding.fix for finding in findings)
