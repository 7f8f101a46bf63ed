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

    def click_and_look(button, expected):
        before = page.pixels(picture)
        panel.locator(button).click()
        page.wait_until(lambda: step.inner_text() == f"step {expected}", f"step {expected}")
        page.wait_changed(picture, before, button)

    click_and_look(".diffbuf-back", 0)
    click_and_look(".diffbuf-step-once", 1)
    click_and_look(".diffbuf-run-ten", 11)
    click_and_look(".diffbuf-step-once", 12)
    stages = panel.locator(".diffbuf-stage select")
    for stage in ("mix", "t", "sigma", "score", "loss", "S"):
        before = page.pixels(picture)
        stages.select_option(stage)
        page.wait_changed(picture, before, stage)
    assert panel.locator("audio").first.evaluate("sound => sound.duration") > 0
    page.screenshot("_stepped")
    assert not page.problems()
