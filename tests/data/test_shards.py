"""Shards give the clips of the folder they were made of, or one line that names the object."""

import json
import shutil
import tarfile
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.data import build_dnlm, open_dataset, pack_folder, shards
from diffbuf_lib.data.pack import build_shards
from diffbuf_lib.errors import ConfigError, DataError
from diffbuf_lib.training.feed import ClipReader, EpochPlan
from tests.data.conftest import noise_wave, save

CHANGES = ["audio.chunk_size=1600", "diffusion_buffer.buffer_size=4", "audio.stft.hop_length=32",
           "audio.stft.n_fft=62", "audio.stft.win_length=62"]  # fmt: skip
LENGTHS = [900, 1600, 3001, 5000, 1700, 2500, 1600]


def dataset(root, *overrides, training=True, kind=1):
    cfg = build_config({}, [*CHANGES, *overrides])
    return open_dataset(kind, root, cfg, training=training)


def content(folder):
    files = (path for path in Path(folder).rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}


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
    for path in packed[1].iterdir():
        system.pipe(f"/bucket/{path.name}", path.read_bytes())
    monkeypatch.setattr(shards, "_WAITS", (0.0, 0.0))
    yield system
    system.store.clear()


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
    for a, b in zip(one.read(3, 4000), other.read(3, 4000), strict=True):
        assert torch.equal(a, b)


@pytest.mark.law
def test_a_tar_is_a_tar(packed):
    _, out = packed
    names = []
    for path in sorted(out.glob("*.tar")):
        with tarfile.open(path) as tar:
            names.append(tar.getnames())
    assert [len(part) for part in names] == [6, 6, 2]
    assert names[2] == ["sample_00006.mix.flac", "sample_00006.target.flac"]
    index = np.load(out / "index.npy")
    for row in index:
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
        with pytest.raises(ConfigError, match="--part"):
            pack_folder(folder, tmp_path / "wrong", part=wrong)
    with pytest.raises(DataError, match="a_shard 3, not 4"):
        pack_folder(folder, tmp_path / "parts", clips=4)


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
    with pytest.raises(DataError, match="holds no pairs"):
        pack_folder(tmp_path / "in", tmp_path / "other")


@pytest.mark.law
def test_remote_shards_and_a_cache_that_holds_its_limit(packed, remote, tmp_path, monkeypatch):
    folder, out = packed
    index = np.load(out / "index.npy")
    sizes = (index["start"] + index["target"]).tolist()
    where = f"data.cache_path={tmp_path / 'cache'}"
    limit = f"data.cache_gb={sum(sizes[:4]) / 1e9}"
    other = dataset("memory://bucket", where, limit)
    assert_same_batches(dataset(folder), other)
    (kept,) = (tmp_path / "cache").iterdir()
    assert kept.stat().st_size == sum(sizes[:4])
    asked = []
    fetch = type(remote).cat_ranges

    def counted(self, paths, *args, **options):
        asked.extend(paths)
        return fetch(self, paths, *args, **options)

    monkeypatch.setattr(type(remote), "cat_ranges", counted)
    other.fetch(range(7))
    assert len(asked) == 3
    kept.write_bytes(kept.read_bytes()[:-100])  # a write that a kill cut off
    again = dataset("memory://bucket", where, limit)
    assert_same_batches(dataset(folder), again)
    none = dataset("memory://bucket", where, "data.cache_gb=0")
    assert none.fetch([1, 1]) == other.fetch([1, 1])


def damage(system, how):
    path = "/bucket/shard-00001.tar"
    data = system.store[path]
    if how == "gone":
        del system.store[path]
    elif how == "short":
        system.pipe(path, data.getvalue()[:700])
    else:
        spoilt = bytearray(data.getvalue())
        spoilt[512 + 99] ^= 1
        system.pipe(path, bytes(spoilt))


@pytest.mark.law
@pytest.mark.parametrize("how", ["gone", "short", "a flipped bit"])
@pytest.mark.parametrize("workers", [0, 1])
def test_what_is_wrong_with_an_object_is_one_line_with_its_name(remote, tmp_path, how, workers):
    found = dataset("memory://bucket", f"data.cache_path={tmp_path}")
    damage(remote, how)
    reader = ClipReader(found, workers).read([[0, 1], [2, 3], [5]])
    next(reader)
    name = r"^memory://bucket/shard-00001\.tar:sample_00003"
    with pytest.raises(DataError, match=name) as caught:
        next(reader)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("error", "tries", "match"),
    [
        (PermissionError("Forbidden"), 1, "credentials"),
        (TimeoutError("the line is dead"), 3, "TimeoutError: the line is dead"),
        (None, 2, None),
    ],
)
def test_what_may_pass_is_tried_again(remote, tmp_path, monkeypatch, error, tries, match):
    found = dataset("memory://bucket", f"data.cache_path={tmp_path}")
    fetch, asked = type(remote).cat_ranges, []

    def answer(self, paths, *args, **options):
        asked.append(paths)
        if error or len(asked) == 1:
            return [error or ConnectionError("reset")] * len(paths)
        return fetch(self, paths, *args, **options)

    monkeypatch.setattr(type(remote), "cat_ranges", answer)
    if error:
        with pytest.raises(DataError, match=match):
            found.prefetch([0, 1])
    else:
        found.prefetch([0, 1])
    assert len(asked) == tries
    assert all(len(a) >= len(b) for a, b in pairwise(asked))


def test_wrong_addresses(remote, packed, tmp_path):
    for url, match in (
        ("memory://nowhere", r"memory://nowhere/index\.npy is not there"),
        ("nonsense://bucket", "nonsense://bucket"),
    ):
        with pytest.raises(DataError, match=match):
            dataset(url)
    with pytest.raises(DataError, match=r"16000 Hz but audio\.sample_rate is 8000"):
        dataset(packed[1], "audio.sample_rate=8000")
    (packed[1] / "index.npy").write_bytes(b"\x93NUMPY")
    with pytest.raises(DataError, match=r"index\.npy cannot be read"):
        dataset(packed[1])


def test_a_terabyte_of_clips_opens_in_no_time_and_plans_for_8_processes(tmp_path, monkeypatch):
    """Only the index: 500,000 clips of 2 MB, whose cache keeps what its limit allows."""
    count, size = 500_000, 2_000_000
    index = np.zeros(count, shards.row_type(14))
    number = np.arange(count)
    index["shard"], index["offset"], index["rate"] = number // 1000, number % 1000 * size, 16000
    index["mix"], index["start"], index["target"] = size // 2, size // 2, size // 2
    np.save(tmp_path / "index.npy", index)
    monkeypatch.setattr(shards, "_download", lambda where: (tmp_path / "index.npy").read_bytes())
    found = dataset("s3://bucket/big", "data.cache_gb=100")
    assert len(found) == count
    assert found._cached == 50_000
    plans = [EpochPlan(len(found), 16, 1, 8, seed=0).batches(0, rank) for rank in range(8)]
    seen = {clip for batches in plans for batch in batches for clip in batch}
    assert len(seen) == count // 128 * 128
