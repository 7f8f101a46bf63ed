"""Audio files as other programs write them: cut, mislabelled, of any format and name."""

import io
import os
import struct
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib import enhance
from diffbuf_lib.data import DNLMDataset, PairedFolderDataset, open_dataset, read_audio, read_info
from diffbuf_lib.data.audio import check_rate, resample_folder
from diffbuf_lib.data.reader import AudioReader
from diffbuf_lib.enhance import enhance_file
from diffbuf_lib.errors import DiffbufError
from diffbuf_lib.evaluation.evaluate import Evaluator
from diffbuf_lib.live import stream_path
from tests.conftest import make_model, refused

RATE = 16000
FORMATS = [
    ("wav", "WAV", "PCM_16"), ("wav", "WAV", "PCM_U8"), ("wav", "WAV", "PCM_24"),
    ("wav", "WAV", "FLOAT"), ("wav", "WAV", "ULAW"), ("wav", "WAV", "IMA_ADPCM"),
    ("wav", "WAV", "GSM610"), ("wav", "WAVEX", "PCM_16"), ("rf64", "RF64", "PCM_16"),
    ("w64", "W64", "PCM_16"), ("flac", "FLAC", "PCM_16"), ("mp3", "MP3", "MPEG_LAYER_III"),
    ("ogg", "OGG", "VORBIS"), ("opus", "OGG", "OPUS"), ("aiff", "AIFF", "PCM_16"),
    ("au", "AU", "PCM_16"), ("caf", "CAF", "PCM_16"), ("caf", "CAF", "ALAC_16"),
]  # fmt: skip


def wave(samples=16000, channels=1):
    t = np.arange(samples)[:, None] / RATE
    noise = np.random.default_rng(samples).standard_normal((samples, channels))
    return 0.2 * np.sin(2 * np.pi * 300 * t) + 0.02 * noise


def encoded(kind="WAV", subtype="PCM_16", samples=16000, channels=1, **more):
    file = io.BytesIO()
    with soundfile.SoundFile(file, "w", RATE, channels, subtype, format=kind, **more) as out:
        out.write(wave(samples, channels))
    return file.getvalue()


def decoded(path, size=4096):
    with AudioReader(path) as file:
        blocks = list(file.blocks(size))
        assert all(len(block) == size for block in blocks[:-1])
        samples = np.concatenate(blocks)
        assert file.position == len(samples)
        return samples, file.complaints()


@pytest.fixture
def put(tmp_path):
    def put(name, content):
        path = tmp_path / name
        path.write_bytes(content)
        return path

    return put


@pytest.mark.law
@pytest.mark.parametrize(("suffix", "kind", "subtype"), FORMATS)
@pytest.mark.parametrize("size", [333, 4096])
def test_blocks_are_the_file_as_libsndfile_reads_it_at_once(put, suffix, kind, subtype, size):
    path = put(f"a.{suffix}", encoded(kind, subtype))
    with soundfile.SoundFile(path) as file:
        whole = np.zeros((file.frames, 1), np.float32)
        assert file.buffer_read_into(whole, "float32") == len(whole)
    samples, complaints = decoded(path, size)
    np.testing.assert_allclose(samples, whole, atol=1e-6)
    assert complaints == []
    for start in (0, 5000, 15000):
        part, _ = read_audio(path, start, 700)
        np.testing.assert_allclose(part[0], whole[start : start + 700, 0], atol=1e-6)


def without_xing(mp3):
    """Drop the first frame of an MP3, which says how many follow."""
    second = mp3.index(mp3[:2], 4)
    assert b"Xing" in mp3[:second] or b"Info" in mp3[:second]
    return mp3[second:]


@pytest.mark.law
@pytest.mark.parametrize("mode", ["CONSTANT", "VARIABLE"])
@pytest.mark.parametrize("tag", [b"", b"TAG" + b"x" * 125])
def test_an_mp3_that_does_not_say_how_long_it_is_gives_what_can_be_decoded(put, mode, tag):
    """Its header's estimate is too long or, with a variable rate, many times too short."""
    mp3 = encoded("MP3", "MPEG_LAYER_III", bitrate_mode=mode, compression_level=0.5)
    path = put("a.mp3", without_xing(mp3) + tag)
    samples, _ = decoded(path)
    assert 16000 <= len(samples) <= 16000 + 4 * 1152
    assert np.abs(samples).max() < 0.4
    delay = len(samples) - 16000
    whole = wave()[:, 0]
    assert max(
        np.corrcoef(samples[shift : shift + 14000, 0], whole[:14000])[0, 1]
        for shift in range(delay)
    ) > 0.95  # fmt: skip
    assert read_info(path).frames == len(samples) == read_audio(path)[0].shape[1]


def unknown_length(flac):
    """A FLAC as it is written to a pipe: 0 samples in its header."""
    flac = bytearray(flac)
    flac[21] &= 0xF0
    flac[22:26] = bytes(4)
    return bytes(flac)


@pytest.mark.law
@pytest.mark.parametrize("size", [100, 4096, 100000])
def test_a_flac_of_unknown_length_is_read_to_its_end(put, size):
    path = put("a.flac", unknown_length(encoded("FLAC")))
    samples, complaints = decoded(path, size)
    assert (samples.shape, complaints) == ((16000, 1), [])
    np.testing.assert_allclose(samples, wave(), atol=1e-4)
    assert read_info(path).frames == 16000
    assert torch.equal(read_audio(path, 9000, 500)[0][0], torch.from_numpy(samples[9000:9500, 0]))


@pytest.mark.law
@pytest.mark.parametrize(
    ("suffix", "kind"), [(s, k) for s, k, t in FORMATS if t == "PCM_16" and k != "CAF"]
)
def test_a_cut_file_gives_its_beginning_and_says_how_much(put, suffix, kind):
    content = encoded(kind)
    path = put(f"a.{suffix}", content[: len(content) * 5 // 9])
    samples, (complaint,) = decoded(path, 1000)
    assert 6000 < len(samples) < 16000
    np.testing.assert_allclose(samples, wave()[: len(samples)], atol=1e-4)
    assert complaint.startswith(f"{path}: only {len(samples)} of 1")
    refused(lambda: read_audio(path), path, "cut short", f"{len(samples)} of 1")
    refused(lambda: read_audio(path, 0, 15000), path)
    with pytest.warns(UserWarning, match=f"only {len(samples)} of"):
        assert read_info(path, decode=True).frames == len(samples)


@pytest.mark.law
@pytest.mark.parametrize(
    ("riff", "data"),
    [(16, 0), (8, 8), (16, 16), (0, 16), ("=0", "=0"), ("=36", "=0"), ("=8", "=0"), (0, "=0"),
     ("=0", 0), ("=4294967295", "=4294967295"), ("=2147483647", "=2147483611")],
)  # fmt: skip
@pytest.mark.parametrize("subtype", ["PCM_16", "FLOAT"])
def test_a_wav_with_wrong_sizes_is_read_to_its_end(put, riff, data, subtype):
    content = bytearray(encoded("WAV", subtype))
    for at, size in ((4, riff), (content.index(b"data") + 4, data)):
        right = struct.unpack_from("<I", content, at)[0]
        wrong = int(size[1:]) if isinstance(size, str) else right + size
        struct.pack_into("<I", content, at, wrong)
    path = put("a.wav", bytes(content))
    samples, complaints = decoded(path)
    np.testing.assert_allclose(samples, wave(), atol=1e-4)
    assert len(complaints) == (riff in (8, 16) or data == 16)
    assert read_info(path).frames == 16000
    assert read_audio(path)[0].shape == (1, 16000)


def test_an_empty_wav_with_a_chunk_behind_it_stays_empty(put):
    content = encoded(samples=0) + b"LIST" + struct.pack("<I", 4) + b"INFO"
    content = content[:4] + struct.pack("<I", len(content) - 8) + content[8:]
    refused(lambda: AudioReader(put("a.wav", content)), "no samples")


@pytest.mark.parametrize(
    ("name", "head"),
    [
        ("a.m4a", b"\0\0\0\x20ftypM4A "),
        ("a.wav", b"\0\0\0\x20ftypM4A "),
        ("b c.webm", b"\x1a\x45\xdf\xa3"),
        ("a.aac", b"\xff\xf1\x50\x80"),
        ("a.ape", b"MAC "),
    ],
)
def test_other_containers_are_refused_with_the_line_that_converts_them(put, name, head):
    refused(lambda: AudioReader(put(name, head + bytes(99))), name, "ffmpeg -i")


@pytest.mark.law
@pytest.mark.parametrize(
    ("right", "cancels"),
    [((1, 0), False), ((0, 1), False), ((0, 0), False), ((-1, 0), True), ((-0.6, 0), True)],
)
def test_channels_that_cancel_are_told(tmp_path, right, cancels):
    one, other = np.random.default_rng(0).standard_normal((2, 5000)) / 10
    stereo = np.stack([one, right[0] * one + right[1] * other], axis=1)
    soundfile.write(tmp_path / "a.wav", stereo, RATE, "FLOAT")
    with AudioReader(tmp_path / "a.wav") as file:
        mono = np.concatenate(list(file.blocks(999, mono=True)))
        assert ["cancel" in line for line in file.complaints()] == [True] * cancels
    np.testing.assert_allclose(mono[:, 0], stereo.mean(axis=1), atol=1e-6)


@pytest.mark.law
def test_a_pair_may_differ_by_a_few_samples(tmp_path):
    for i, length in enumerate((15990, 16000, 15700)):
        folder = tmp_path / f"sample_{i}"
        folder.mkdir()
        (folder / "Mixture.WAV").write_bytes(encoded(samples=16000))  # some write capitals
        (folder / "vocals.Flac").write_bytes(encoded("FLAC", samples=length))
    data = DNLMDataset(tmp_path, 16000, training=False)
    with pytest.warns(UserWarning, match=r"16000.*15990.*pair_tolerance is 400") as told:
        items = [data[i] for i in range(3)]
    assert len(told) == 1
    for length, (mix, target) in zip((15990, 16000, 15700), items, strict=True):
        assert mix.shape == target.shape == (1, 16000)
        assert not mix[:, length:].any()
        assert mix[:, length - 9 : length].all()
    strict = DNLMDataset(tmp_path, 500, pair_tolerance=299)
    refused(lambda: strict[2], "16000", "15700", "data.pair_tolerance")


@pytest.mark.law
def test_an_evaluation_takes_what_is_there_of_a_cut_pair(tmp_path, tiny_cfg):
    """Of a name that is no UTF-8, which the evaluation's files and pages have as text."""
    content = encoded("FLAC")
    for folder in (b"noisy", b"clean"):
        os.makedirs(os.fsencode(tmp_path) + b"/" + folder)
        with open(os.fsencode(tmp_path) + b"/" + folder + b"/caf\xe9.flac", "wb") as file:
            file.write(content[: len(content) * 5 // 9])
    dataset = open_dataset(2, tmp_path, tiny_cfg, training=False)
    with pytest.warns(UserWarning, match=r"only 8192 of 16000 samples"):
        clips = Evaluator(make_model(tiny_cfg), dataset, ("si_sdr",), longest=RATE)
    assert clips.names == ["caf\\xe9.flac"]
    np.testing.assert_allclose(clips.read(0).mix, wave()[:8192, 0], atol=1e-4)


@pytest.mark.law
def test_a_copy_at_another_rate_keeps_the_tree_and_the_sound(tmp_path):
    source, out = tmp_path / "in", tmp_path / "out"
    kinds = {".wav": ("WAV",), ".flac": ("FLAC",), ".mp3": ("MP3", "MPEG_LAYER_III")}
    for name in ("clean/a/1.wav", "noisy/a/1.WAV", "clean/3.mp3", "noisy/3.flac"):
        path = source / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(*kinds[path.suffix.lower()]))
    (source / "notes.json").write_text("{}")
    info = read_info(source / "noisy" / "3.flac")
    refused(lambda: check_rate(info, 8000), "diffbuf data resample", "--rate 8000")
    refused(lambda: resample_folder(source, source / "out", 8000), "lies inside")
    for _ in range(2):  # the second finds everything done
        assert resample_folder(source, out, 8000) == out
    assert (out / "notes.json").read_text() == "{}"
    data = PairedFolderDataset(out, 8000, sample_rate=8000, training=False)
    assert [item[0].name for item in data.items] == ["3.wav", "1.WAV"]
    mix, target = data[1]
    assert torch.equal(mix, target)
    expected = torch.from_numpy(0.2 * np.sin(2 * np.pi * 300 * np.arange(8000) / 8000))
    assert float((mix[0] - expected)[1000:-1000].abs().max()) < 0.09  # the noise


def passing(model, batch=1, **options):
    """An enhancer that gives back what it gets."""
    return SimpleNamespace(
        model=model, batch=batch, state=SimpleNamespace(bad=0, num_bytes=0),
        latency_samples=0, worst_latency_samples=0,
        push=lambda samples: samples, flush=lambda: torch.zeros(0),
    )  # fmt: skip


def mutated(rng, content):
    """Damage a file as transfers, editors, disks and fuzzers do, its header most of all."""
    data = bytearray(content)
    for _ in range(rng.integers(1, 4)):
        kind, place = rng.integers(5), int(rng.integers(rng.choice([60, len(data)])))
        length = int(rng.choice([1, 2000, len(data)]))
        if kind == 0:  # bits
            for at in rng.integers(place + 1, size=rng.integers(1, 20)):
                data[at] ^= 1 << int(rng.integers(8))
        elif kind == 1:  # a size
            size = rng.choice([0, 1, 36, len(data), 0x7FFFFFFF, 0xFFFFFFFF, 0x80000000])
            data[place : place + 4] = int(size).to_bytes(4, rng.choice(["little", "big"]))
        elif kind == 2:  # a hole, or the end is missing
            del data[max(place, 60) : max(place, 60) + length]
        elif kind == 3:  # something pushed in
            data[place:place] = rng.bytes(min(length, 500))
        else:  # a block of another kind
            data[place : place + 512] = bytes([rng.choice([0, 255])]) * 512
    return bytes(data)


def try_one(path, out):
    """Read, enhance and stream a file; every way ends in sound or in an error that names it."""
    peak, count, begun = 0.0, 0, time.monotonic()
    cfg = SimpleNamespace(sample_rate=RATE, stft=SimpleNamespace(hop_length=256))
    model = SimpleNamespace(cfg=SimpleNamespace(audio=cfg), parameters=tuple, level=True)
    try:
        with AudioReader(path, repair=True) as file:
            for block in file.blocks(4096):
                peak, count = max(peak, float(np.abs(block).max())), count + len(block)
    except DiffbufError:
        pass
    for run in (
        lambda: enhance_file(model, path, out),
        lambda: stream_path(passing(model), path, out),
    ):
        out.unlink(missing_ok=True)
        try:
            run()
        except DiffbufError as error:
            refusal = str(error)
        else:
            samples, _ = soundfile.read(out, dtype="float32")
            assert len(samples) == count
            assert np.abs(samples).max() <= 2 * peak + 1e-9
            continue
        assert str(path) in refusal
        assert "\n" not in refusal
    assert time.monotonic() - begun < 20


@pytest.mark.law
@pytest.mark.parametrize(
    ("seed", "count"), [(0, 300), pytest.param(1, 5000, marks=pytest.mark.slow)]
)
@pytest.mark.timeout(3000)
def test_mutated_files_end_in_sound_or_in_one_line(put, monkeypatch, capfd, seed, count):
    monkeypatch.setattr(enhance, "OnlineEnhancer", passing)
    rng = np.random.default_rng(seed)
    contents = [
        (suffix, encoded(kind, subtype, 9000 if kind in ("OGG", "FLAC") else 4000, channels))
        for suffix, kind, subtype in FORMATS
        for channels in ((1,) if subtype == "GSM610" else (1, 2))
    ]
    spoil = {"mp3": without_xing, "flac": unknown_length}
    contents += [(x, spoil[x](content)) for x, content in contents if x in spoil]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i in range(count):
            suffix, content = contents[int(rng.integers(len(contents)))]
            path = put(f"m{i}.{suffix}", mutated(rng, content))
            try_one(path, path.with_name("out.wav"))
            path.unlink()
    assert "Traceback" not in capfd.readouterr().err
