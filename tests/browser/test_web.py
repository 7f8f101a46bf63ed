"""The web page cleans a file as run.py does; without npm it is left out."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib.config import build_config
from diffbuf_lib.export import export_model
from tests.browser.page import HEIGHT, WIDTH
from tests.conftest import TINY, make_model

pytestmark = pytest.mark.browser
WEB = Path(__file__).parents[2] / "examples" / "web"


def imported(path, name):
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, path)
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An exported model that is small, but cuts its frames as the bundled one does."""
    stft = "audio.stft={n_fft: 510, win_length: 510, hop_length: 256}"
    network = "model={name: block_causal, base_channels: 8, channel_multipliers: [1, 2]}"
    data = ["training.loss=data_prediction", "audio.chunk_size=16000"]
    model = make_model(build_config(TINY, [stft, network, *data])).eval()
    return export_model(model, tmp_path_factory.mktemp("exported")).folder


@pytest.fixture
def page(browser, folder):
    web = imported(WEB / "serve.py", "serve_web")
    if not web.RUNTIME.is_dir():
        if shutil.which("npm") is None:
            pytest.skip("the web page is left out: no npm here to fetch onnxruntime-web")
        try:
            web.fetch_runtime()
        except subprocess.CalledProcessError:
            pytest.skip("the web page is left out: npm could not fetch onnxruntime-web")
    server = web.make_server(folder)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
    page.set_default_timeout(60_000)
    page.goto(f"http://127.0.0.1:{server.server_port}/")
    page.get_by_text("Ready: 16000 Hz").wait_for()
    yield page
    page.close()
    server.shutdown()
    server.server_close()


def test_a_file_is_cleaned_heard_and_seen(page, tmp_path):
    signal = 0.1 * np.random.default_rng(0).standard_normal((16000, 2))
    soundfile.write(tmp_path / "noisy.flac", signal, 32000)
    page.set_input_files("#file", tmp_path / "noisy.flac")
    page.get_by_text("real-time factor").wait_for()
    assert page.locator("#status").inner_text().startswith("0.5 s in")
    for which in ("before", "after"):
        seconds = page.locator(f"#play-{which}").evaluate(
            "a => new Promise(done => a.duration ? done(a.duration)"
            " : a.addEventListener('loadedmetadata', () => done(a.duration)))"
        )
        assert seconds == pytest.approx(0.5, abs=1e-3)
        size = page.locator(f"#{which}").evaluate("c => [c.width, c.height]")
        assert size == [(8000 - 510) // 256 + 1, 256]
    shot = Path("results") / "web.png"
    shot.parent.mkdir(exist_ok=True)
    page.screenshot(path=shot, full_page=True)
    page.set_input_files("#file", Path(__file__))
    page.get_by_text("could not be enhanced").wait_for()


def test_the_microphone_is_cleaned_while_it_records(page):
    """Chromium's own one beeps."""
    page.check("#listen")
    page.click("text=Use the microphone")
    page.get_by_text("Recording: 1 s").wait_for()
    page.click("text=Stop")
    page.get_by_text("on one thread of this browser").wait_for()
    lengths = [
        page.locator(f"#play-{which}").evaluate(
            "a => fetch(a.src).then(r => r.blob()).then(b => b.size)"
        )
        for which in ("before", "after")
    ]
    assert lengths[0] == lengths[1] > 44 + 2 * 8000
    pixels = "c.getContext('2d').getImageData(0, 0, c.width, c.height).data"
    heard = page.locator("#before").evaluate(f"c => {pixels}.some((x, i) => i % 4 < 3 && x > 100)")
    assert heard, "it was silence"
    page.get_by_text("Use the microphone").wait_for()


@pytest.mark.law
def test_the_page_gives_the_samples_of_the_script(page, folder):
    """Without noise, since the page draws its own."""
    script = imported(folder / "run.py", "exported_run")
    script.Stream.noise = lambda self, frames: np.zeros((1, 256, frames, 2), np.float32)
    signal = 0.1 * torch.randn(1, 3001, generator=torch.Generator().manual_seed(0)).numpy()
    stream = script.Stream(folder)
    expected = np.concatenate([stream.push(signal), stream.flush()], axis=1)[0]
    found = page.evaluate(
        """async (samples) => {
            const { load, enhance } = await import("./stream.js");
            const silence = (count) => new Float32Array(count);
            const model = await load("model");
            return [...await enhance(model, Float32Array.from(samples), () => {}, silence)];
        }""",
        signal[0].tolist(),
    )
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
