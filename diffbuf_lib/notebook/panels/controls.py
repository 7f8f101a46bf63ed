"""What the explorers share: how their sliders look, and lines of text below them."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import Any

import ipywidgets as widgets

from diffbuf_lib.diagnostics.findings import Finding
from diffbuf_lib.errors import DiffbufError

_COLOURS = {"error": "#b00020", "warning": "#9a5b00"}


class Messages:
    """What the doctor or an error says about the sliders' positions, a line each.

    Attributes:
        widget: shows the lines; errors are red.
        lines: the same as plain text.
    """

    def __init__(self) -> None:
        self.widget = widgets.HTML()
        self.lines: list[str] = []

    def show(self, findings: Iterable[Finding]) -> None:
        """Show findings in place of what was there."""
        self._show([(finding.message, finding.severity) for finding in findings])

    def show_error(self, error: DiffbufError) -> None:
        """Show an error in place of what was there."""
        self._show([(str(error).removeprefix("the config: "), "error")])

    def _show(self, lines: list[tuple[str, str]]) -> None:
        self.lines = [line for line, _ in lines]
        self.widget.value = "<br>".join(
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
