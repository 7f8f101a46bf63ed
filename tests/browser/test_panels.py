"""Sliders, lists and buttons, moved as a hand moves them; the picture must follow."""

import pytest

from tests.notebook.cells import find

pytestmark = [pytest.mark.browser, pytest.mark.timeout(1200)]


def test_buffer_explorer_every_slider_changes_the_picture(open_notebook):
    page = open_notebook(find("stft").name)
    page.run_all()
    page.screenshot()
    assert not page.problems()
    sliders = page.sliders()
    assert len(sliders) >= 5, "buffer_size, n_fft, hop_length, t_eps, t_max"
    for slider in sliders:
        picture = page.picture_beside(slider)
        before = page.pixels(picture)
        page.nudge(slider)
        page.wait_changed(picture, before, "a slider")
    page.screenshot("_moved")
    assert not page.problems()


def test_step_debugger(open_notebook):
    page = open_notebook(find("one_step").name)
    page.run_all()
    page.screenshot()
    assert not page.problems()
    panel = page.panel_with(".diffbuf-step-once")
    picture = panel.locator("img.diffbuf-picture")
    step = panel.locator(".diffbuf-step")

    for button, expected in (("back", "step 0"), ("step-once", "step 1"), ("run-ten", "step 11")):
        before = page.pixels(picture)
        panel.locator(f".diffbuf-{button}").click()
        page.wait_until(lambda text=expected: step.inner_text() == text, expected)
        page.wait_changed(picture, before, button)
    for stage in ("sigma", "mix"):
        before = page.pixels(picture)
        panel.locator(".diffbuf-stage select").select_option(stage)
        page.wait_changed(picture, before, stage)
    assert panel.locator("audio").first.evaluate("sound => sound.duration") > 0
    page.screenshot("_stepped")
    assert not page.problems()
