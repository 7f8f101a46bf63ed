"""Files in, files out: any rate, any length, memory that does not grow, nothing half-written."""

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib import OnlineEnhancer, enhance
from diffbuf_lib.data import DNLMDataset
from diffbuf_lib.enhance import enhance_file, enhance_path
from diffbuf_lib.errors import DataError
from diffbuf_lib.evaluation import evaluate, summary
from tests.conftest import make_model


@pytest.fixture
def model(tiny_cfg):
    return make_model(tiny_cfg)


@pytest.fixture
def perfect_model(tiny_cfg, monkeypatch):
    """A model that gives its input back: what then differs is the file's handling."""
    model = make_model(tiny_cfg.override("training.loss=data_prediction"))
    monkeypatch.setattr(model, "denoise", lambda V, Y, t: (Y[..., -4:], Y[..., -4:]))
    return model


def write(path, seconds=0.3, rate=16000, channels=1):
    t = np.arange(round(seconds * rate)) / rate
    wave = 0.3 * np.sin(2 * np.pi * 440 * t)[:, None] * np.ones(channels)
    soundfile.write(path, wave, rate, "FLOAT" if path.suffix == ".wav" else "PCM_24")
    return wave.mean(axis=1)


@pytest.mark.law
@pytest.mark.parametrize("rate", [8000, 16000, 44100])
@pytest.mark.parametrize("channels", [1, 2])
@pytest.mark.parametrize("suffix", [".wav", ".flac"])
def test_rate_length_and_timing_are_kept(perfect_model, tmp_path, rate, channels, suffix):
    wave = write(tmp_path / f"in{suffix}", rate=rate, channels=channels)
    enhance_file(perfect_model, tmp_path / f"in{suffix}", tmp_path / f"out{suffix}")
    out, out_rate = soundfile.read(tmp_path / f"out{suffix}", always_2d=True)
    assert (out_rate, out.shape) == (rate, (len(wave), 1))
    middle = slice(len(wave) // 5, -len(wave) // 5)
    assert np.abs(out[middle, 0] - wave[middle]).max() < 0.01


@pytest.mark.law
def test_a_file_is_a_stream_whatever_the_block(model, tmp_path, monkeypatch):
    wave = write(tmp_path / "in.wav")
    enhancer = OnlineEnhancer(model, seed=4)
    samples = torch.from_numpy(wave).float()
    expected = torch.cat([enhancer.push(samples), enhancer.flush()])
    for seconds in (4.0, 0.0101):
        monkeypatch.setattr(enhance, "BLOCK_SECONDS", seconds)
        enhance_file(model, tmp_path / "in.wav", tmp_path / "out.wav", seed=4)
        out, _ = soundfile.read(tmp_path / "out.wav", dtype="float32")
        torch.testing.assert_close(torch.from_numpy(out), expected, rtol=1e-4, atol=1e-4)


def test_folders_keep_their_shape(model, tmp_path):
    (tmp_path / "in" / "a").mkdir(parents=True)
    write(tmp_path / "in" / "a" / "x.wav", 0.05)
    write(tmp_path / "in" / "y.flac", 0.05)
    written = [out for _, out in enhance_path(model, tmp_path / "in", tmp_path / "out")]
    assert written == [tmp_path / "out" / "a" / "x.wav", tmp_path / "out" / "y.flac"]
    with pytest.raises(DataError, match="lies inside the input"):
        list(enhance_path(model, tmp_path / "in", tmp_path / "in" / "out"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.wav"):
        list(enhance_path(model, tmp_path / "empty", tmp_path / "out"))


@pytest.mark.law
def test_a_bad_file_leaves_no_half_output_and_keeps_the_old_one(model, tmp_path):
    wave = np.zeros(9000, np.float32)
    wave[8000] = np.nan
    soundfile.write(tmp_path / "in.wav", wave, 16000, "FLOAT")
    (tmp_path / "out.wav").write_bytes(b"old")
    with pytest.raises(DataError, match=r"in\.wav.*NaN"):
        enhance_file(model, tmp_path / "in.wav", tmp_path / "out.wav")
    assert (tmp_path / "out.wav").read_bytes() == b"old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.wav", "out.wav"]
    with pytest.raises(DataError, match=r"none\.wav"):
        enhance_file(model, tmp_path / "none.wav", tmp_path / "out.wav")
    with pytest.raises(DataError, match=r"\.wav or \.flac"):
        enhance_file(model, tmp_path / "in.wav", tmp_path / "out.mp3")


@pytest.fixture
def dataset(tmp_path):
    for i in range(3):
        folder = tmp_path / "set" / f"sample_{i:05}"
        folder.mkdir(parents=True)
        rng = np.random.default_rng(i)
        clean = 0.1 * rng.standard_normal(1600) * (i != 1)  # the second target is silent
        soundfile.write(folder / "vocals.wav", clean, 16000, "FLOAT")
        noisy = clean + 0.1 * rng.standard_normal(1600)
        soundfile.write(folder / "mixture.wav", noisy, 16000, "FLOAT")
    return DNLMDataset(tmp_path / "set", 1600, training=False)


@pytest.mark.law
def test_evaluation_of_a_model_that_changes_nothing_gains_nothing(perfect_model, dataset):
    clips = list(evaluate(perfect_model, dataset, ["si_sdr"]))
    (row,) = summary(clips, ["si_sdr"])
    assert (row.scored, row.clips) == (2, 3)  # not defined on silence: left out, not zero
    assert abs(row.gain) < 1e-2
    assert abs(row.noisy) < 1


@pytest.mark.law
def test_evaluation_does_not_depend_on_the_batch(model, dataset):
    together = list(evaluate(model, dataset, ["si_sdr"], batch_size=3))
    alone = list(evaluate(model, dataset, ["si_sdr"], batch_size=1))
    for a, b in zip(together, alone, strict=True):
        assert a.name == b.name
        torch.testing.assert_close(a.estimate, b.estimate, rtol=1e-4, atol=1e-4)
    assert len(list(evaluate(model, dataset, ["si_sdr"], limit=1))) == 1
