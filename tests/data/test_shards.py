"""Shards give the clips of the folder they were made of, or one line that names the object."""

import json
import shutil
import tarfile

import numpy as np
import pytest
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.data import build_dnlm, open_dataset, pack_folder, shards
from diffbuf_lib.data.pack import build_shards
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.feed import ClipReader, EpochPlan
from tests.conftest import refused
from tests.data.conftest import content, noise_wave, save

CHANGES = ["audio.chunk_size=1600", "diffusion_buffer.buffer_size=4", "audio.stft.hop_length=32",
           "audio.stft.n_fft=62", "audio.stft.win_length=62"]  # fmt: skip
LENGTHS = [900, 1600, 3001, 5000, 1700, 2500, 1600]


def dataset(root, *overrides, training=True, kind=1):
    return open_dataset(kind, root, build_config({}, [*CHANGES, *overrides]), training=training)


@pytest.fixture
def packed(make_dnlm, tmp_path):
    """A folder of seven clips, and its shards of three."""
    folder = make_dnlm(LENGTHS, channels=2)
    return folder, pack_folder(folder, tmp_path / "shards", clips=3)


@pytest.fixture
def remote(packed, monkeypatch):
    """The same in a store: fsspec's memory, whose answers a test may spoil."""
    import fsspec

    system = fsspec.filesystem("memory")
    system.store.clear()
    for name, data in content(packed[1]).items():
        system.pipe(f"/bucket/{name}", data)
    monkeypatch.setattr(shards, "_WAITS", (0.0, 0.0))
    yield system
    system.store.clear()


@pytest.fixture
def asked(remote, monkeypatch):
    """What the store is asked for, a list of objects each time."""
    fetch, asked = type(remote).cat_ranges, []

    def counted(self, paths, *args, **options):
        asked.append(list(paths))
        return fetch(self, paths, *args, **options)

    monkeypatch.setattr(type(remote), "cat_ranges", counted)
    return asked


def assert_same_batches(one, other, workers=0):
    for epoch in (0, 1):
        plan = EpochPlan(len(one), 3, 1, 1, seed=5)
        batches = []
        for source in (one, other):
            source.set_epoch(epoch)
            reader = ClipReader(source, workers)
            batches.append(list(reader.read(plan.batches(epoch, 0))))
        assert len(batches[0]) == 2
        for a, b in zip(*batches, strict=True):
            assert torch.equal(a[0], b[0])
            assert torch.equal(a[1], b[1])


@pytest.mark.law
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("training", [True, False])
def test_batches_are_those_of_the_folder_to_the_bit(packed, training, workers):
    one, other = (dataset(root, training=training) for root in packed)
    assert_same_batches(one, other, workers)
    assert [one.label(i) for i in range(7)] == [other.label(i) for i in range(7)]
    assert [one.length(i) for i in range(7)] == [other.length(i) for i in range(7)] == LENGTHS
    assert all(map(torch.equal, one.read(3, 4000), other.read(3, 4000)))


@pytest.mark.law
def test_a_tar_is_a_tar(packed):
    _, out = packed
    names = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
    assert [len(part) for part in names] == [6, 6, 2]
    assert names[2] == ["sample_00006.mix.flac", "sample_00006.target.flac"]
    for row in np.load(out / "index.npy"):
        with tarfile.open(out / f"shard-{row['shard']:05}.tar") as tar:
            entry = tar.getmember(f"{row['name'].decode()}.mix.flac")
            assert (entry.offset_data, entry.size) == (row["offset"], row["mix"])


@pytest.mark.law
def test_parts_write_the_bytes_of_one_machine(packed, tmp_path):
    folder, out = packed
    for part in ("3/3", "1/3"):
        pack_folder(folder, tmp_path / "parts", clips=3, part=part)
        assert not (tmp_path / "parts" / "index.npy").exists()
    pack_folder(folder, tmp_path / "parts", clips=3, part="2/3", processes=2)
    assert content(out) == content(tmp_path / "parts")
    for wrong in ("0/3", "4/3", "1", "a/b", "1/0"):
        refused(lambda part=wrong: pack_folder(folder, tmp_path / "wrong", part=part), "--part")
    refused(lambda: pack_folder(folder, tmp_path / "parts", clips=4), "a_shard 3, not 4")


@pytest.mark.law
def test_a_build_in_parts_or_shards_is_the_build(sources, tmp_path):
    options = {"train": 5, "valid": 3, "seconds": 0.25}
    build_dnlm(*sources, tmp_path / "whole", **options)
    for part in ("2/3", "3/3", "1/3"):
        build_dnlm(*sources, tmp_path / "parts", part=part, **options)
        build_shards(*sources, tmp_path / "direct", clips=2, part=part, **options)
    assert content(tmp_path / "whole") == content(tmp_path / "parts")
    pack_folder(tmp_path / "whole", tmp_path / "packed", clips=2)
    direct = content(tmp_path / "direct")
    del direct["build.json"]
    assert direct == content(tmp_path / "packed")
    assert json.loads(direct["train/metadata.json"])["train"][0]["id"] == "sample_00000"


@pytest.mark.law
def test_other_bits_keep_24_and_other_layouts_are_packed(tmp_path):
    for i, name in enumerate(("b/x.wav", "b/x.v2.wav", "a.wav")):
        for folder in ("noisy", "clean"):
            save(tmp_path / "in" / folder / name, noise_wave(i, 2000), subtype="FLOAT")
    out = pack_folder(tmp_path / "in", tmp_path / "out")
    one, other = dataset(tmp_path / "in", kind=2), dataset(out)
    assert [other.label(i) for i in range(3)] == ["a.wav", "b/x.v2.wav", "b/x.wav"]
    assert max(float((a - b).abs().max()) for a, b in zip(one[0], other[0], strict=True)) <= 2**-24
    for empty in ("noisy", "clean"):
        shutil.rmtree(tmp_path / "in" / empty)
    refused(lambda: pack_folder(tmp_path / "in", tmp_path / "other"), "holds no pairs")


@pytest.mark.law
def test_remote_shards_and_a_cache_that_holds_its_limit(packed, asked, tmp_path):
    folder, out = packed
    index = np.load(out / "index.npy")
    sizes = (index["start"] + index["target"]).tolist()
    where = f"data.cache_path={tmp_path / 'cache'}"
    limit = f"data.cache_gb={sum(sizes[:4]) / 1e9}"
    other = dataset("memory://bucket", where, limit)
    assert_same_batches(dataset(folder), other)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.stat().st_size == sum(sizes[:4])
    asked.clear()
    other.fetch(range(7))
    assert [len(paths) for paths in asked] == [3]
    kept.write_bytes(kept.read_bytes()[:-100])  # a write that a kill cut off
    again = dataset("memory://bucket", where, limit)
    assert_same_batches(dataset(folder), again)
    none = dataset("memory://bucket", where, "data.cache_gb=0")
    assert none.fetch([1, 1]) == other.fetch([1, 1])


@pytest.mark.law
@pytest.mark.parametrize("how", ["gone", "short", "a flipped bit"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_an_object_is_one_line_with_its_name(remote, tmp_path, how, workers):
    found = dataset("memory://bucket", f"data.cache_path={tmp_path}")
    path = "/bucket/shard-00001.tar"
    spoilt = bytearray(remote.store[path].getvalue())
    spoilt[512 + 99] ^= 1
    if how == "gone":
        del remote.store[path]
    else:
        remote.pipe(path, bytes(spoilt[:700] if how == "short" else spoilt))
    reader = ClipReader(found, workers).read([[0, 1], [2, 3], [5]])
    next(reader)
    with pytest.raises(DataError, match=r"^memory://bucket/shard-00001\.tar:.*_00003") as caught:
        next(reader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "lasts", "tries"),
    [
        (PermissionError("Forbidden"), True, 1),
        (TimeoutError("the line is dead"), True, 3),
        (ConnectionError("reset"), False, 2),
    ],
)
def test_what_may_pass_is_tried_again(remote, asked, tmp_path, monkeypatch, error, lasts, tries):
    found = dataset("memory://bucket", f"data.cache_path={tmp_path}")
    fetch = type(remote).cat_ranges

    def answer(self, paths, *args, **options):
        answers = fetch(self, paths, *args, **options)
        return [error] * len(paths) if lasts or len(asked) == 1 else answers

    monkeypatch.setattr(type(remote), "cat_ranges", answer)
    if lasts:
        refused(lambda: found.prefetch([0, 1]), error)
    else:
        found.prefetch([0, 1])
    assert len(asked) == tries


def test_wrong_addresses(remote, packed):
    for url in ("memory://nowhere", "nonsense://bucket"):
        refused(lambda url=url: dataset(url), f"{url}/index.npy")
    refused(lambda: dataset(packed[1], "audio.sample_rate=8000"), "16000 Hz", "audio.sample_rate")
    (packed[1] / "index.npy").write_bytes(b"\x93NUMPY")
    refused(lambda: dataset(packed[1]), "index.npy cannot be read")
