"""The clip browser: what a dataset gives, clip by clip, to be seen and heard."""

from __future__ import annotations

import html
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.data import ClipDataset
from diffbuf_lib.data.mixing import is_silent, snr
from diffbuf_lib.errors import DataError
from diffbuf_lib.notebook.listening import Players
from diffbuf_lib.notebook.panels.base import Panel
from diffbuf_lib.notebook.plots.signals import wave_spectra


class ClipBrowser(Panel):
    """A slider over the clips of a dataset; of each, spectrograms, players, files and SNR.

    Args:
        dataset: not empty. Its items are shown as they are: crops of a training set too.
        audio: gives Hz and seconds.

    Attributes:
        slider: which clip; set `.value` to turn to another.
        message: files, shape and SNR of the clip that is shown.

    Raises:
        DataError: the dataset is empty, or the clip cannot be read.
    """

    def __init__(self, dataset: ClipDataset, audio: AudioConfig) -> None:
        if len(dataset) == 0:
            raise DataError(f"{dataset.root} holds no clips: check DATA")
        self._dataset, self._audio = dataset, audio
        self.slider = widgets.IntSlider(
            0,
            0,
            len(dataset) - 1,
            description="clip",
            continuous_update=False,
            layout=widgets.Layout(width="500px"),
        )
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
        self.draw(wave_spectra(waves, self._audio))


def describe_snr(mix: Tensor, target: Tensor) -> str:
    """Return the SNR of a clip in words: silence, or speech without noise, has none.

    Args:
        mix: [C, T] float32, full scale 1.
        target: [C, T] float32, the speech in it.
    """
    noise = mix - target
    if is_silent(target):
        return "the target is silent here"
    if not noise.any():
        return "mix and target are equal"
    return f"SNR {snr(target, noise):.1f} dB"
