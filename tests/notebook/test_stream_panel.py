"""The stream panel without a browser: what it puts out is the stream's, and its numbers too."""

import pytest
import torch

from diffbuf_lib import OnlineEnhancer
from diffbuf_lib.config import build_config
from diffbuf_lib.errors import ShapeError
from tests.conftest import TINY, make_model, seeded, stream
from walk.stream_panel import StreamPanel


@pytest.fixture
def model():
    return make_model(build_config(TINY, ["training.loss=data_prediction", "model.x0_output=mask"]))


def wave(samples=4000):
    return 0.1 * torch.randn(samples, generator=seeded(3))


@pytest.mark.law
def test_the_output_is_that_of_the_enhancer_also_when_started_again_with_another_delay(model):
    samples = wave()
    panel = StreamPanel(model, samples, realtime=False, seed=5)
    for delay in (model.cfg.diffusion_buffer.buffer_size, 1):
        before = panel.image.value
        panel.delay.value = delay
        panel.buttons["start"].click()
        assert panel.wait(timeout=60)
        expected = stream(OnlineEnhancer(model, seed=5, delay=delay), samples)
        torch.testing.assert_close(panel.output, expected)
        assert len(panel.report.frame_ms) == -(-len(samples) // model.cfg.audio.stft.hop_length)
        assert panel.image.value != before
        assert f"{panel.report.missed} hops late" in panel.status.value


def test_stop_gives_what_was_taken(model):
    """A minute in real time would outlast the test."""
    panel = StreamPanel(model, wave(60 * model.cfg.audio.sample_rate))
    panel.start()
    panel.wait_for(lambda: len(panel.report.frame_ms) > 5, timeout=60)
    assert panel.buttons["start"].disabled
    panel.stop()
    taken = len(panel.report.frame_ms) * model.cfg.audio.stft.hop_length
    assert len(panel.output) == taken < len(panel.wave)
    assert panel.buttons["stop"].disabled
    assert not panel.buttons["start"].disabled


def test_only_signals_are_streamed_and_a_score_model_has_one_delay(model):
    for shape in ((1, 100), (0,)):
        with pytest.raises(ShapeError):
            StreamPanel(model, torch.zeros(shape))
    scores = make_model(build_config(TINY))
    panel = StreamPanel(scores, wave(), realtime=False)
    assert panel.delay.min == panel.delay.max == scores.cfg.diffusion_buffer.buffer_size
