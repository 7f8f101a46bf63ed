"""A picture with controls around it: a widget in Jupyter, and a still picture everywhere else."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any

import ipywidgets as widgets
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure

from diffbuf_lib.figures import to_jpeg

_WIDTH = "100%"


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
        self.image = widgets.Image(
            format="jpeg", layout=widgets.Layout(width=_WIDTH, max_width="1000px", margin="0")
        )
        self.box = widgets.VBox([*controls, self.image])
        self._handle: DisplayHandle | None = None

    def draw(self, figure: Figure) -> None:
        """Show a figure in place of the one before; safe in any thread."""
        self.image.value = to_jpeg(figure)

    def keep_still(self) -> None:
        """Make the picture of now the one that pages without widgets show.

        Only from the thread that runs the notebook's cells.
        """
        if self._handle is not None:
            self._handle.update(self._bundle(), raw=True)

    def _ipython_display_(self) -> None:
        self._handle = display(self._bundle(), raw=True, display_id=True)
        self.box.panel = self  # what is on the page stays alive, with or without a name

    def _bundle(self) -> dict[str, Any]:
        picture = base64.b64encode(self.image.value).decode()
        bundle = self.box._repr_mimebundle_()
        return {**bundle, "image/jpeg": picture, "text/plain": f"<panel: {self.description}>"}
