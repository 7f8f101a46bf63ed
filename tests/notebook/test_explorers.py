"""The explorers and the clip browser work without a browser, and say what they show."""

import pytest
import torch

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.sde import make_sde
from tests.conftest import seeded
from walk.explorers import BufferExplorer, ClipBrowser, SigmaExplorer, describe_snr

BUFFER_MOVES = {"buffer_size": 7, "n_fft": 126, "hop_length": 48, "t_eps": 0.1, "t_max": 0.5}
SIGMA_MOVES = {"value": 0.5, "k": 5.0, "t_eps": 1e-4, "t_max": 0.5}


class Clips(list):
    """A dataset in memory."""

    def name(self, i):
        return f"far/away/noisy/{i}.wav + far/away/clean/{i}.wav"


def waves(channels=1, samples=1600, seed=0):
    return 0.1 * torch.randn(channels, samples, generator=seeded(seed))


def explore(cfg):
    return BufferExplorer(cfg, waves(), waves(seed=1))


@pytest.mark.parametrize(("make", "moves"), [(explore, BUFFER_MOVES), (SigmaExplorer, SIGMA_MOVES)])
def test_moving_any_slider_and_back_changes_the_picture_and_back(tiny_cfg, make, moves):
    explorer = make(tiny_cfg)
    assert moves.keys() == explorer.sliders.keys()
    assert {"image/jpeg", "application/vnd.jupyter.widget-view+json"} <= set(explorer.bundle())
    for name, value in moves.items():
        before, start = explorer.image.value, explorer.sliders[name].value
        explorer.sliders[name].value = value
        assert explorer.cfg is not None
        assert explorer.image.value != before, name
        explorer.sliders[name].value = start
        assert explorer.image.value == before, name


def test_frames_and_latency_are_those_of_the_sliders(tiny_cfg):
    cfg = tiny_cfg.override("audio.stft.n_fft=64", "audio.stft.win_length=48")
    explorer = explore(cfg)
    explorer.sliders["n_fft"].value = 128
    assert explorer.cfg.audio.stft.win_length == 96, "the window keeps its share of n_fft"
    explorer.sliders["buffer_size"].value = 9
    text = " ".join(explorer.messages)
    for number in ("1600 samples", "51 STFT frames", "16 ms"):  # 1 + 1600 // 32; 8 hops of 2 ms
        assert number in text


@pytest.mark.parametrize(
    ("make", "name", "value"), [(explore, "buffer_size", 60), (SigmaExplorer, "t_max", 1.0)]
)
def test_values_that_contradict_each_other_show_the_error_and_can_be_taken_back(
    tiny_cfg, make, name, value
):
    explorer = make(tiny_cfg)
    first, start = explorer.image.value, explorer.sliders[name].value
    explorer.sliders[name].value = value
    assert explorer.cfg is None
    assert f"{name} {value}" in explorer.messages[0]
    explorer.sliders[name].value = start
    assert explorer.cfg is not None
    assert explorer.image.value == first


def test_sliders_hold_a_config_s_own_values_also_outside_their_usual_range(tiny_cfg):
    cfg = tiny_cfg.override(
        "audio.stft={n_fft: 1500, win_length: 1500, hop_length: 33}",
        "diffusion_buffer.t_eps=0.001",
        "diffusion_buffer.t_max=0.05",
    )
    values = [slider.value for slider in explore(cfg).sliders.values()]
    assert values == [4, 1500, 33, 0.001, 0.05]


@pytest.mark.law
def test_c_for_theta_makes_sigma_3_5_times_smaller(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    t = torch.tensor(0.5)
    theta = make_sde(explorer.cfg.sde).std(t)
    before = explorer.image.value
    explorer.spelling.value = "c"
    assert theta / make_sde(explorer.cfg.sde).std(t) == pytest.approx(0.08**-0.5, rel=1e-5)
    assert explorer.image.value != before


def test_the_sigma_explorer_warns_of_float16_and_takes_any_config(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    explorer.sliders["t_eps"].value = 1e-9
    assert any("float16" in text for text in explorer.messages)
    assert SigmaExplorer(tiny_cfg.override("sde={type: ouve}")).cfg.sde.type == "bbed"
    explorer = SigmaExplorer(tiny_cfg.override("sde.diffusion={c: 0.3, k: 0.5}"))
    sliders = explorer.sliders
    assert (explorer.spelling.value, sliders["value"].value, sliders["k"].value) == ("c", 0.3, 0.5)


def test_the_browser_turns_to_a_clip():
    target = waves()
    clips = Clips([(2 * target, target), (target + 0.1 * target.flip(-1), target)])
    browser = ClipBrowser(clips, AudioConfig())
    assert "noisy/0.wav + clean/0.wav" in browser.message
    assert "SNR 0.0 dB" in browser.message
    before = browser.image.value
    browser.slider.value = 1
    assert "noisy/1.wav" in browser.message
    assert "SNR 20.0 dB" in browser.message
    assert browser.image.value != before


def test_snr_in_words():
    target, silence = waves(), torch.zeros(1, 1600)
    assert "silent" in describe_snr(target, silence)
    assert "equal" in describe_snr(target, target)
