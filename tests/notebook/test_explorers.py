"""The explorers and the clip browser work without a browser, and say what they show."""

import pytest
import torch

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.sde import make_sde
from tests.conftest import seeded
from walk.explorers import BufferExplorer, ClipBrowser, SigmaExplorer

BUFFER_MOVES = {"buffer_size": 7, "n_fft": 126, "hop_length": 48, "t_eps": 0.1, "t_max": 0.5}
SIGMA_MOVES = {"value": 0.5, "k": 5.0, "t_eps": 1e-4, "t_max": 0.5}


class Clips(list):
    """A dataset in memory."""

    def name(self, i):
        return f"far/away/noisy/{i}.wav + far/away/clean/{i}.wav"


def wave(seed=0):
    return 0.1 * torch.randn(1, 1600, generator=seeded(seed))


def explore(cfg):
    return BufferExplorer(cfg, wave(), wave(seed=1))


@pytest.mark.parametrize(
    ("make", "moves", "wrong"),
    [
        (explore, BUFFER_MOVES, ("buffer_size", 60)),
        (SigmaExplorer, SIGMA_MOVES, ("t_max", 1.0)),
    ],
)
def test_moving_any_slider_and_back_changes_the_picture_and_back(tiny_cfg, make, moves, wrong):
    explorer = make(tiny_cfg)
    assert moves.keys() == explorer.sliders.keys()
    for name, value in [*moves.items(), wrong]:  # of values that contradict, the error is shown
        before, start = explorer.image.value, explorer.sliders[name].value
        explorer.sliders[name].value = value
        assert explorer.image.value != before, name
        assert (explorer.cfg is None) == ((name, value) == wrong)
        assert explorer.cfg or f"{name} {value}" in explorer.messages[0]
        explorer.sliders[name].value = start
        assert explorer.image.value == before, name


def test_sliders_hold_a_configs_own_values_also_outside_their_usual_range(tiny_cfg):
    cfg = tiny_cfg.override(
        "audio.stft={n_fft: 1500, win_length: 750, hop_length: 33}",
        "diffusion_buffer={buffer_size: 4, num_frames: 10, t_eps: 0.001, t_max: 0.05}",
        "sde.diffusion={c: 0.3, k: 0.5}",
    )
    explorer = explore(cfg)
    assert [slider.value for slider in explorer.sliders.values()] == [4, 1500, 33, 0.001, 0.05]
    explorer.sliders["n_fft"].value = 1400
    assert explorer.cfg.audio.stft.win_length == 700, "the window keeps its share of n_fft"
    explorer = SigmaExplorer(cfg)
    values = [slider.value for slider in explorer.sliders.values()]
    assert (explorer.spelling.value, values) == ("c", [0.3, 0.5, 0.05, 0.001])
    assert SigmaExplorer(tiny_cfg.override("sde={type: ouve}")).cfg.sde.type == "bbed"


@pytest.mark.law
def test_c_for_theta_makes_sigma_3_5_times_smaller(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    t = torch.tensor(0.5)
    theta = make_sde(explorer.cfg.sde).std(t)
    before = explorer.image.value
    explorer.spelling.value = "c"
    assert theta / make_sde(explorer.cfg.sde).std(t) == pytest.approx(0.08**-0.5, rel=1e-5)
    assert explorer.image.value != before


def test_the_browser_turns_to_a_clip():
    x = wave()
    clips = Clips([(x + 0.1 * x.flip(-1), x), (2 * x, x), (x, x), (x, 0 * x)])
    browser = ClipBrowser(clips, AudioConfig())
    pictures = set()
    for index, snr in enumerate(("SNR 20.0 dB", "SNR 0.0 dB", "equal", "silent")):
        browser.slider.value = index
        assert f"noisy/{index}.wav + clean/{index}.wav" in browser.message
        assert snr in browser.message
        pictures.add(browser.image.value)
    assert len(pictures) == 4
