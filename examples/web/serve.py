"""Serve the page on loopback: python examples/web/serve.py [MODEL or exported folder].

The first time, npm fetches onnxruntime-web, and the model is exported in about a minute.
"""

from __future__ import annotations

import subprocess
import sys
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from diffbuf_lib.cli import main as diffbuf

HERE = Path(__file__).parent
RUNTIME = HERE / "node_modules" / "onnxruntime-web"


class Handler(SimpleHTTPRequestHandler):
    """This folder, with an exported model as model/."""

    extensions_map = SimpleHTTPRequestHandler.extensions_map | {
        ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm",
    }  # fmt: skip

    def __init__(self, *args: object, model: Path, **options: object) -> None:
        self.model = model
        super().__init__(*args, directory=str(HERE), **options)  # type: ignore[arg-type]

    def translate_path(self, path: str) -> str:
        """Return the file of an address."""
        found = Path(super().translate_path(path))
        inside = found.relative_to(HERE)
        return str(
            self.model.joinpath(*inside.parts[1:]) if inside.parts[:1] == ("model",) else found
        )

    def log_message(self, *args: object) -> None:
        """Keep still."""


def make_server(model: Path, port: int = 0) -> ThreadingHTTPServer:
    """Return a server on loopback, port 0 for any; the caller runs it."""
    return ThreadingHTTPServer(("127.0.0.1", port), partial(Handler, model=model))


def fetch_runtime() -> None:
    """Install onnxruntime-web beside the page."""
    command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
    subprocess.run(command, cwd=HERE, check=True)


def main() -> None:
    """Fetch the runtime, export the model, serve."""
    source = sys.argv[1] if sys.argv[1:] else "diffbuf/cpu-demo"
    if not RUNTIME.is_dir():
        print("npm install: onnxruntime-web ...")
        fetch_runtime()
    folder = Path(source)
    if not (folder / "hop.onnx").is_file():
        folder = Path("results") / "web" / source.replace("/", "-")
    if not (folder / "hop.onnx").is_file():
        print(f"diffbuf export {source} -o {folder} ...")
        diffbuf(["export", source, "-o", str(folder)])
    server = make_server(folder.resolve(), 8123)
    print(f"http://127.0.0.1:{server.server_port}/ until Ctrl-C")
    server.serve_forever()


if __name__ == "__main__":
    main()
