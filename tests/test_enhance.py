"""Files in, files out: any rate, any length, memory that does not grow, nothing half-written."""

import os
import subprocess
import sys

import numpy as np
import pytest
import soundfile
import torch
from scipy.io import wavfile

from diffbuf_lib import OnlineEnhancer, enhance
from diffbuf_lib.data import DNLMDataset, audio, read_info, riff
from diffbuf_lib.enhance import FilesFailedError, enhance_file, enhance_path
from diffbuf_lib.evaluation import evaluate
from diffbuf_lib.live import stream_path
from recipes.demo.means import summary
from tests.conftest import make_model, refused, stream
from tests.evaluation.conftest import write_clip

pytestmark = pytest.mark.law


@pytest.fixture
def model(tiny_cfg):
    return make_model(tiny_cfg)


def write(path, seconds=0.3, rate=16000, channels=1):
    """Write a tone a channel; return the samples [T, C]."""
    t = np.arange(round(seconds * rate)) / rate
    wave = np.stack([0.3 * np.sin(2 * np.pi * f * t) for f in (440, 300, 200)[:channels]], axis=1)
    soundfile.write(path, wave, rate, "FLOAT" if path.suffix == ".wav" else "PCM_24")
    return wave


@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize(("channels", "kept"), [(1, "mono"), (2, "mono"), (3, "keep")])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_rate_length_timing_and_channels_are_kept(
    perfect_model, tmp_path, rate, channels, kept, suffix
):
    source, clean = tmp_path / f"in{suffix}", tmp_path / f"out{suffix}"
    wave = write(source, 0.5, rate, channels)
    wave = wave if kept == "keep" else wave.mean(axis=1, keepdims=True)
    enhance_file(perfect_model, source, clean, channels=kept)
    out, out_rate = soundfile.read(clean, always_2d=True)
    assert (out_rate, out.shape) == (rate, wave.shape)
    middle = slice(len(wave) // 5, -len(wave) // 5)
    assert np.abs(out[middle] - wave[middle]).max() < 0.01


def test_a_file_is_a_stream_whatever_the_block(model, tmp_path, monkeypatch):
    wave = write(tmp_path / "in.wav")
    expected = stream(OnlineEnhancer(model, seed=4), torch.from_numpy(wave[:, 0]).float())
    for seconds in (4.0, 0.0101):
        monkeypatch.setattr(enhance, "BLOCK_SECONDS", seconds)
        enhance_file(model, tmp_path / "in.wav", tmp_path / "out.wav", seed=4)
        out, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-4)


def test_a_bad_file_leaves_no_half_output_and_keeps_the_old_one(model, tmp_path):
    source, out = tmp_path / "in.wav", tmp_path / "out.wav"
    wave = np.zeros(9000, np.float32)
    wave[8000] = np.nan
    soundfile.write(source, wave, 16000, "FLOAT")
    out.write_bytes(b"old")
    refused(lambda: enhance_file(model, source, out), "in.wav", "NaN")
    assert out.read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.wav", "out.wav"]
    refused(lambda: enhance_file(model, tmp_path / "none.wav", out), "none.wav")
    refused(lambda: enhance_file(model, source, tmp_path / "out.mp3"), ".wav or .flac")


def test_a_folder_goes_on_after_bad_files_and_a_rerun_after_what_is_done(model, tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    (source / "a").mkdir(parents=True)
    for name in ("a/1.wav", "2.mp3", "2.wav", "3.OGG", "4.aiff"):
        kind = {".mp3": "MP3", ".OGG": "OGG", ".aiff": "AIFF"}.get(name[-4:], "WAV")
        soundfile.write(source / name, np.zeros(800), 16000, format=kind)
    (source / "a" / "0.wav").write_bytes(b"no audio")
    (source / "5.m4a").write_bytes(b"")
    done = []
    with (
        pytest.warns(UserWarning, match=r"left out.*5\.m4a.*ffmpeg -i"),
        pytest.raises(FilesFailedError, match=r"^1 of 6 files.*\n.*a/0\.wav cannot be read"),
    ):
        done.extend(out for _, out in enhance_path(model, source, out))
    names = {"a/1.wav", "2.wav", "2.mp3.wav", "3.wav", "4.wav"}
    assert {path.relative_to(out).as_posix() for path in done} == names
    assert {path for path in out.rglob("*") if path.is_file()} == set(done)
    write(source / "a" / "0.wav", 0.05)
    (source / "5.m4a").unlink()
    before = {path: path.stat().st_mtime_ns for path in done}
    with pytest.warns(UserWarning, match="5 of 6 outputs are there"):
        again = list(enhance_path(model, source, out))
    assert [target for _, target in again] == [out / "a" / "0.wav"]
    assert before == {path: path.stat().st_mtime_ns for path in done}
    assert len(list(enhance_path(model, source, out, overwrite=True))) == 6
    refused(lambda: list(enhance_path(model, source, source / "out")), "inside the input")
    (tmp_path / "empty").mkdir()
    refused(lambda: list(enhance_path(model, tmp_path / "empty", out)), "no .wav")


def test_outputs_are_of_the_umasks_mode_and_links_stay_links(model, tmp_path):
    source, link, real = (tmp_path / f"{name}.wav" for name in ("in", "link", "real"))
    write(source, 0.05)
    link.symlink_to(real)
    before = os.umask(0o027)
    try:
        enhance_file(model, source, link)
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert real.stat().st_mode & 0o777 == 0o640
    assert soundfile.info(real).frames == 800


def test_nothing_is_overwritten_unasked_and_the_input_never(model, tmp_path):
    source, out = tmp_path / "in.wav", tmp_path / "out.wav"
    write(source, 0.05)
    content = source.read_bytes()
    (tmp_path / "soft.wav").symlink_to("in.wav")
    (tmp_path / "hard.wav").hardlink_to(source)
    for name in ("in.wav", "soft.wav", "hard.wav", "../" + tmp_path.name + "/in.wav"):
        for wish in (
            lambda other: list(enhance_path(model, source, other)),
            lambda other: list(enhance_path(model, source, other, overwrite=True)),
            lambda other: stream_path(OnlineEnhancer(model), source, other),
            lambda other: stream_path(OnlineEnhancer(model), other, source),
        ):
            refused(lambda wish=wish, other=tmp_path / name: wish(other), "is the input")
    assert source.read_bytes() == content
    out.write_bytes(b"old")
    refused(lambda: list(enhance_path(model, source, out)), "--overwrite")
    assert out.read_bytes() == b"old"
    list(enhance_path(model, source, out, overwrite=True))
    assert soundfile.info(out).frames == 800


@pytest.mark.parametrize("channels", [1, 2, 3])
def test_a_wav_that_outgrows_its_sizes_becomes_rf64(model, tmp_path, monkeypatch, channels):
    write(tmp_path / "in.wav", 0.05, channels=channels)
    enhance_file(model, tmp_path / "in.wav", tmp_path / "small.wav", channels="keep")
    monkeypatch.setattr(riff, "LARGEST_RIFF", 1000)
    enhance_file(model, tmp_path / "in.wav", tmp_path / "large.wav", channels="keep")
    small, large = (tmp_path / f"{name}.wav" for name in ("small", "large"))
    assert soundfile.info(large).format == "RF64"
    assert soundfile.info(small).format == ("WAV" if channels < 3 else "WAVEX")
    assert large.stat().st_size == small.stat().st_size
    assert int.from_bytes(small.read_bytes()[4:8], "little") == small.stat().st_size - 8
    assert np.array_equal(soundfile.read(small)[0], soundfile.read(large)[0])
    assert np.array_equal(wavfile.read(small)[1], soundfile.read(small, dtype="float32")[0])


@pytest.mark.slow
def test_a_wav_beyond_four_gigabytes_has_its_length(tmp_path):
    """Sparse: silence that is written takes no network, and is taken back at once."""
    with audio.audio_output(tmp_path / "a.wav", 48000, 1) as file:
        block = np.zeros(1 << 24, np.float32)
        for _ in range(65):
            file.write(block)
    assert read_info(tmp_path / "a.wav").frames == 65 << 24
    (tmp_path / "a.wav").unlink()


def test_a_file_too_quiet_for_a_model_without_levels_is_told(tiny_cfg, model, tmp_path):
    soundfile.write(tmp_path / "in.wav", 0.1 * write(tmp_path / "loud.wav"), 16000, "FLOAT")
    with pytest.warns(UserWarning, match=r"in\.wav: its peak is -30 dB .*level_seconds"):
        enhance_file(model, tmp_path / "in.wav", tmp_path / "out.wav")
    levelled = make_model(tiny_cfg.override("preprocessing.level_seconds=1"))
    enhance_file(levelled, tmp_path / "in.wav", tmp_path / "out.wav")  # a warning is an error
    enhance_file(model, tmp_path / "loud.wav", tmp_path / "out.wav")


def test_repair_takes_what_is_no_number_as_zero(perfect_model, tmp_path):
    wave = write(tmp_path / "in.wav")[:, 0]
    for name, values in (("bad", [np.nan, np.inf, -np.inf]), ("zeros", 0)):
        wave[[5, 700, 701]] = values
        soundfile.write(tmp_path / f"{name}.wav", wave, 16000, "FLOAT")
    with pytest.warns(UserWarning, match=r"bad\.wav: 3 NaN or Inf"):
        enhance_file(perfect_model, tmp_path / "bad.wav", tmp_path / "out.wav", repair=True)
    enhance_file(perfect_model, tmp_path / "zeros.wav", tmp_path / "expected.wav")
    out, expected = (soundfile.read(tmp_path / f"{name}.wav")[0] for name in ("out", "expected"))
    assert np.array_equal(out, expected)


def test_a_kill_leaves_no_visible_half_file(tmp_path):
    """What kill -9 would leave while a file is written."""
    with audio.audio_output(tmp_path / "out.wav", 16000, 1) as file:
        file.write(np.zeros(100000, np.float32))
        (name,) = os.listdir(tmp_path)
        assert name.startswith(".")
    assert os.listdir(tmp_path) == ["out.wav"]


def test_names_that_no_terminal_can_show_are_printed(model, tmp_path):
    """A name in Latin-1 and one in Japanese, on a terminal that knows ASCII."""
    model.save_pretrained(tmp_path / "model")
    source = os.fsencode(tmp_path / "in")
    os.mkdir(source)
    for name in (b"caf\xe9.wav", "日本.wav".encode(), b"bad\xff.wav"):
        with open(source + b"/" + name, "wb") as file:
            if not name.startswith(b"bad"):
                soundfile.write(file, np.zeros(400), 16000, format="WAV")
    done = subprocess.run(
        [sys.executable, "-c", "from diffbuf_lib.cli import main; main()", "enhance",
         str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--model", str(tmp_path / "model")],
        env=os.environ | {"PYTHONIOENCODING": "ascii"}, capture_output=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert b"caf\\udce9.wav" in done.stdout
    assert b"bad\\udcff.wav is empty" in done.stderr
    assert b"Traceback" not in done.stderr
    assert len(os.listdir(tmp_path / "out")) == 2


def test_evaluation_gains_nothing_from_no_change_and_does_not_depend_on_the_batch(
    perfect_model, model, tmp_path
):
    rng = np.random.default_rng(0)
    for i in range(3):
        clean = 0.1 * rng.standard_normal(1600) * (i != 1)  # the second target is silent
        write_clip(tmp_path, i, clean, clean + 0.1 * rng.standard_normal(1600))
    data = DNLMDataset(tmp_path, 1600, training=False)
    (row,) = summary(list(evaluate(perfect_model, data, ["si_sdr"])), ["si_sdr"])
    assert (row.scored, row.clips) == (2, 3)  # not defined on silence: left out, not zero
    assert abs(row.gain) < 1e-2
    assert abs(row.noisy) < 1
    together, alone = (evaluate(model, data, ["si_sdr"], batch_size=size) for size in (3, 1))
    for a, b in zip(together, alone, strict=True):
        assert a.name == b.name
        torch.testing.assert_close(a.estimate, b.estimate, rtol=1e-4, atol=1e-4)
    assert len(list(evaluate(model, data, ["si_sdr"], limit=1))) == 1
