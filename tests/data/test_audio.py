import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib.data import read_audio, read_info, write_audio
from diffbuf_lib.data.audio import AudioInfo, list_audio, resample
from tests.conftest import refused
from tests.data.conftest import noise_wave, save


@pytest.mark.law
@pytest.mark.parametrize(
    ("suffix", "subtype", "step", "gain"),
    [
        ("wav", "PCM_16", 2**-16, 1),
        ("flac", "PCM_16", 2**-16, 1),
        ("wav", "PCM_24", 2**-24, 1),
        ("wav", "FLOAT", 0, 30),  # bit for bit, and beyond full scale
    ],
)
def test_a_wave_comes_back_within_half_a_step(tmp_path, suffix, subtype, step, gain):
    wave = gain * noise_wave(0, 999, channels=2)
    path = tmp_path / f"a.{suffix}"
    write_audio(path, wave, 22050, subtype)
    back, rate = read_audio(path)
    assert (rate, back.dtype) == (22050, torch.float32)
    assert read_info(path) == AudioInfo(path, 22050, 2, 999)
    assert float((back - wave).abs().max()) <= step * 1.001 + 1e-9 * (step > 0)


@pytest.mark.law
def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path):
    for suffix in ("wav", "flac"):
        path = save(tmp_path / f"a.{suffix}", noise_wave(0, 5000))
        whole, _ = read_audio(path)
        assert torch.equal(read_audio(path, 1234, 567)[0], whole[:, 1234:1801])
        assert torch.equal(read_audio(path, 4999)[0], whole[:, 4999:])
        for part in ((5000, None), (4999, 2), (-1, 3), (0, 0)):
            refused(lambda p=path, part=part: read_audio(p, *part), path, "has 5000 samples")


def test_full_scale_is_the_largest_step(tmp_path):
    path = save(tmp_path / "a.wav", [[1.0, -1.0, 0.5]])
    assert soundfile.read(path, dtype="int16")[0].tolist() == [32767, -32768, 16384]


@pytest.mark.law
def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = save(tmp_path / "a.wav", noise_wave(0, 100))
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(lambda: write_audio(path, noise_wave(1, 100), 16000), "a.wav", "No space left")
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize(
    ("wave", "name", "subtype", "message"),
    [
        ([0.0], "a.wav", "PCM_16", "shape"),
        ([[]], "a.wav", "PCM_16", "shape"),
        ([[0.0]], "a.mp3", "PCM_16", ".flac"),
        ([[0.0]], "a.wav", "ULAW", "ULAW"),
        ([[0.0]], "a.flac", "FLOAT", "FLOAT"),
        ([[0.0]], "no/such/folder/a.wav", "PCM_16", "folder"),
        ([[0.0, -1.001]], "a.wav", "PCM_16", "1.001"),
        ([[0.0, torch.nan]], "a.wav", "FLOAT", "NaN"),
        ([[0.0, torch.inf]], "a.wav", "PCM_16", "Inf"),
    ],
)
def test_what_cannot_be_written(tmp_path, wave, name, subtype, message):
    path = tmp_path / name
    refused(lambda: write_audio(path, torch.tensor(wave), 16000, subtype), path, message)
    assert not list(tmp_path.iterdir())


def test_files_that_cannot_be_read(tmp_path):
    path = save(tmp_path / "a.wav", noise_wave(0, 4000))
    content = path.read_bytes()
    for spoiled, message in (
        (b"", "empty"),
        (content[: len(content) // 2], "cut short"),
        (content[:20], ""),
        (b"<html>404</html>" * 9, "cannot be read as audio"),
    ):
        path.write_bytes(spoiled)
        refused(lambda: read_audio(path), path, message)
    soundfile.write(path, np.zeros((0, 1)), 16000)
    refused(lambda: read_info(path), path, "no samples")
    for bad in (np.nan, np.inf):
        soundfile.write(path, [0.0, bad, 0.1], 16000, subtype="FLOAT")
        refused(lambda: read_audio(path), path, "1 NaN or Inf")
        assert torch.equal(read_audio(path, 2)[0], torch.tensor([[0.1]]))
    path.unlink()
    refused(lambda: read_audio(path), path, "does not exist")
    path.mkdir()
    refused(lambda: read_info(path), path, "is not a file")


@pytest.mark.law
@pytest.mark.parametrize(
    ("from_rate", "to_rate"),
    [(22050, 16000), (8000, 16000), (48000, 16000), (16000, 14000), (16000, 17600)],
)
def test_resampling_keeps_a_tone_and_its_time(from_rate, to_rate):
    def tones(rate):
        time = torch.arange(rate, dtype=torch.float64) / rate
        return torch.stack([torch.sin(2 * torch.pi * f * time) for f in (440, 1000)]).float()

    result = resample(tones(from_rate), from_rate, to_rate)
    assert result.shape == (2, to_rate)
    middle = slice(500, -500)  # the filter rings at the ends
    assert float((result - tones(to_rate))[:, middle].abs().max()) < 1e-3


def test_resampling_lengths_and_limits():
    wave = noise_wave(0, 1001, channels=2)
    assert resample(wave, 16000, 16000) is wave
    for length in (1, 7, 1000, 1001):
        assert resample(wave[:, :length], 22050, 16000).shape == (2, -(-length * 16000 // 22050))
    refused(lambda: resample(wave, 0, 16000), "1 Hz")


def test_listing_is_sorted_nested_and_only_audio(tmp_path):
    for name in ("b/2.flac", "b/1.wav", "a/x/3.WAV", "c.wav", ".hidden/4.wav", "a/._5.wav"):
        save(tmp_path / name, noise_wave(0, 10))
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in list_audio(tmp_path)]
    assert names == ["a/x/3.WAV", "b/1.wav", "b/2.flac", "c.wav"]
    refused(lambda: list_audio(tmp_path / "nothing"), "nothing")
