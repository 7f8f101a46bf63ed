"""Which model is taken, what is held out, and that delay, lag and latency are what they say."""

import base64
import io
import re
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch

from diffbuf_lib import OnlineEnhancer
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.live import LiveReport
from diffbuf_lib.notebook import listening, models, open_workbench, plots
from diffbuf_lib.notebook.listening import DelayScore
from diffbuf_lib.training import load_checkpoint
from diffbuf_lib.training.folder import ResultsFolder
from tests.conftest import make_model
from tests.notebook.folders import make_paired_folder


@pytest.fixture
def bench(tmp_path, monkeypatch):
    """A workbench on two-second pairs, with a project folder of its own."""
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.yaml").write_text(
        "audio: {chunk_size: 4000}\ndiffusion_buffer: {buffer_size: 4}\n"
    )
    monkeypatch.chdir(tmp_path)
    for name in ("DIFFBUF_DATA", "DIFFBUF_CONFIG"):
        monkeypatch.delenv(name, raising=False)
    data = make_paired_folder(tmp_path / "own", train=4, valid=2)
    return open_workbench("configs/tiny.yaml", data)


def data_model(tiny_cfg):
    return make_model(tiny_cfg.override("training.loss=data_prediction"))


def scored(mix, estimate):
    return SimpleNamespace(mix=mix, estimate=estimate)


# Which model.


def test_a_folder_is_loaded_as_it_is(bench, tiny_cfg):
    model = make_model(tiny_cfg)
    model.save_pretrained(bench.root / "results" / "run" / "model")
    found = models.find_model(bench, "results/run/model", bench.results / "07")
    assert not found.trained_here
    assert "results/run/model" in str(found)
    for ours, theirs in zip(model.parameters(), found.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert not found.model.training


def test_a_name_that_is_not_here_is_trained_instead(bench):
    """A second time in the same folder too, as when a notebook is run twice."""
    for _ in range(2):
        found = models.find_model(bench, "diffbuf/no-such-model", bench.results / "07", steps=2)
        assert found.trained_here
        assert "diffbuf/no-such-model is not on this machine" in found.source
        assert found.model.predicts_data
        assert found.model.cfg.audio == bench.cfg.audio


def test_none_trains_and_names_nothing(bench):
    found = models.find_model(bench, None, bench.results / "07", steps=1)
    assert found.source == "1 steps of training just now"


def test_a_small_dataset_does_not_make_epochs_of_one_step(bench):
    """Each epoch ends with a checkpoint, which takes longer than the step."""
    models.find_model(bench, None, bench.results / "07", steps=2)
    state = load_checkpoint(ResultsFolder(bench.results / "07").last)
    assert (state["step"], state["epoch"]) == (2, 0)


def test_a_folder_without_a_model_is_no_reason_to_train(bench):
    with pytest.raises(ConfigError, match=r"MODEL results/no/model holds no trained model"):
        models.find_model(bench, "results/no/model", bench.results / "07")


def test_a_model_of_another_rate_is_refused(bench, tiny_cfg):
    other = make_model(tiny_cfg.override("audio.sample_rate=8000"))
    other.save_pretrained(bench.root / "model8k")
    with pytest.raises(ConfigError, match=r"8000 Hz and audio.sample_rate is 16000 Hz"):
        models.find_model(bench, "model8k", bench.results / "07")


# Held-out clips.


def test_held_out_takes_valid_and_cuts_to_what_there_is(bench):
    half = listening.held_out(bench, bench.cfg, seconds=0.75)
    whole = listening.held_out(bench, bench.cfg, seconds=30)
    assert half.root.name == whole.root.name == "valid"
    assert half[0][0].shape == (1, 12000)
    assert whole[0][0].shape == (1, 32000), "clips of 2 s must not be padded to 30 s"


def test_held_out_prefers_test(bench):
    make_paired_folder(bench.data / "more", train=1, valid=1)
    (bench.data / "more" / "valid").rename(bench.data / "test")
    assert listening.held_out(bench, bench.cfg).root.name == "test"


# Players.


def test_players_hold_the_sound_at_one_peak():
    waves = {"loud <b>": torch.sin(torch.arange(800) / 7), "quiet": 0.01 * torch.ones(400)}
    html = listening.Players(waves, 8000)._repr_html_()
    sounds = [
        soundfile.read(io.BytesIO(base64.b64decode(each)))
        for each in re.findall(r"base64,([^\"]+)\"", html)
    ]
    assert [(len(wave), rate) for wave, rate in sounds] == [(800, 8000), (400, 8000)]
    for wave, _ in sounds:
        assert np.abs(wave).max() == pytest.approx(0.9, abs=1e-3)
    assert "<b>" not in html, "a caption is text"
    assert "(-1 dB)" in html
    assert "(+39 dB)" in html


def test_players_play_silence_and_nan():
    html = listening.Players({"bad": torch.tensor([float("nan"), 0.0])}, 8000)._repr_html_()
    wave, _ = soundfile.read(
        io.BytesIO(base64.b64decode(re.findall(r"base64,([^\"]+)\"", html)[0]))
    )
    assert not wave.any()


# Measures.


@pytest.mark.parametrize("shift", [0, 5, 256, -31])
def test_lag_is_found_under_a_hum_and_for_any_level(shift):
    generator = torch.Generator().manual_seed(0)
    hum = torch.sin(2 * torch.pi * 100 * torch.arange(8000) / 16000)
    clips = []
    for gain in (0.01, 3.0):
        mix = torch.randn(8000, generator=generator) + 3 * hum
        clips.append(scored(mix, gain * mix.roll(shift)))
    assert listening.lag_samples(clips) == shift


def test_noise_floor_is_that_of_the_pauses():
    wave = torch.cat([torch.ones(2560), 0.1 * torch.ones(2560)])
    assert listening.noise_floor(wave) == pytest.approx(0.01)


def test_measured_latency_is_counted_not_asked(tiny_cfg):
    """Of a stream whose first sample is withheld, one hop more."""
    enhancer = OnlineEnhancer(data_model(tiny_cfg))
    window, hop = 62, 32
    assert listening.measured_latency(enhancer) == window // 2 + 3 * hop
    enhancer.state.to_drop += 1
    enhancer.reset = lambda: None
    assert listening.measured_latency(enhancer) > enhancer.latency_samples
    assert listening.measured_latency(enhancer, limit=3) == 3


def test_metrics_that_are_not_defined_are_left_out():
    assert listening.usable_metrics(16000) == ["si_sdr", "estoi", "pesq"]
    assert listening.usable_metrics(44100) == ["si_sdr", "estoi"]
    assert listening.usable_metrics(16000, ["si_sdr", "no_such"]) == ["si_sdr"]


# Delay against quality.


def test_delay_settings_go_from_one_frame_to_all(tiny_cfg):
    settings = listening.delay_settings(data_model(tiny_cfg))
    assert settings == [(4, 1), (4, 2), (4, 3), (4, 4), (2, 2), (3, 3)]
    assert listening.delay_settings(make_model(tiny_cfg)) == [(4, 4), (2, 2), (3, 3)]
    one = tiny_cfg.override("diffusion_buffer.buffer_size=1")
    assert listening.delay_settings(make_model(one)) == [(1, 1)]


def test_delay_scores_are_those_of_the_stream(tiny_cfg, bench):
    model = data_model(tiny_cfg)
    dataset = listening.held_out(bench, model.cfg, seconds=0.5)
    rows = listening.delay_scores(model, dataset, [(4, 2), (2, 2)], ["si_sdr"], clips=2)
    assert [(row.buffer_size, row.delay, len(row.gains["si_sdr"])) for row in rows] == [
        (4, 2, 2), (2, 2, 2),
    ]  # fmt: skip
    assert rows[0].latency_ms == rows[1].latency_ms == pytest.approx(1000 * (31 + 32) / 16000)
    mix, target = (torch.stack([dataset[i][k][0] for i in range(2)]) for k in (0, 1))
    enhancer = OnlineEnhancer(model, seed=0, delay=2, batch=2)
    estimate = torch.cat([enhancer.push(mix), enhancer.flush()], dim=-1)
    gains = si_sdr(estimate, target) - si_sdr(mix, target)
    torch.testing.assert_close(rows[0].gains["si_sdr"], gains.float(), atol=1e-3, rtol=1e-3)


def si_sdr(estimate, target):
    """In dB, from its definition (Le Roux et al. 2019)."""
    estimate, target = estimate.double(), target.double()
    scale = (estimate * target).sum(-1, keepdim=True) / target.square().sum(-1, keepdim=True)
    wanted = scale * target
    return 10 * (wanted.square().sum(-1) / (estimate - wanted).square().sum(-1)).log10()


def test_another_buffer_has_the_same_weights(tiny_cfg):
    model = make_model(tiny_cfg)
    other = listening.with_buffer(model, 2)
    assert other.cfg.diffusion_buffer.buffer_size == 2
    assert model.cfg.diffusion_buffer.buffer_size == 4
    for ours, theirs in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert listening.with_buffer(model, 4) is model


# Figures.


def curve(axes, name):
    (found,) = (line for line in axes.get_lines() if line.get_label() == name)
    return list(found.get_xdata()), list(found.get_ydata())


def test_delay_quality_draws_means_over_defined_clips():
    nan = float("nan")
    scores = [
        DelayScore(8, 8, 120.0, {"si_sdr": torch.tensor([1.0, 3.0])}),
        DelayScore(8, 1, 16.0, {"si_sdr": torch.tensor([1.0, nan])}),
        DelayScore(4, 4, 60.0, {"si_sdr": torch.tensor([0.0, 1.0])}),
    ]
    (axes,) = plots.delay_quality(scores, ["si_sdr"]).axes
    assert curve(axes, "B = 8, delay d from 1 to B") == ([16.0, 120.0], [1.0, 2.0])
    assert curve(axes, "shorter buffers, d = B") == ([60.0, 120.0], [0.5, 2.0])
    assert axes.get_xlabel() == "latency (ms)"
    assert axes.get_ylabel() == "SI-SDR gain (dB)"


def test_frame_times_show_the_limit():
    report = LiveReport(
        hop_ms=16.0, frame_ms=(2.0, 4.0, 32.0), missed=1, latency_ms=100, realtime=False
    )
    course, spread = plots.frame_times(report).axes
    time, values = course.get_lines()[0].get_data()
    np.testing.assert_allclose(time, [0, 0.016, 0.032])
    np.testing.assert_allclose(values, report.frame_ms)
    assert list(course.get_lines()[1].get_ydata()) == [16.0, 16.0]
    assert sum(patch.get_width() for patch in spread.patches) == 3, "every hop is counted"
