import errno
import os
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib.data.audio import (
    AudioInfo,
    list_audio,
    read_audio,
    read_info,
    resample,
    write_audio,
)
from diffbuf_lib.errors import DataError
from tests.conftest import refused
from tests.data.conftest import noise_wave, save


@pytest.mark.law
@pytest.mark.parametrize(
    ("suffix", "subtype", "step"),
    [("wav", "PCM_16", 2**-16), ("flac", "PCM_16", 2**-16), ("wav", "PCM_24", 2**-24)],
)
def test_a_wave_comes_back_within_half_a_step(tmp_path, suffix, subtype, step):
    wave = noise_wave(0, 999, channels=2)
    path = tmp_path / f"a.{suffix}"
    write_audio(path, wave, 22050, subtype)
    back, rate = read_audio(path)
    assert rate == 22050
    assert back.dtype == torch.float32
    assert read_info(path) == AudioInfo(path, 22050, 2, 999)
    assert float((back - wave).abs().max()) <= step * 1.001 + 1e-9


@pytest.mark.law
def test_float_wavs_come_back_bit_for_bit_and_may_exceed_full_scale(tmp_path):
    wave = 30 * noise_wave(0, 500)
    write_audio(tmp_path / "a.wav", wave, 16000, "FLOAT")
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], wave)


@pytest.mark.law
def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path):
    for suffix in ("wav", "flac"):
        path = save(tmp_path / f"a.{suffix}", noise_wave(0, 5000))
        whole, _ = read_audio(path)
        assert torch.equal(read_audio(path, 1234, 567)[0], whole[:, 1234:1801])
        assert torch.equal(read_audio(path, 4999)[0], whole[:, 4999:])
        for start, frames in ((5000, None), (4999, 2), (-1, 3), (0, 0)):
            with pytest.raises(DataError, match="has 5000 samples") as error:
                read_audio(path, start, frames)
            assert str(path) in str(error.value)


def test_full_scale_is_written_and_beyond_is_refused(tmp_path):
    path = tmp_path / "a.wav"
    write_audio(path, torch.tensor([[1.0, -1.0, 0.5]]), 16000)
    assert np.array_equal(soundfile.read(path, dtype="int16")[0], [32767, -32768, 16384])
    refused(lambda: write_audio(path, torch.tensor([[0.0, -1.001]]), 16000), path, "1.001", "FLOAT")
    assert len(read_audio(path)[0][0]) == 3
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_numbers_are_refused_both_ways(tmp_path, bad):
    wave = torch.tensor([[0.0, bad, 0.1]])
    refused(lambda: write_audio(tmp_path / "a.wav", wave, 16000), "a.wav", "NaN or Inf")
    soundfile.write(tmp_path / "b.wav", wave[0].numpy(), 16000, subtype="FLOAT")
    refused(lambda: read_audio(tmp_path / "b.wav"), "b.wav holds 1 NaN or Inf")
    assert torch.equal(read_audio(tmp_path / "b.wav", 2)[0], torch.tensor([[0.1]]))


@pytest.mark.law
def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, monkeypatch):
    path = save(tmp_path / "a.wav", noise_wave(0, 100))
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    refused(
        lambda: write_audio(path, noise_wave(1, 100), 16000),
        "a.wav cannot be written (No space left",
    )
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize(
    ("shape", "name", "subtype", "message"),
    [
        ((10,), "a.wav", "PCM_16", "shape"),
        ((1, 0), "a.wav", "PCM_16", "shape"),
        ((1, 9), "a.mp3", "PCM_16", ".wav, .flac"),
        ((1, 9), "a.wav", "ULAW", "PCM_16, PCM_24, FLOAT"),
        ((1, 9), "a.flac", "FLOAT", "FLOAT"),
        ((1, 9), "no/such/folder/a.wav", "PCM_16", "folder"),
    ],
)
def test_what_cannot_be_written(tmp_path, shape, name, subtype, message):
    path = tmp_path / name
    refused(lambda: write_audio(path, torch.zeros(shape), 16000, subtype), path, message)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_files_that_cannot_be_read(tmp_path, suffix):
    path = save(tmp_path / f"a.{suffix}", noise_wave(0, 4000))
    content = path.read_bytes()
    for spoiled, message in (
        (b"", "is empty (0 bytes)"),
        (content[: len(content) // 2], "cut short"),
        (content[:20], ""),
        (b"<html>404</html>" * 9, "cannot be read as audio"),
    ):
        path.write_bytes(spoiled)
        refused(lambda: read_audio(path), path, message)
    soundfile.write(path, np.zeros((0, 1)), 16000, format="WAV")  # what is in a file counts
    refused(lambda: read_info(path), path, "no samples")
    path.unlink()
    refused(lambda: read_audio(path), path, "does not exist")
    path.mkdir()
    refused(lambda: read_info(path), path, "is not a file")


@pytest.mark.law
@pytest.mark.parametrize(("from_rate", "to_rate"), [(22050, 16000), (8000, 16000), (48000, 16000)])
def test_resampling_keeps_a_tone_and_its_time(from_rate, to_rate):
    def tone(rate):
        time = torch.arange(rate, dtype=torch.float64) / rate
        return torch.sin(2 * torch.pi * 440 * time).float()[None]

    result = resample(tone(from_rate), from_rate, to_rate)
    assert result.shape == (1, to_rate)
    middle = slice(to_rate // 10, -to_rate // 10)  # the filter rings at the ends
    assert float((result - tone(to_rate))[:, middle].abs().max()) < 1e-3


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
