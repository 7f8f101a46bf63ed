"""JupyterLab and Chromium for the tests of this folder; without a browser they are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from recipes.demo.demo_set import build_demo
from tests.browser.page import HEIGHT, WIDTH, NotebookPage, find_chromium
from tests.browser.server import LabServer
from tests.notebook.cells import DEMO

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server "
    "--use-fake-device-for-media-stream --use-fake-ui-for-media-stream"
)


# Of this folder only: while Playwright runs, no other event loop can run in its thread.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    reason = "the browser tests are left out: no Playwright here (pip install -e '.[dev]')"
    api = pytest.importorskip("playwright.sync_api", reason=reason)
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("the browser tests are left out: no Chromium here (apt-get install chromium)")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=_FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    build_demo(DEMO)
    server = LabServer(tmp_path_factory.mktemp("lab"))
    try:
        server.wait()
        yield server
    finally:
        server.stop()


@pytest.fixture(scope="module")
def open_notebook(browser: Browser, server: LabServer) -> Iterator[Callable[[str], NotebookPage]]:
    """Opens a notebook by its file's name, in place of the one before; its kernel ends with it."""
    context = browser.new_context(viewport={"width": WIDTH, "height": HEIGHT})

    def end() -> None:
        for page in context.pages:
            page.close()
        server.end_kernels()

    def open_next(name: str) -> NotebookPage:
        end()
        return NotebookPage(context.new_page(), server, name)

    yield open_next
    end()
    context.close()
