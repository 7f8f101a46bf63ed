"""Sliders over a dataset's clips, over frames and buffer, and over the noise schedule."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch
from torch import Tensor

from diffbuf_lib.config import AudioConfig, BBEDDiffusion, Config
from diffbuf_lib.data import ClipDataset
from diffbuf_lib.data.mixing import is_silent, snr
from diffbuf_lib.diagnostics.checks_run import check_frames, check_schedule
from diffbuf_lib.diffusion.buffer import complex_normal, inference_times, perturb
from diffbuf_lib.diffusion.sde import make_sde
from diffbuf_lib.diffusion.spectral import Spectral
from diffbuf_lib.errors import ConfigError
from diffbuf_lib.figures import spectrograms
from walk.listening import Players
from walk.panels import Panel
from walk.plots import buffer_spectra, noise_schedule, refused

_COLOURS = {"error": "#b00020", "warning": "#9a5b00"}
_LONGER = 10  # frames by which the buffer can be made longer than the clip, to meet the error
_SMALLEST_EXPONENT = -10  # of t_eps, base 10


class ClipBrowser(Panel):
    """A slider over the clips of a dataset; shows spectrograms, players, files and SNR of each.

    Set `slider.value` to select a clip; `message` has files, shape and SNR of the one shown.
    """

    def __init__(self, dataset: ClipDataset, audio: AudioConfig) -> None:
        self._dataset, self._audio = dataset, audio
        self.slider = widgets.IntSlider(0, 0, len(dataset) - 1, **slider_look("clip", 500))
        self.message = ""
        self._text, self._players = widgets.HTML(), widgets.HTML()
        controls = [self.slider, self._text, self._players]
        super().__init__(controls, "spectrograms of a clip's mix and target")
        self.slider.observe(self._changed, names="value")
        self._changed()

    def _changed(self, _: Any = None) -> None:
        index = self.slider.value
        mix, target = self._dataset[index]
        names = self._dataset.name(index).split(" + ")
        files = " + ".join("/".join(Path(name).parts[-2:]) for name in names)
        self.message = f"{files}: {list(mix.shape)}, {describe_snr(mix, target)}"
        self._text.value = html.escape(self.message)
        waves = {"mix": mix.mean(0), "target": target.mean(0)}
        self._players.value = Players(waves, self._audio.sample_rate)._repr_html_()
        self.draw(spectrograms(waves, self._audio.sample_rate, self._audio.stft))


def describe_snr(mix: Tensor, target: Tensor) -> str:
    """Return the SNR of a clip [C, T] in words: silence, or speech without noise, has none."""
    noise = mix - target
    if is_silent(target):
        return "the target is silent here"
    return f"SNR {snr(target, noise):.1f} dB" if noise.any() else "mix and target are equal"


class Explorer(Panel):
    """Sliders that set a config, and a picture of the result.

    Values that contradict each other are not hidden: the config's own error message is shown.

    Attributes:
        sliders: by name; set `.value` to move one.
        cfg: the config at the sliders' positions, or None while they contradict each other.
        messages: what the doctor says about the sliders' positions, or the error.
    """

    _check: Callable[[Config], Iterable[Any]]

    def __init__(
        self, cfg: Config, sliders: dict[str, Any], rows: list[widgets.Widget], description: str
    ) -> None:
        self.start, self.sliders = cfg, sliders
        self.cfg: Config | None = None
        self.messages: list[str] = []
        self._lines = widgets.HTML()
        super().__init__([*rows, self._lines], description)
        for slider in sliders.values():
            slider.observe(self._changed, names="value")
        self._changed()

    def _changed(self, _: Any = None) -> None:
        """Read the sliders' values and show the result."""
        value = {name: slider.value for name, slider in self.sliders.items()}
        try:
            self.cfg = self.start.override(*self._overrides(value))
        except ConfigError as error:
            self.cfg = None
            lines = [(str(error).removeprefix("the config: "), "error")]
        else:
            lines = [(each.message, each.severity) for each in self._check(self.cfg)]
        self.messages = [line for line, _ in lines]
        self._lines.value = "<br>".join(
            f'<span style="color:{_COLOURS.get(severity, "inherit")}">{html.escape(line)}</span>'
            for line, severity in lines
        )
        self._draw(self.cfg, value)

    def _overrides(self, value: dict[str, Any]) -> list[str]:
        raise NotImplementedError

    def _draw(self, cfg: Config | None, value: dict[str, Any]) -> None:
        raise NotImplementedError


class BufferExplorer(Explorer):
    """Sliders for buffer_size, n_fft, hop_length, t_eps and t_max; shows the effect on one clip.

    The window keeps its ratio to n_fft. The noise is the same at every position of the sliders, so
    that every visible change comes from them. The channels of mix and target [C, T] are averaged.
    """

    _check = staticmethod(check_frames)

    def __init__(self, cfg: Config, mix: Tensor, target: Tensor) -> None:
        cfg = cfg.override(f"audio.chunk_size={mix.shape[-1]}")
        self._mix, self._target = mix.mean(0, keepdim=True), target.mean(0, keepdim=True)  # [1, T]
        sliders = _buffer_sliders(cfg)
        shown = list(sliders.values())
        rows = [widgets.HBox(shown[:3]), widgets.HBox(shown[3:])]  # counts above times
        description = "a clip's noisy and perturbed spectrum, and its buffer"
        super().__init__(cfg, sliders, rows, description)

    def _overrides(self, value: dict[str, Any]) -> list[str]:
        stft = self.start.audio.stft
        window = round(value["n_fft"] * stft.win_length / stft.n_fft)
        in_buffer = ("buffer_size", "t_eps", "t_max")
        return [
            f"audio.stft.n_fft={value['n_fft']}",
            f"audio.stft.win_length={window}",
            f"audio.stft.hop_length={value['hop_length']}",
            *(f"diffusion_buffer.{name}={value[name]}" for name in in_buffer),
        ]

    def _draw(self, cfg: Config | None, value: dict[str, Any]) -> None:
        if cfg is None:
            Y = _spectrum(self._mix, self.start)[0]
            self.draw(refused(Y, self.messages[0], self.start.audio))
            return
        Y, S = _spectrum(self._mix, cfg), _spectrum(self._target, cfg)  # [1, F, K]
        t, sde = inference_times(cfg.diffusion_buffer), make_sde(cfg.sde)
        shape = (*Y.shape[:-1], len(t))
        z = complex_normal(shape, torch.Generator().manual_seed(0), dtype=Y.dtype)
        V = perturb(S, Y, t[None], z, sde)
        spectra = {"noisy Y": Y[0], "perturbed input V": V[0]}
        self.draw(buffer_spectra(spectra, t, sde.std(t), cfg.audio))


class SigmaExplorer(Explorer):
    """Sliders for k, c or theta, t_eps and t_max; shows sigma, mean, g and 1 / sigma.

    The schedule of the config is drawn dashed, beside the curves of the sliders. A config with OUVE
    starts the sliders at BBED's defaults. `spelling` says what `sliders["value"]` is called in the
    config: "theta" or "c".
    """

    _check = staticmethod(check_schedule)

    def __init__(self, cfg: Config) -> None:
        bbed: Any = cfg.sde.diffusion if cfg.sde.type == "bbed" else BBEDDiffusion()
        self.spelling = widgets.ToggleButtons(
            options=["theta", "c"],
            value="theta" if bbed.c is None else "c",
            description="spelling",
            style={"description_width": "80px", "button_width": "70px"},
        )
        self.spelling.observe(self._changed, names="value")
        sliders = _sigma_sliders(bbed, cfg)
        shown = list(sliders.values())
        rows = [self.spelling, widgets.HBox(shown[:2]), widgets.HBox(shown[2:])]
        super().__init__(cfg, sliders, rows, "sigma, mean, g and 1 / sigma over diffusion time")

    def _overrides(self, value: dict[str, Any]) -> list[str]:
        diffusion = f"{{k: {value['k']}, {self.spelling.value}: {value['value']}}}"
        times = [f"diffusion_buffer.{name}={value[name]}" for name in ("t_eps", "t_max")]
        return [f"sde={{type: bbed, diffusion: {diffusion}}}", *times]

    def _draw(self, cfg: Config | None, value: dict[str, Any]) -> None:
        sdes = {"config": make_sde(self.start.sde)}
        if cfg is not None:
            name = f"sliders: {self.spelling.value} = {value['value']:.3g}, k = {value['k']:.3g}"
            sdes = {name: make_sde(cfg.sde), **sdes}
        self.draw(noise_schedule(sdes, value["t_eps"], value["t_max"]))


def _buffer_sliders(cfg: Config) -> dict[str, Any]:
    stft, buffer = cfg.audio.stft, cfg.diffusion_buffer
    # The lowest values are chosen so that the config's own value lies on the slider's grid.
    return {
        "buffer_size": _count("buffer_size", buffer.buffer_size, 1, cfg.audio.num_frames + _LONGER),
        "n_fft": _count("n_fft", stft.n_fft, 126 + stft.n_fft % 2, 1022, 2),
        "hop_length": _count("hop_length", stft.hop_length, 64 + stft.hop_length % 8, 512, 8),
        "t_eps": _number("t_eps", buffer.t_eps, 0.005, 0.5),
        "t_max": _number("t_max", buffer.t_max, 0.1, 1.0),
    }


def _sigma_sliders(bbed: Any, cfg: Config) -> dict[str, Any]:
    times = cfg.diffusion_buffer
    lowest = min(_SMALLEST_EXPONENT, math.log10(times.t_eps))
    look = {"readout_format": ".2g", **slider_look("t_eps", 400)}
    return {
        "value": _number("c or theta", bbed.c or bbed.theta or 0.08, 0.005, 2.0, width=400),
        "k": _number("k", bbed.k, 1.1, 10.0, 0.1, width=400),
        "t_max": _number("t_max", times.t_max, 0.1, 1.0, width=400),
        # Logarithmic: float16 overflows at times that a linear slider cannot reach.
        "t_eps": widgets.FloatLogSlider(times.t_eps, min=lowest, max=0, step=0.05, **look),
    }


def slider_look(description: str, width: int = 310) -> dict[str, Any]:
    """Return what all sliders share: they act when released; three of 310 px fit on a page."""
    return {
        "description": description,
        "continuous_update": False,
        "style": {"description_width": "80px"},
        "layout": widgets.Layout(width=f"{width}px"),
    }


def _count(name: str, value: int, low: int, high: int, step: int = 1) -> widgets.IntSlider:
    """Make a slider of whole numbers whose range includes the config's value."""
    return widgets.IntSlider(value, min(low, value), max(high, value), step, **slider_look(name))


def _number(
    name: str, value: float, low: float, high: float, step: float = 0.005, width: int = 310
) -> widgets.FloatSlider:
    """Make a slider of numbers whose range includes the config's value."""
    look = {"step": step, "readout_format": ".3f", **slider_look(name, width)}
    return widgets.FloatSlider(value, min=min(low, value), max=max(high, value), **look)


def _spectrum(wave: Tensor, cfg: Config) -> Tensor:
    """Return the compressed spectrum [1, F, K] of a signal [1, T]."""
    compression = cfg.preprocessing.magnitude_compression
    spectrum: Tensor = Spectral.from_config(cfg.audio.stft, compression)(wave)
    return spectrum
