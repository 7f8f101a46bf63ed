"""One notebook in JupyterLab in Chromium: what a reader does there, and what they see."""

from __future__ import annotations

import shutil
import subprocess
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from tests.browser.server import START, LabServer
from tests.notebook.cells import ROOT

if TYPE_CHECKING:
    from playwright.sync_api import Locator, Page

SCREENSHOTS = ROOT / "results" / "browser"
WIDTH, HEIGHT = 1366, 900  # px, of a small laptop
_RUN = 600.0  # s for a whole notebook, on a busy machine
_TALLEST = 16000  # px; Chromium draws no taller page into one picture

# "" once nothing runs any more; else what the page waits for. A cell without a number was not run.
_UNFINISHED = """() => {
    const prompts = [...document.querySelectorAll('.jp-CodeCell .jp-InputArea-prompt')];
    const waiting = prompts.filter(p => !/\\[\\d+\\]/.test(p.textContent)).length;
    const status = document.querySelector('.jp-Notebook-ExecutionIndicator')?.dataset.status;
    return status === 'idle' && waiting === 0 ? '' : `${waiting} cells left, kernel ${status}`;
}"""
_OUTPUT = ".jp-OutputArea-output"
_ERRORS = (
    '[data-mime-type="application/vnd.jupyter.error"], '
    '[data-mime-type="application/vnd.jupyter.stderr"], .jupyter-widgets-error-widget'
)
_NOTEBOOK_HEIGHT = "() => document.querySelector('.jp-WindowedPanel-inner').scrollHeight"
_SCROLL_UP = "() => { document.querySelector('.jp-WindowedPanel-outer').scrollTop = 0; }"
_PIXELS = """image => {
    const canvas = document.createElement('canvas');
    canvas.width = image.naturalWidth;
    canvas.height = image.naturalHeight;
    canvas.getContext('2d').drawImage(image, 0, 0);
    return canvas.toDataURL();
}"""
# Outputs that are wider than the room the page gives them, each with its text's start.
_TOO_WIDE = """() => [...document.querySelectorAll('.jp-OutputArea, .jp-OutputArea *')]
    .filter(e => e.scrollWidth > e.clientWidth + 1 && getComputedStyle(e).overflowX !== 'visible')
    .map(e => `${e.scrollWidth} px wide in ${e.clientWidth}: ${e.textContent.slice(0, 60)}`)"""
# Pictures that did not load; those that are hidden need not.
_BROKEN = """() => [...document.querySelectorAll('.jp-OutputArea img')]
    .filter(image => image.naturalWidth === 0 && image.offsetParent !== null)
    .map(image => `a picture that did not load: ${image.src.slice(0, 60)}`)"""


def find_chromium() -> str | None:
    """The browser's path, under any of the names it is installed by, if it runs."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        path = shutil.which(name)
        # Ubuntu's chromium-browser may be a script that only asks to install a snap.
        if path and subprocess.run([path, "--version"], capture_output=True).returncode == 0:
            return path
    return None


class NotebookPage:
    """One notebook, by its file's name, open in JupyterLab."""

    def __init__(self, page: Page, server: LabServer, name: str) -> None:
        self.page, self.server, self.name = page, server, name
        page.set_default_timeout(60_000)
        # Signs in: the answer sets the cookie that the page's own requests carry.
        page.context.request.get(f"{server.url}/lab?token={server.token}")
        page.goto(
            f"{server.url}/lab/workspaces/auto-{uuid.uuid4().hex}/tree/notebooks/{name}?reset"
        )
        self.wait_connected()

    def wait_connected(self) -> None:
        """Return once the kernel is connected: before that, Run All loses cells."""
        idle = self.page.locator('#jp-main-statusbar :text("| Idle")').first
        idle.wait_for(timeout=START * 1000)

    def run_all(self) -> None:
        """Choose Run > Run All Cells, and return when every cell has run or one has failed."""
        self.page.get_by_role("menuitem", name="Run", exact=True).click()
        self.page.locator('[data-command="runmenu:run-all"]').click()
        deadline = time.monotonic() + _RUN
        while left := self.page.evaluate(_UNFINISHED):
            assert not self.errors(), self.errors()
            assert time.monotonic() < deadline, f"{self.name} after {_RUN:.0f} s: {left}"
            self.page.wait_for_timeout(250)

    def errors(self) -> list[str]:
        """The text of every traceback, of everything on stderr, and of widgets that broke."""
        texts: list[str] = self.page.locator(_ERRORS).all_inner_texts()
        return texts

    def wait_until(self, reached: Callable[[], bool], what: str, seconds: float = 60) -> None:
        """Return once something holds; fails with `what` after a time in s."""
        deadline = time.monotonic() + seconds
        while not reached():
            assert time.monotonic() < deadline, f"{self.name}: waited {seconds:.0f} s for: {what}"
            self.page.wait_for_timeout(100)

    def problems(self) -> list[str]:
        """Errors, pictures that did not load, and outputs that the page cuts off at the right."""
        return [*self.errors(), *self.page.evaluate(_BROKEN), *self.page.evaluate(_TOO_WIDE)]

    def pixels(self, picture: Locator) -> str:
        """What a picture shows now, as comparable text."""
        return str(picture.evaluate(_PIXELS))

    def wait_changed(self, picture: Locator, before: str, what: str) -> None:
        """Return once a picture shows something else than `before`, with what made it do so."""
        self.wait_until(lambda: self.pixels(picture) != before, f"a new picture after {what}")

    def panel_with(self, control: str) -> Locator:
        """The last output that holds a control, by its CSS class."""
        outputs = self.page.locator(_OUTPUT)
        return outputs.filter(has=self.page.locator(control)).last

    def sliders(self) -> list[Locator]:
        """The handle of every slider below a cell."""
        return self.page.locator(f"{_OUTPUT} .widget-slider .noUi-handle").all()

    def picture_beside(self, control: Locator) -> Locator:
        """The picture of the panel that a control belongs to."""
        panel = control.locator(f"xpath=ancestor::*[contains(@class, '{_OUTPUT[1:]}')][1]")
        return panel.locator("img.widget-image").last

    def nudge(self, slider: Locator) -> None:
        """Move a slider by one key press: up, or down from its highest value."""
        value, highest = (
            float(slider.get_attribute(name) or 0) for name in ("aria-valuenow", "aria-valuemax")
        )
        slider.focus()
        self.page.keyboard.press("ArrowRight" if value < highest else "ArrowLeft")

    def save(self) -> None:
        """Save the notebook, outputs included."""
        self.page.locator(".jp-Notebook").first.click(position={"x": 5, "y": 5})
        self.page.keyboard.press("Escape")
        self.page.keyboard.press("Control+s")
        self.page.locator(".jp-mod-current.jp-mod-dirty").first.wait_for(state="detached")

    def screenshot(self, suffix: str = "") -> Path:
        """Keep a picture of the notebook from its first cell to its last."""
        SCREENSHOTS.mkdir(parents=True, exist_ok=True)
        path = SCREENSHOTS / f"{Path(self.name).stem}{suffix}.png"
        tall = self.page.evaluate(_NOTEBOOK_HEIGHT)
        self.page.set_viewport_size({"width": WIDTH, "height": min(int(tall) + 200, _TALLEST)})
        self.page.wait_for_timeout(500)  # until the page has settled in its new size
        self.page.evaluate(_SCROLL_UP)
        self.page.screenshot(path=path)
        self.page.set_viewport_size({"width": WIDTH, "height": HEIGHT})
        return path
