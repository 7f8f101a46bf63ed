"""JupyterLab and Chromium for the tests of this folder; without a browser, one line says so."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import pytest

from diffbuf_lib.data import build_demo
from tests.browser.page import HEIGHT, WIDTH, NotebookPage, find_chromium
from tests.browser.server import ROOT, LabServer

if TYPE_CHECKING:
    from playwright.sync_api import Browser

_FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --no-proxy-server"
)


@pytest.hookimpl(trylast=True)  # after -m has chosen
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Without a browser keep one test, whose skip speaks for all: one line, not one a test."""
    ours = [item for item in items if item.get_closest_marker("browser")]
    missing = _missing() if ours else None
    if missing:
        ours[0].add_marker(pytest.mark.skip(reason=f"the browser tests are left out: {missing}"))
        config.hook.pytest_deselected(items=ours[1:])
        items[:] = [item for item in items if item not in ours[1:]]


def _missing() -> str | None:
    """What the tests lack, and how to get it."""
    if find_chromium() is None:
        return "no Chromium here (apt-get install chromium)"
    if importlib.util.find_spec("playwright") is None:
        return "no Playwright here (pip install -e '.[dev]')"
    return None


# Of this folder only: while Playwright runs, no other event loop can run in its thread.
@pytest.fixture(scope="package")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=_FLAGS.split())
        yield browser
        browser.close()


@pytest.fixture(scope="package")
def server(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LabServer]:
    build_demo(ROOT / "data" / "DN-LM-demo")
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
