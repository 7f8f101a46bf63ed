"""The buffer explorer: sliders for what decides frames, buffer and latency."""

from __future__ import annotations

from typing import Any

import ipywidgets as widgets
import torch
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.diagnostics.checks_run import check_frames
from diffbuf_lib.diffusion.buffer import complex_normal, inference_times, perturb
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.notebook.panels.base import Panel
from diffbuf_lib.notebook.panels.controls import Messages, slider_look
from diffbuf_lib.notebook.plots.buffer import buffer_spectra, refused

_LONGER = 10  # frames by which the buffer can be made longer than the clip, to meet the error


class BufferExplorer(Panel):
    """Moves buffer_size, n_fft, hop_length, t_eps and t_max, and shows what becomes of one clip.

    The window keeps its share of n_fft. Values that contradict each other are not hidden: the
    picture then shows the config's own error message. The noise is the same at every position of
    the sliders, so that only what they change changes.

    Args:
        cfg: where the sliders start.
        mix: [C, T] float32, full scale 1; its channels are averaged.
        target: [C, T] float32, the clean signal at the same moments.

    Attributes:
        sliders: by name, as above; set `.value` to move one.
        cfg: the config at the sliders' positions, or None while they contradict each other.

    Raises:
        ConfigError: the clip has fewer frames than the buffer of `cfg`.
    """

    def __init__(self, cfg: Config, mix: Tensor, target: Tensor) -> None:
        samples = mix.shape[-1]
        self._start = cfg.override(f"audio.chunk_size={samples}")
        self._mix, self._target = mix.mean(0, keepdim=True), target.mean(0, keepdim=True)  # [1, T]
        self.sliders = _sliders(self._start)
        self.cfg: Config | None = None
        self._messages = Messages()
        sliders = list(self.sliders.values())
        rows = [widgets.HBox(sliders[:3]), widgets.HBox(sliders[3:])]  # counts above times
        super().__init__(
            [*rows, self._messages.widget], "a clip's noisy and perturbed spectrum, and its buffer"
        )
        for slider in self.sliders.values():
            slider.observe(self._changed, names="value")
        self._changed()

    @property
    def messages(self) -> list[str]:
        """What the doctor says about frames, buffer and latency, or the error."""
        return self._messages.lines

    def _changed(self, _: Any = None) -> None:
        """Take the sliders' values, and show what follows from them."""
        try:
            self.cfg = self._start.override(*self._overrides())
        except ConfigError as error:
            self.cfg = None
            self._messages.show_error(error)
            self.draw(
                refused(_spectrum(self._mix, self._start), self.messages[0], self._start.audio)
            )
            return
        self._messages.show(check_frames(self.cfg))
        self._draw_buffer(self.cfg)

    def _overrides(self) -> list[str]:
        value = {name: slider.value for name, slider in self.sliders.items()}
        stft = self._start.audio.stft
        window = round(value["n_fft"] * stft.win_length / stft.n_fft)
        in_buffer = ("buffer_size", "t_eps", "t_max")
        return [
            f"audio.stft.n_fft={value['n_fft']}",
            f"audio.stft.win_length={window}",
            f"audio.stft.hop_length={value['hop_length']}",
            *(f"diffusion_buffer.{name}={value[name]}" for name in in_buffer),
        ]

    def _draw_buffer(self, cfg: Config) -> None:
        Y, S = _spectrum(self._mix, cfg)[None], _spectrum(self._target, cfg)[None]  # [1, F, K]
        t, sde = inference_times(cfg.diffusion_buffer), make_sde(cfg.sde)
        shape = (*Y.shape[:-1], len(t))
        z = complex_normal(shape, torch.Generator().manual_seed(0), dtype=Y.dtype)
        V = perturb(S, Y, t[None], z, sde)
        spectra = {"noisy Y": Y[0], "perturbed input V": V[0]}
        self.draw(buffer_spectra(spectra, t, sde.std(t), cfg.audio))


def _sliders(cfg: Config) -> dict[str, Any]:
    """Make a slider for each value, whose range holds the config's own."""
    stft, buffer = cfg.audio.stft, cfg.diffusion_buffer
    longest = cfg.audio.num_frames + _LONGER
    # The lowest values are such that the config's own lies on the slider's grid.
    least = {"n_fft": 126 + stft.n_fft % 2, "hop_length": 64 + stft.hop_length % 8}
    counts = {
        "buffer_size": (buffer.buffer_size, 1, longest, 1),
        "n_fft": (stft.n_fft, min(least["n_fft"], stft.n_fft), max(1022, stft.n_fft), 2),
        "hop_length": (
            stft.hop_length,
            min(least["hop_length"], stft.hop_length),
            max(512, stft.hop_length),
            8,
        ),
    }
    times = {
        "t_eps": (buffer.t_eps, min(0.005, buffer.t_eps), max(0.5, buffer.t_eps)),
        "t_max": (buffer.t_max, min(0.1, buffer.t_max), 1.0),
    }
    sliders: dict[str, Any] = {
        name: widgets.IntSlider(value, low, high, step, **slider_look(name))
        for name, (value, low, high, step) in counts.items()
    }
    sliders |= {
        name: widgets.FloatSlider(
            value=value,
            min=low,
            max=high,
            step=0.005,
            readout_format=".3f",
            **slider_look(name),
        )
        for name, (value, low, high) in times.items()
    }
    return sliders


def _spectrum(wave: Tensor, cfg: Config) -> Tensor:
    """Return the compressed spectrum [F, K] of a signal [1, T]."""
    compression = cfg.preprocessing.magnitude_compression
    spectrum: Tensor = Spectral.from_config(cfg.audio.stft, compression)(wave)[0]
    return spectrum
