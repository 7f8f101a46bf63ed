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


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.law
@pytest.mark.parametrize(
    ("suffix", "subtype", "step"),
    [("wav", "PCM_16", 2**-16), ("flac", "PCM_16", 2**-16), ("wav", "PCM_24", 2**-24)],
)
def test_a_wave_comes_back_within_half_a_step(tmp_path, noise_wave, suffix, subtype, step):
    wave = noise_wave(0, 999, channels=2)
    path = tmp_path / f"a.{suffix}"
    write_audio(path, wave, 22050, subtype)
    back, rate = read_audio(path)
    assert rate == 22050
    assert back.dtype == torch.float32
    assert read_info(path) == AudioInfo(path, 22050, 2, 999)
    assert float((back - wave).abs().max()) <= step * 1.001 + 1e-9


@pytest.mark.law
def test_float_wavs_come_back_bit_for_bit_and_may_exceed_full_scale(tmp_path, noise_wave):
    wave = 30 * noise_wave(0, 500)
    write_audio(tmp_path / "a.wav", wave, 16000, "FLOAT")
    assert torch.equal(read_audio(tmp_path / "a.wav")[0], wave)


@pytest.mark.law
def test_a_part_is_the_same_as_that_part_of_the_whole(tmp_path, noise_wave, save):
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
    before = path.read_bytes()
    with pytest.raises(DataError, match=r"peak 1\.001 is beyond full scale 1"):
        write_audio(path, torch.tensor([[0.0, -1.001]]), 16000)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_samples_that_are_not_numbers_are_refused_both_ways(tmp_path, bad):
    wave = torch.tensor([[0.0, bad, 0.1]])
    with pytest.raises(DataError, match="NaN or Inf"):
        write_audio(tmp_path / "a.wav", wave, 16000)
    soundfile.write(tmp_path / "b.wav", wave[0].numpy(), 16000, subtype="FLOAT")
    with pytest.raises(DataError, match=r"b\.wav holds 1 NaN or Inf"):
        read_audio(tmp_path / "b.wav")
    assert torch.equal(read_audio(tmp_path / "b.wav", 2)[0], torch.tensor([[0.1]]))


@pytest.mark.law
def test_a_full_disk_leaves_the_old_file_and_no_rest(tmp_path, noise_wave, save, monkeypatch):
    path = save(tmp_path / "a.wav", noise_wave(0, 100))
    before = path.read_bytes()

    def full(self, content):
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(DataError, match=r"a\.wav cannot be written \(No space left") as error:
        write_audio(path, noise_wave(1, 100), 16000)
    assert one_line(error)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["a.wav"]


@pytest.mark.parametrize(
    ("wave", "name", "subtype", "message"),
    [
        (torch.zeros(10), "a.wav", "PCM_16", "shape"),
        (torch.zeros(1, 0), "a.wav", "PCM_16", "shape"),
        (torch.zeros(1, 10), "a.mp3", "PCM_16", "must end in one of .wav, .flac"),
        (torch.zeros(1, 10), "a.wav", "ULAW", "is none of PCM_16, PCM_24, FLOAT"),
        (torch.zeros(1, 10), "a.flac", "FLOAT", "cannot be written as FLOAT"),
        (torch.zeros(1, 10), "no/such/folder/a.wav", "PCM_16", "choose another folder"),
    ],
)
def test_what_cannot_be_written(tmp_path, wave, name, subtype, message):
    with pytest.raises(DataError, match=message) as error:
        write_audio(tmp_path / name, wave, 16000, subtype)
    assert one_line(error)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda data: b"", r"is empty \(0 bytes\)"),
        (lambda data: data[: len(data) // 2], "cut short"),
        (lambda data: data[:20], "cut short|cannot be read as audio"),
        (lambda data: b"<html>404</html>" * 9, "cannot be read as audio"),
        (None, "does not exist"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, noise_wave, save, suffix, spoil, message):
    path = save(tmp_path / f"a.{suffix}", noise_wave(0, 4000))
    data = path.read_bytes()
    path.unlink()
    if spoil:
        path.write_bytes(spoil(data))
    with pytest.raises(DataError, match=message) as error:
        read_audio(path)
    assert str(path) in str(error.value)
    assert one_line(error)


def test_files_without_samples_and_folders_are_refused(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros((0, 1)), 16000)
    with pytest.raises(DataError, match=r"a\.wav has no samples"):
        read_info(tmp_path / "a.wav")
    (tmp_path / "b.wav").mkdir()
    with pytest.raises(DataError, match="is not a file"):
        read_info(tmp_path / "b.wav")


@pytest.mark.parametrize("size", [0, 0xFFFFFFFF])
def test_wavs_from_a_pipe_have_no_length_in_their_header(tmp_path, noise_wave, save, size):
    path = save(tmp_path / "a.wav", noise_wave(0, 100))
    data = bytearray(path.read_bytes())
    data[4:8] = size.to_bytes(4, "little")
    path.write_bytes(data)
    assert read_info(path).frames == 100


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


def test_resampling_lengths_and_limits(noise_wave):
    wave = noise_wave(0, 1001, channels=2)
    assert resample(wave, 16000, 16000) is wave
    for length in (1, 7, 1000, 1001):
        assert resample(wave[:, :length], 22050, 16000).shape == (2, -(-length * 16000 // 22050))
    with pytest.raises(DataError, match="start at 1 Hz"):
        resample(wave, 0, 16000)


def test_listing_is_sorted_nested_and_only_audio(tmp_path, noise_wave, save):
    for name in ("b/2.flac", "b/1.wav", "a/x/3.WAV", "c.wav", ".hidden/4.wav", "a/._5.wav"):
        save(tmp_path / name, noise_wave(0, 10))
    (tmp_path / "notes.txt").write_text("no audio")
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in list_audio(tmp_path)]
    assert names == ["a/x/3.WAV", "b/1.wav", "b/2.flac", "c.wav"]
    with pytest.raises(DataError, match="does not exist"):
        list_audio(tmp_path / "nothing")
