"""Panels of the notebooks: widgets over a picture, which also work without a browser.

The only package of the library that imports IPython or ipywidgets.
"""

from diffbuf_lib.notebook.panels.base import Panel
from diffbuf_lib.notebook.panels.buffer import BufferExplorer
from diffbuf_lib.notebook.panels.clips import ClipBrowser
from diffbuf_lib.notebook.panels.runs import remove_run
from diffbuf_lib.notebook.panels.sigma import SigmaExplorer
from diffbuf_lib.notebook.panels.stepper import StepDebugger
from diffbuf_lib.notebook.panels.stream import StreamPanel
from diffbuf_lib.notebook.panels.training import TrainingPanel

__all__ = [
    "BufferExplorer",
    "ClipBrowser",
    "Panel",
    "SigmaExplorer",
    "StepDebugger",
    "StreamPanel",
    "TrainingPanel",
    "remove_run",
]
