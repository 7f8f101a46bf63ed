"""Lets Jupyter show figures that pyplot knows nothing of."""

from __future__ import annotations

from IPython.core.getipython import get_ipython
from matplotlib.figure import Figure

from diffbuf_lib.figures import to_jpeg


def show_figures() -> None:
    """Show a `Figure` that is a cell's last value as a picture; outside IPython, do nothing.

    IPython itself does so only once pyplot is imported, which the notebooks never do.
    """
    shell = get_ipython()
    if shell is not None and shell.display_formatter is not None:
        shell.display_formatter.formatters["image/jpeg"].for_type(Figure, to_jpeg)
