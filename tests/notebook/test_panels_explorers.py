"""The explorers and the clip browser work without a browser, and say what they show."""

import math
import types

import pytest
import torch
from IPython.core.formatters import DisplayFormatter
from matplotlib.figure import Figure

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.errors import DataError
from diffbuf_lib.notebook import display
from diffbuf_lib.notebook.panels import BufferExplorer, ClipBrowser, SigmaExplorer
from diffbuf_lib.notebook.panels.clips import describe_snr


class Clips:
    """A dataset in memory."""

    root = "memory"

    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        return self.items[i]

    def name(self, i):
        return f"far/away/noisy/{i}.wav + far/away/clean/{i}.wav"


def waves(channels=1, samples=1600, seed=0):
    return 0.1 * torch.randn(channels, samples, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def explorer(tiny_cfg):
    return BufferExplorer(tiny_cfg, waves(), waves(seed=1))


def test_moving_any_slider_changes_the_picture(explorer):
    moves = {"buffer_size": 7, "n_fft": 126, "hop_length": 48, "t_eps": 0.1, "t_max": 0.5}
    assert moves.keys() == explorer.sliders.keys()
    for name, value in moves.items():
        before = explorer.image.value
        explorer.sliders[name].value = value
        assert explorer.image.value[:2] == b"\xff\xd8", "no JPEG"
        assert explorer.image.value != before, name
        assert explorer.cfg is not None


def test_sliders_moved_back_show_the_same_picture(explorer):
    first = explorer.image.value
    explorer.sliders["t_max"].value = 0.4
    explorer.sliders["t_max"].value = 0.8
    assert explorer.image.value == first


def test_latency_and_frames_are_told(explorer):
    explorer.sliders["buffer_size"].value = 9
    counts, *_, latency = explorer.messages
    assert "1600 samples" in counts
    assert "51 STFT frames" in counts  # 1 + 1600 // 32
    assert "16 ms of buffer (8 hops of 2 ms)" in latency
    assert "4 ms of STFT window" in latency  # 62 samples


def test_the_window_keeps_its_share_of_n_fft(tiny_cfg):
    cfg = tiny_cfg.override("audio.stft.n_fft=64", "audio.stft.win_length=48")
    explorer = BufferExplorer(cfg, waves(), waves())
    explorer.sliders["n_fft"].value = 128
    assert explorer.cfg.audio.stft.win_length == 96


def test_a_buffer_longer_than_the_clip_is_refused_and_mended(explorer):
    first = explorer.image.value
    explorer.sliders["buffer_size"].value = 60
    assert explorer.cfg is None
    assert "buffer_size 60 is larger than the 51 STFT frames" in explorer.messages[0]
    assert explorer.image.value != first
    explorer.sliders["buffer_size"].value = 4
    assert explorer.cfg is not None
    assert explorer.image.value == first


def test_sliders_hold_values_outside_their_usual_range(tiny_cfg):
    """A config's own value is where its slider starts, not clipped to the slider's range."""
    cfg = tiny_cfg.override(
        "audio.stft={n_fft: 1500, win_length: 1500, hop_length: 33}",
        "diffusion_buffer.t_eps=0.001",
        "diffusion_buffer.t_max=0.05",
    )
    sliders = BufferExplorer(cfg, waves(), waves()).sliders
    assert sliders["n_fft"].value == 1500
    assert sliders["hop_length"].value == 33
    assert (sliders["t_eps"].value, sliders["t_max"].value) == (0.001, 0.05)


def test_a_longer_stereo_clip_than_chunk_size_is_explored(tiny_cfg):
    explorer = BufferExplorer(tiny_cfg, waves(2, 3200), waves(2, 3200, seed=1))
    assert "3200 samples" in explorer.messages[0]


def test_c_for_theta_makes_sigma_3_5_times_smaller(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    t = torch.tensor(0.5)
    theta = make_sde(explorer.cfg.sde).std(t)
    before = explorer.image.value
    explorer.spelling.value = "c"
    assert theta / make_sde(explorer.cfg.sde).std(t) == pytest.approx(0.08**-0.5, rel=1e-5)
    assert explorer.image.value != before


def test_moving_any_sigma_slider_changes_the_picture(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    moves = {"value": 0.5, "k": 5.0, "t_eps": 1e-4, "t_max": 0.5}
    assert moves.keys() == explorer.sliders.keys()
    for name, value in moves.items():
        before = explorer.image.value
        explorer.sliders[name].value = value
        assert explorer.image.value != before, name
        assert explorer.cfg is not None


def test_the_end_of_the_bridge_is_refused(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    explorer.sliders["t_max"].value = 1.0
    assert explorer.cfg is None
    assert "t_max 1.0" in explorer.messages[0]


def test_the_doctor_warns_of_float16(tiny_cfg):
    explorer = SigmaExplorer(tiny_cfg)
    explorer.sliders["t_eps"].value = 1e-9
    (message,) = (text for text in explorer.messages if "1 / sigma" in text)
    assert "65504" in message


def test_a_config_with_ouve_or_c_starts_the_sigma_explorer(tiny_cfg):
    assert SigmaExplorer(tiny_cfg.override("sde={type: ouve}")).cfg.sde.type == "bbed"
    explorer = SigmaExplorer(tiny_cfg.override("sde.diffusion={c: 0.3, k: 0.5}"))
    assert explorer.spelling.value == "c"
    assert explorer.sliders["value"].value == 0.3
    assert explorer.sliders["k"].value == 0.5


def test_the_browser_turns_to_a_clip():
    target = waves()
    clips = Clips((2 * target, target), (target + 0.1 * target.flip(-1), target))
    browser = ClipBrowser(clips, AudioConfig())
    assert "noisy/0.wav + clean/0.wav" in browser.message
    assert "SNR 0.0 dB" in browser.message
    before = browser.image.value
    browser.slider.value = 1
    assert "noisy/1.wav" in browser.message
    assert "SNR 20.0 dB" in browser.message
    assert browser.image.value != before


def test_a_browser_without_clips_says_so():
    with pytest.raises(DataError, match="no clips"):
        ClipBrowser(Clips(), AudioConfig())


def test_snr_in_words():
    target, silence = waves(), torch.zeros(1, 1600)
    assert describe_snr(target, silence) == "the target is silent here"
    assert describe_snr(target, target) == "mix and target are equal"
    noise = target * math.sqrt(10)
    assert describe_snr(target + noise, target) == "SNR -10.0 dB"


def test_what_is_shown_holds_a_widget_and_a_picture(explorer, monkeypatch):
    shown = []
    monkeypatch.setattr(
        "diffbuf_lib.notebook.panels.base.display", lambda bundle, **_: shown.append(bundle)
    )
    explorer._ipython_display_()
    assert {"image/jpeg", "application/vnd.jupyter.widget-view+json"} <= shown[0].keys()


def test_figures_are_shown_as_pictures_without_pyplot(monkeypatch):
    formatter = DisplayFormatter()
    shell = types.SimpleNamespace(display_formatter=formatter)
    monkeypatch.setattr(display, "get_ipython", lambda: shell)
    display.show_figures()
    assert formatter.format(Figure())[0]["image/jpeg"][:2] == b"\xff\xd8"


def test_outside_ipython_nothing_is_registered(monkeypatch):
    monkeypatch.setattr(display, "get_ipython", lambda: None)
    display.show_figures()
