"""The data of a model to ship: its sources, and that its splits share none."""

import shutil
import struct

import numpy as np
import pytest
import torch

from diffbuf_lib.diffusion.losses import LossInputs, data_prediction
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import MissingExtraError
from recipes.cpu_demo import dataset, endless, noise_families, pesq_loss, recordings, voices
from tests.conftest import refused, seeded
from tests.data.conftest import RATE, noise_wave, save

FAMILIES = noise_families.TRAINING | noise_families.HELD_OUT


@pytest.mark.law
@pytest.mark.parametrize("name", FAMILIES)
def test_noises_are_loud_finite_and_keyed_by_their_seed(name):
    waves = [
        noise_families.draw_noise(np.random.default_rng(seed), RATE, RATE, {name: FAMILIES[name]})
        for seed in (0, 0, 1, 2, 3)
    ]
    assert np.array_equal(waves[0], waves[1])
    assert not np.array_equal(waves[0], waves[2])
    for wave in waves:
        assert wave.shape == (RATE,)
        assert np.mean(wave**2) == pytest.approx(1)


@pytest.mark.law
@pytest.mark.parametrize("recorded", [False, True])
def test_an_endless_clip_follows_from_epoch_and_index(tmp_path, recorded, monkeypatch):
    """Also where all noise is babble or recordings, which are read."""
    for number in range(3):
        save(tmp_path / "speech" / f"{number}.wav", noise_wave(number, RATE + 4000 * number))
    if recorded:
        save(tmp_path / "noise" / "a.wav", noise_wave(9, RATE // 2))
        monkeypatch.setattr(endless, "TRAINING", {})
    clips, again = (endless.EndlessMixtures(tmp_path, RATE, training=True) for _ in range(2))
    assert all(map(torch.equal, clips[1], again[1]))
    again.set_epoch(1)
    assert not torch.equal(clips[1][0], again[1][0])
    for mix, target in (*clips, *again):
        assert mix.shape == target.shape == (1, RATE)
        low, high = endless.PEAK_DB
        assert 10 ** (low / 20) <= max(mix.abs().max(), target.abs().max()) <= 10 ** (high / 20)


def test_of_fetched_repositories_only_what_is_free_and_clean_is_taken(tmp_path, capsys):
    clone = tmp_path / "clones" / "Precise-Community-Data"
    loud = noise_wave(0, RATE, level=0.2)
    pauses = torch.cat([loud, torch.zeros(1, RATE // 2)], dim=1)
    for name, wave in (("clean", pauses), ("noisy", loud), ("not-named", pauses)):
        save(clone / "hey" / f"{name}.wav", wave)
    for name in ("dataset-voice-kerstin", "drone-audio-dataset", f"{clone.name}/licenses"):
        (tmp_path / "clones" / name).mkdir()
    (clone / "licenses" / "license-2019-someone.txt").write_text(
        "into the public domain:\nhey/clean.wav\nhey/noisy.wav\n"
    )
    recordings.gather(tmp_path / "out", tmp_path / "clones")
    assert [path.stem for path in (tmp_path / "out").rglob("*.flac")] == ["clean"]
    assert "public domain" in capsys.readouterr().out


class _Judge:
    """In the place of torch-pesq, which does not install beside tyro: minus the mean error."""

    def mos(self, clean, wave):
        return -(clean - wave).square().mean(1)


def test_pesq_counts_where_there_is_speech(monkeypatch):
    monkeypatch.setattr(pesq_loss, "judge", lambda device: _Judge())
    spectral = Spectral()
    wave = torch.randn(2, RATE // 2, generator=seeded())
    wave[1] = 0
    S = spectral(wave)
    x0_hat = (1.1 * S).requires_grad_()
    given = LossInputs(S, x0_hat, S, S, S.real, spectral)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pesq_loss.data_and_pesq(given)
    samples = (S.shape[-1] - 1) * spectral.hop_length
    error = (spectral.inverse(x0_hat, samples) - spectral.inverse(S, samples))[0].square().mean()
    term = loss - data_prediction(given)
    torch.testing.assert_close(term, (pesq_loss.WEIGHT * 0.01 * error).expand_as(term))
    loss.mean().backward()
    assert x0_hat.grad.isfinite().all()
    nothing = LossInputs(S, S[1:], S[1:], S, S.real, spectral)
    assert pesq_loss.mean_opinion(nothing) == 0


def test_without_its_package_or_beside_type_checks_pesq_says_so():
    with pytest.raises(MissingExtraError, match=r"torch-pesq|python -O"):
        pesq_loss.judge(torch.device("cpu"))


@pytest.mark.law
def test_no_language_is_in_two_splits():
    languages = [name for names in dataset.SPEAKERS.values() for name in names]
    assert len(languages) == len(set(languages))
    # English and Spanish prompts are one speaker's.
    assert sum({"en", "es"} <= set(names) for names in dataset.SPEAKERS.values()) == 1


@pytest.mark.law
def test_prompts_are_joined_to_long_files_without_loss():
    waves = [torch.full((1, RATE), 0.1 * (i + 1)) for i in range(23)]
    files = list(dataset._joined(iter(waves)))
    assert all(wave.shape[1] >= 10 * RATE for wave in files[:-1])
    assert sum(int((wave != 0).sum()) for wave in files) == 23 * RATE
    assert all(float(wave.abs().max()) == pytest.approx(0.9) for wave in files)


def test_prompts_are_decoded_and_silence_left_out(tmp_path):
    """G.722 of a pure code book entry: what matters is rate, scale and order."""
    pytest.importorskip("G722")
    (tmp_path / "silence").mkdir()
    for name in ("b.g722", "a.g722", "silence/1.g722"):
        (tmp_path / name).write_bytes(struct.pack("4B", 0x55, 0xD3, 0x2A, 0xE6) * 1000)
    decoded = list(voices.prompts(tmp_path))
    assert [wave.shape for wave in decoded] == [(1, 8000), (1, 8000)]  # 64 kbit/s: 0.5 s
    assert all(float(wave.abs().max()) <= 1 for wave in decoded)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    refused(lambda: dataset.build_pretraining(tmp_path / "out"), "apt-get install", "flite")
    assert not (tmp_path / "out").exists()
