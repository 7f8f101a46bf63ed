"""The data of a model to ship: its sources, and that its splits share none."""

import shutil
import struct

import numpy as np
import pytest
import torch

from diffbuf_lib.errors import DataError
from recipes.cpu_demo import dataset, voices
from recipes.cpu_demo.noises import KINDS
from recipes.cpu_demo.rooms import draw_response

RATE = 16000


@pytest.mark.law
@pytest.mark.parametrize("kind", KINDS)
def test_noises_are_loud_finite_and_keyed_by_their_seed(kind):
    waves = [KINDS[kind](np.random.default_rng(seed), RATE, RATE) for seed in (0, 0, 1, 2, 3)]
    assert torch.equal(waves[0], waves[1])
    assert not torch.equal(waves[0], waves[2])
    for wave in waves:
        assert wave.shape == (1, RATE)
        assert wave.dtype == torch.float32
        assert float(wave.abs().max()) == pytest.approx(1)
        assert float(wave.square().mean()) > 1e-6


@pytest.mark.law
def test_every_drone_belongs_to_one_split():
    owners = [dataset._owner(f) for f in np.linspace(80, 460, 2000)]
    assert set(owners) == {"train", "valid", "test"}
    assert owners.count("train") > 1500
    low, high = dataset.HELD_OUT_HZ["test"]
    assert dataset._owner(low) == dataset._owner(high) == "test"
    assert dataset._owner(low - 0.1) == dataset._owner(high + 0.1) == "train"


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
    loud = sum(int((wave != 0).sum()) for wave in files)
    assert loud == 23 * RATE
    assert all(float(wave.abs().max()) == pytest.approx(0.9) for wave in files)


def test_prompts_are_decoded_and_silence_left_out(tmp_path):
    """G.722 of a pure code book entry: what matters is rate, scale and order."""
    pytest.importorskip("G722")
    for name in ("b.g722", "a.g722", "silence/1.g722"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(struct.pack("4000B", *([0x55, 0xD3, 0x2A, 0xE6] * 1000)))
    decoded = list(voices.prompts(tmp_path))
    assert [wave.shape for wave in decoded] == [(1, 8000), (1, 8000)]  # 64 kbit/s: 0.5 s
    assert all(float(wave.abs().max()) <= 1 for wave in decoded)


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda program: None)
    with pytest.raises(DataError, match=r"apt-get install .*festvox-czech-dita .*flite"):
        dataset.build_pretraining(tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.law
def test_rooms_differ_and_are_repeated_by_their_seed():
    first, again, other = (draw_response(np.random.default_rng(s), RATE) for s in (1, 1, 2))
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)
    energy = first.square()
    late = float(energy[len(energy) // 2 :].sum() / energy.sum())
    assert 0 < late < 0.3  # it has a tail, and the tail decays
