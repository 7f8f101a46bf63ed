"""A picture with controls around it: a widget in Jupyter, and a still picture everywhere else."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure
from torch import Tensor

from diffbuf_lib.config import AudioConfig
from diffbuf_lib.data import ClipDataset
from diffbuf_lib.data.mixing import is_silent, snr
from diffbuf_lib.errors import DataError
from diffbuf_lib.figures import Players, spectrograms, to_jpeg

_COLOURS = {"error": "#b00020", "warning": "#9a5b00"}


class Panel:
    """Widgets over one picture.

    A page that runs no widgets (a rendered notebook, a code host, an editor's preview) shows the
    picture alone: the panel is displayed as one bundle that holds both.

    Args:
        controls: rows of widgets above the picture.
        description: in a few words what the picture shows, for readers who cannot see it.

    Attributes:
        image: the picture's widget; its value is a JPEG.
        box: everything, as one widget.
    """

    def __init__(self, controls: Sequence[widgets.Widget], description: str) -> None:
        self.description = description
        # Without a width JupyterLab draws an image at its size in pixels, past the page's edge. And
        # with a tooltip it draws none: the widget's view then asks for a description.
        layout = widgets.Layout(width="100%", max_width="1000px", margin="0")
        self.image = widgets.Image(format="jpeg", layout=layout)
        self.image.add_class("diffbuf-picture")
        self.box = widgets.VBox([*controls, self.image])
        self._handle: DisplayHandle | None = None

    def draw(self, figure: Figure) -> None:
        """Show a figure in place of the one before; safe in any thread."""
        self.image.value = to_jpeg(figure)

    def keep_still(self) -> None:
        """Make the current picture the one that pages without widgets show.

        Only from the thread that runs the notebook's cells.
        """
        if self._handle is not None:
            self._handle.update(self.bundle(), raw=True)

    def bundle(self) -> dict[str, Any]:
        """Return the panel by MIME type: widgets, picture and words."""
        picture = base64.b64encode(self.image.value).decode()
        words = f"<panel: {self.description}>"
        return {**self.box._repr_mimebundle_(), "image/jpeg": picture, "text/plain": words}

    def _ipython_display_(self) -> None:
        self._handle = display(self.bundle(), raw=True, display_id=True)
        self.box.panel = self  # what is on the page stays alive, with or without a name


class Messages(widgets.HTML):
    """Lines of text below sliders: what the doctor or an error says about their positions.

    Attributes:
        lines: the same as plain text.
    """

    def show(self, lines: Sequence[tuple[str, str]]) -> None:
        """Show lines of text, each with its severity, in place of what was there."""
        self.lines = [line for line, _ in lines]
        self.value = "<br>".join(
            f'<span style="color:{_COLOURS.get(severity, "inherit")}">{html.escape(line)}</span>'
            for line, severity in lines
        )


def slider_look(description: str, width: int = 310) -> dict[str, Any]:
    """Return the arguments that all sliders share: they act when they are let go.

    Args:
        description: the text beside the slider.
        width: in pixels; three of 310 fit a page side by side.
    """
    return {
        "description": description,
        "continuous_update": False,
        "style": {"description_width": "80px"},
        "layout": widgets.Layout(width=f"{width}px"),
    }


def label(name: str, width: str) -> widgets.Label:
    """Return a line of text with a CSS class of its own."""
    line = widgets.Label(layout=widgets.Layout(width=width))
    line.add_class(f"diffbuf-{name}")
    return line


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
    """Return the SNR of a clip in words: silence, or speech without noise, has none.

    Args:
        mix: [C, T] float32, full scale 1.
        target: [C, T] float32, the speech in it.
    """
    noise = mix - target
    if is_silent(target):
        return "the target is silent here"
    return f"SNR {snr(target, noise):.1f} dB" if noise.any() else "mix and target are equal"
