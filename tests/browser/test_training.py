"""The training panel: Start, Pause, Resume, Stop, and a page that is loaded again meanwhile."""

import re

import pytest
import torch

from tests.browser.page import SCREENSHOTS
from tests.notebook.cells import find

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]


class TrainingPanel:
    """The last training panel of the notebook, through its buttons and labels."""

    def __init__(self, page):
        self.page = page
        self.box = page.panel_with(".diffbuf-start")

    @property
    def step(self):
        return int(re.search(r"\d+", self.box.locator(".diffbuf-step").inner_text())[0])

    @property
    def status(self):
        return self.box.locator(".diffbuf-status").inner_text()

    def click(self, name):
        self.box.locator(f".diffbuf-{name}").click()

    def wait_status(self, word):
        self.page.wait_until(lambda: self.status.startswith(word), f"the status {word}")

    def wait_steps(self, more):
        goal = self.step + more
        self.page.wait_until(lambda: self.step >= goal, f"step {goal}")

    def stands_still(self):
        """Whether no step is shown to be made any more."""
        before = self.step
        self.page.page.wait_for_timeout(1200)
        return self.step == before


@pytest.fixture(scope="module")
def page(open_notebook):
    page = open_notebook(find("training_loop").name)
    page.run_all()
    page.screenshot()
    return page


@pytest.fixture
def panel(page):
    """The panel, running; a test ends it with Stop."""
    panel = TrainingPanel(page)
    panel.click("start")
    panel.wait_status("running")
    panel.wait_steps(5)
    return panel


def test_start_pause_resume_stop(panel, server):
    picture = panel.box.locator("img.diffbuf-picture")
    before = panel.page.pixels(picture)
    panel.wait_steps(20)
    panel.page.wait_changed(picture, before, "20 steps")

    panel.click("pause")
    panel.wait_status("paused")
    assert panel.stands_still(), "steps are made during the pause"
    panel.page.screenshot("_paused")
    panel.box.screenshot(path=SCREENSHOTS / "training_panel.png")

    panel.click("resume")
    panel.wait_steps(5)
    panel.click("stop")
    panel.wait_status("stopped")
    runs = server.folder.glob("results/**/last.pt")
    newest = max(runs, key=lambda path: path.stat().st_mtime)
    saved = torch.load(newest, weights_only=False)
    assert saved["step"] == panel.step, "the checkpoint is not of the step that is shown"

    panel.click("start")
    panel.wait_steps(5)
    panel.click("stop")
    panel.wait_status("stopped")
    assert not panel.page.problems()


def test_page_reload_finds_the_run_going_on(panel):
    page = panel.page
    page.save()
    before = panel.step
    page.page.reload()
    page.wait_connected()
    panel = TrainingPanel(page)
    page.wait_until(lambda: panel.step > before, "the run goes on after the reload")
    panel.click("stop")
    panel.wait_status("stopped")
    assert panel.stands_still()
    page.screenshot("_reloaded")
