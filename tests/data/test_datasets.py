import pickle
from itertools import product

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import pad
from torch.utils.data import DataLoader

from diffbuf_lib.config import build_config
from diffbuf_lib.data import (
    DNLMDataset,
    MixingDataset,
    PairedFolderDataset,
    collate,
    open_dataset,
    open_datasets,
    read_audio,
)
from diffbuf_lib.data.datasets import draw_crop
from tests.conftest import refused
from tests.data.conftest import noise_wave, save

CHUNK = 1000
SMALL = ["audio.chunk_size=8000", "diffusion_buffer.buffer_size=5"]
KINDS = {1: DNLMDataset, 2: PairedFolderDataset, 3: MixingDataset}


@pytest.mark.law
@given(st.integers(1, 500), st.integers(1, 300), st.integers(0, 700), st.integers(0, 99))
def test_a_crop_is_a_window_of_zeros_then_file_then_padding(length, chunk, zeros, seed):
    crop = draw_crop(length, chunk, zeros, np.random.default_rng(seed))
    # The oracle: the whole virtual signal, cut at the offset that the crop implies.
    signal = np.concatenate([np.zeros(zeros), np.arange(1, length + 1), np.zeros(chunk)])
    offset = int(np.random.default_rng(seed).integers(zeros + max(length - chunk, 0) + 1))
    file = np.arange(1, length + 1)[crop.start : crop.start + crop.frames]
    clip = np.concatenate([np.zeros(crop.zeros), file, np.zeros(chunk)])[:chunk]
    assert np.array_equal(clip, signal[offset : offset + chunk])
    assert crop.frames == len(file) >= 0
    assert crop.zeros + crop.frames <= chunk


@pytest.mark.law
@pytest.mark.parametrize("length", [1, 999, 1000, 1001, 4000])
@pytest.mark.parametrize("training", [True, False])
def test_a_clip_is_the_crop_that_seed_epoch_and_index_draw(make_dnlm, length, training):
    """To the bit, the same of both files, whatever was read before or the global state is."""
    root = make_dnlm([length, 9000])
    for seed, epoch, index in product((0, 5), (2, 0), (1, 0)):
        data = DNLMDataset(root, CHUNK, seed=seed, training=training, leading_zeros=300)
        data.set_epoch(epoch)
        rng = np.random.default_rng([seed, epoch, index])
        crop = draw_crop((length, 9000)[index], CHUNK, 300, rng if training else None)
        torch.manual_seed(epoch)
        before = torch.get_rng_state()
        for stem, wave in zip(("mixture", "vocals"), data[index], strict=True):
            whole, _ = read_audio(root / f"sample_{index:05}" / f"{stem}.wav")
            part = whole[:, crop.start : crop.start + crop.frames]
            assert torch.equal(wave, pad(part, (crop.zeros, CHUNK))[:, :CHUNK])
        assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.law
def test_a_training_clip_is_lowered_as_a_whole_by_a_drawn_gain(make_dnlm):
    root = make_dnlm([9000] * 8)
    plain, lowered = (DNLMDataset(root, CHUNK, attenuation=dB) for dB in (0, 40))
    gains = []
    for (mix, target), (low_mix, low_target) in zip(plain, lowered, strict=True):
        gains.append(float(low_mix.norm() / mix.norm()))
        assert torch.allclose(low_mix, gains[-1] * mix, atol=1e-6)
        assert torch.allclose(low_target, gains[-1] * target, atol=1e-6)
    assert 0.01 <= min(gains) < 0.1 < max(gains) <= 1
    assert torch.equal(lowered[3][0], DNLMDataset(root, CHUNK, attenuation=40)[3][0])
    fixed = [DNLMDataset(root, CHUNK, attenuation=x, training=False)[0][0] for x in (0, 40)]
    assert torch.equal(*fixed)


@pytest.mark.law
def test_workers_that_outlive_an_epoch_follow_it(make_dnlm):
    data = DNLMDataset(make_dnlm([9000] * 2), CHUNK)
    options = {"num_workers": 1, "persistent_workers": True, "collate_fn": collate}
    loader = DataLoader(data, batch_size=2, **options)
    for epoch in (0, 5):
        data.set_epoch(epoch)
        (batch,) = list(loader)
        mixes = [mix for mix, _ in data]  # a sequence: it ends by itself
        assert torch.equal(batch[0], torch.stack(mixes))
        assert torch.equal(pickle.loads(pickle.dumps(data))[1][0], mixes[1])  # where they spawn


def test_folders_that_do_not_fit_name_what_would(tmp_path, make_dnlm):
    roots = {1: make_dnlm([100]), 2: tmp_path / "second", 3: tmp_path / "third"}
    for folder in ("second/clean", "second/noisy", "third/speech", "third/noise"):
        (tmp_path / folder).mkdir(parents=True)
    make_dnlm([100], root=tmp_path / "set" / "train")
    for own, kind in KINDS.items():
        others = [(root, f"--dataset_type {n}") for n, root in roots.items() if n != own]
        for root, named in (
            (tmp_path / "none", "does not exist"),
            (tmp_path, "check the path"),
            (tmp_path / "set", tmp_path / "set" / "train"),
            *others,
        ):
            refused(lambda kind=kind, root=root: kind(root), root, named)
    refused(lambda: DNLMDataset(roots[1], 0), "audio.chunk_size")
    refused(lambda: MixingDataset(roots[1], snr=(3.0, 1.0)), "data.snr_min")
    (roots[1] / "sample_00000" / "vocals.wav").unlink()
    refused(lambda: DNLMDataset(roots[1]), "sample_00000", "vocals.wav")


@pytest.mark.parametrize(
    ("length", "channels", "rate", "part"),
    [(1000, 1, 16000, "data.pair_tolerance"), (1500, 2, 16000, "channels"), (1500, 1, 8000, "Hz")],
)
def test_pairs_that_do_not_match(make_dnlm, length, channels, rate, part):
    root = make_dnlm([1500])
    target = save(root / "sample_00000" / "vocals.wav", noise_wave(9, length, channels), rate)
    refused(lambda: DNLMDataset(root, CHUNK)[0], target, "mixture.wav", part)


def test_collate_stacks_stereo_or_names_the_channels(make_dnlm):
    root = make_dnlm([1500] * 3, channels=2)
    stereo = DNLMDataset(root, CHUNK)
    for wave, item in zip(collate([stereo[0], stereo[2]]), stereo[2], strict=True):
        assert wave.shape == (2, 2, CHUNK)
        assert torch.equal(wave[1], item)
    mono, short = (torch.zeros(2, 1, n) for n in (CHUNK, 9))
    refused(lambda: collate([stereo[0], mono]), "1 and 2 channels", "training.batch_size=1")
    refused(lambda: collate([mono, short]), "9 and 1000 samples", "audio.chunk_size")


@pytest.fixture
def paired(tmp_path):
    for number in range(3):
        save(tmp_path / "clean" / "a" / f"{number}.wav", noise_wave(number, 2500))
        save(tmp_path / "noisy" / "a" / f"{number}.wav", noise_wave(100 + number, 2500))
    return tmp_path


def test_paired_folders_name_what_is_alone(paired):
    item = PairedFolderDataset(paired, CHUNK, training=False)[1]
    for folder, wave in zip(("noisy", "clean"), item, strict=True):
        assert torch.equal(wave, read_audio(paired / folder / "a" / "1.wav", 0, CHUNK)[0])
    for number in range(5):
        save(paired / "noisy" / f"new{number}.wav", noise_wave(0, 9))
    refused(lambda: PairedFolderDataset(paired), "clean lacks new0.wav, new1.wav", "2 more")


def decibels(mix, target):
    """The SNR of an item."""
    powers = [float(wave.double().square().sum()) for wave in (target, mix - target)]
    return 10 * np.log10(powers[0] / powers[1])


@pytest.fixture
def to_mix(tmp_path):
    root = tmp_path / "to_mix"
    for number in range(3):
        save(root / "speech" / f"s{number}" / "a.wav", noise_wave(number, 3000))
        save(root / "noise" / f"{number}.wav", noise_wave(50 + number, 4000))
    return root


@pytest.mark.law
def test_mixing_gives_the_drawn_snr_keyed_by_seed_epoch_and_index(to_mix):
    def read(seed=0, epoch=0):
        data = MixingDataset(to_mix, CHUNK, seed=seed, snr=(-7.0, -7.0))
        data.set_epoch(epoch)
        return [data[i] for i in (2, 0, 1)]

    items = read()
    assert [decibels(*item) for item in items] == pytest.approx([-7.0] * 3, abs=1e-3)
    for other, alike in ((read(), True), (read(seed=1), False), (read(epoch=1), False)):
        same = [torch.equal(a[0], b[0]) for a, b in zip(items, other, strict=True)]
        assert same == [alike] * 3


@pytest.mark.law
def test_mixing_spans_the_snr_range_and_validation_does_not_change(to_mix):
    data = MixingDataset(to_mix, CHUNK, snr=(-20.0, 20.0))
    ratios = []
    for epoch in range(40):
        data.set_epoch(epoch)
        ratios.append(decibels(*data[0]))
    assert -20.01 < min(ratios) < -12
    assert 12 < max(ratios) < 20.01
    fixed = MixingDataset(to_mix, CHUNK, training=False, leading_zeros=300)
    first = fixed[1]
    fixed.set_epoch(9)
    assert torch.equal(fixed[1][0], first[0])
    whole, _ = read_audio(to_mix / "speech" / "s1" / "a.wav")
    correlation = torch.nn.functional.cosine_similarity(first[1], whole[:, :CHUNK])
    assert float(correlation) == pytest.approx(1.0, abs=1e-5)


def test_mixing_never_takes_a_pause_for_speech(to_mix):
    wave = noise_wave(0, 12000)
    wave[:, :9000] = 0
    save(to_mix / "speech" / "s0" / "a.wav", wave)
    for training, epoch in product((True, False), range(10)):
        data = MixingDataset(to_mix, CHUNK, training=training)
        data.set_epoch(epoch)
        assert bool(data[0][1].any())
    save(to_mix / "speech" / "s0" / "a.wav", torch.zeros(1, 12000))
    refused(lambda: data[0], "s0", "is silent")


@pytest.mark.law
def test_mixing_augments_the_speech_and_keeps_the_snr(to_mix):
    def made(**options):
        return MixingDataset(to_mix, CHUNK, snr=(-5.0, -5.0), **options)

    plain = made()[0]
    refused(lambda: MixingDataset(to_mix, CHUNK, room_probability=0.5), "rooms", "room_probability")
    room = torch.zeros(1, 400)
    room[0, [0, 100, 399]] = torch.tensor([1.0, -0.5, 0.25])
    save(to_mix / "rooms" / "r.wav", room, subtype="FLOAT")
    for options in ({"room_probability": 1.0}, {"tilt": 6.0}, {"speed": 0.1}):
        mix, target = made(**options)[0]
        assert mix.shape == plain[0].shape
        assert not torch.allclose(target, plain[1], atol=1e-3)
        assert decibels(mix, target) == pytest.approx(-5.0, abs=1e-3)
        assert torch.equal(made(**options)[0][0], mix)


@pytest.mark.parametrize(
    ("samples", "channels", "rate", "part"),
    [(4000, 2, 16000, "has 2"), (999, 1, 16000, "999 samples"), (4000, 1, 8000, "8000 Hz")],
)
def test_mixing_refuses_noise_that_does_not_fit(to_mix, samples, channels, rate, part):
    for path in (to_mix / "noise").iterdir():
        save(path, noise_wave(0, samples, channels), rate)
    refused(lambda: MixingDataset(to_mix, CHUNK)[0], part)


def test_several_folders_are_one_dataset(make_dnlm, tmp_path):
    roots = [make_dnlm([9000] * n, root=tmp_path / name) for n, name in ((2, "a"), (3, "b"))]
    cfg = build_config({}, SMALL)
    joined = open_datasets(1, roots, cfg, training=True)
    parts = [open_dataset(1, root, cfg, training=True) for root in roots]
    for epoch in (0, 3):
        for dataset in (joined, *parts):
            dataset.set_epoch(epoch)
        names = [part.name(i) for part in parts for i in range(len(part))]
        assert [joined.name(i) for i in range(len(joined))] == names
        items = [wave for part in parts for item in part for wave in item]
        assert all(map(torch.equal, (wave for item in joined for wave in item), items))


def test_open_dataset_passes_the_config_on(make_dnlm, paired, to_mix):
    cfg = build_config({}, [*SMALL, "training.seed=5", "data.snr_min=-3", "data.snr_max=-2"])
    for number, root in {1: make_dnlm([1500]), 2: paired, 3: to_mix}.items():
        data = open_dataset(number, root, cfg, training=True)
        assert (data.chunk_size, data.seed) == (cfg.audio.chunk_size, 5)
        assert data.leading_zeros == cfg.leading_zero_samples
        assert open_dataset(number, root, cfg, training=False).leading_zeros == 0
    assert data.snr == (-3.0, -2.0)
    refused(lambda: open_dataset(99, to_mix, cfg, training=True), "dataset_type")
