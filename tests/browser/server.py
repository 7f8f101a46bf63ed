"""JupyterLab for the browser tests: on loopback, on copied notebooks, without user settings."""

from __future__ import annotations

import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

from tests.notebook.cells import DEMO, copy_workspace

START = 120.0  # s until a server or a kernel answers, on a busy machine

_SETTINGS = {
    "@jupyterlab/apputils-extension:notification": {"fetchNews": "false", "checkForUpdates": False},
    # Every cell is in the page, also those that are scrolled out of sight.
    "@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"},
}


class LabServer:
    """JupyterLab on loopback with a token, on a copy of the notebooks in an empty folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.token = secrets.token_hex(16)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        copy_workspace(folder)
        self.log = folder / "server.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [
                    *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root"),
                    *("--ip=127.0.0.1", f"--port={port}", "--ServerApp.port_retries=0"),
                    *(f"--IdentityProvider.token={self.token}", f"--ServerApp.root_dir={folder}"),
                ],
                cwd=folder,
                env=self._environment(),
                stdout=log,
                stderr=subprocess.STDOUT,
            )

    def _environment(self) -> dict[str, str]:
        settings = self.folder / "jupyter" / "settings"
        for plugin, values in _SETTINGS.items():
            extension, name = plugin.split(":")
            path = settings / extension / f"{name}.jupyterlab-settings"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))
        places = ("JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR")
        return {
            **os.environ,
            **{name: str(self.folder / "jupyter" / name.lower()) for name in places},
            "JUPYTERLAB_SETTINGS_DIR": str(settings),
            "JUPYTERLAB_WORKSPACES_DIR": str(self.folder / "jupyter" / "workspaces"),
            "DIFFBUF_DATA": str(DEMO),
            "PYTHONFAULTHANDLER": "1",
            # Server, browser and kernel share the cores: a second thread would wait for one.
            "OMP_NUM_THREADS": "1",
        }

    def wait(self) -> None:
        """Return once the server answers."""
        deadline = time.monotonic() + START
        while time.monotonic() < deadline and self.process.poll() is None:
            try:
                self.ask("GET", "/api/status")
            except OSError:
                time.sleep(0.2)
            else:
                return
        raise RuntimeError(f"JupyterLab did not start:\n{self.log.read_text()}")

    def ask(self, method: str, path: str) -> bytes:
        """Send a request to the server, past any proxy."""
        request = urllib.request.Request(self.url + path, method=method)
        request.add_header("Authorization", f"token {self.token}")
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with direct.open(request, timeout=30) as answer:
            body: bytes = answer.read()
        return body

    def end_kernels(self) -> None:
        """End every kernel, so that one notebook's threads do not slow the next one down."""
        for session in json.loads(self.ask("GET", "/api/sessions")):
            self.ask("DELETE", f"/api/sessions/{session['id']}")

    def stop(self) -> None:
        """End the server and its kernels."""
        self.process.terminate()
        self.process.wait(60)
