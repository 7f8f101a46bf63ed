"""The training panel: Start, Pause, Resume, Stop, and a page that is loaded again meanwhile."""

import re

import pytest
import torch

from tests.browser.page import SCREENSHOTS
from tests.notebook.cells import find

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]

PAUSE = 0.5  # s until the step count stands still, but for the step that is being made
# Clicks Pause; returns the step that is shown `after` ms later, and that shown at the end.
_PAUSE_AND_WATCH = """async ([panel, after, end]) => {
    const step = () => Number(/\\d+/.exec(panel.querySelector('.diffbuf-step').textContent)[0]);
    const sleep = ms => new Promise(resolve => setTimeout(resolve, ms));
    panel.querySelector('.diffbuf-pause').click();
    await sleep(after);
    const early = step();
    await sleep(end - after);
    return [early, step()];
}"""


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

    def pause_and_watch(self):
        """Returns the steps shown half a second after a click on Pause and two seconds later."""
        handle = self.box.element_handle()
        return self.page.page.evaluate(_PAUSE_AND_WATCH, [handle, 1000 * PAUSE, 2500])


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


def checkpoints(server):
    return sorted(server.folder.glob("results/**/last.pt"), key=lambda path: path.stat().st_mtime)


def test_start_pause_resume_stop(panel, server):
    picture = panel.box.locator("img.diffbuf-picture")
    before = panel.page.pixels(picture)
    panel.wait_steps(20)
    panel.page.wait_changed(picture, before, "20 steps")

    # Best of three: on a busy machine the page itself may be half a second late.
    late = []
    while len(late) < 3 and min(late, default=9) > 1:
        if late:
            panel.click("resume")
            panel.wait_steps(5)
        early, settled = panel.pause_and_watch()
        panel.wait_status("paused")
        late.append(settled - early)
    assert min(late) <= 1, f"steps made later than {PAUSE} s after Pause: {late}"
    panel.page.screenshot("_paused")
    panel.box.screenshot(path=SCREENSHOTS / "training_panel.png")

    panel.click("resume")
    panel.wait_steps(5)
    panel.click("stop")
    panel.wait_status("stopped")
    stopped = panel.step
    saved = torch.load(checkpoints(server)[-1], weights_only=False)
    assert saved["step"] == stopped, "the checkpoint is not of the step that is shown"

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
    stands = panel.step
    page.page.wait_for_timeout(1200)
    assert panel.step == stands
    page.screenshot("_reloaded")
