"""What the notebooks stand on: a workbench and panels. Needs IPython and ipywidgets.

Nothing else in the library imports this package.
"""

from diffbuf_lib.notebook.explorers import BufferExplorer, SigmaExplorer
from diffbuf_lib.notebook.panels import ClipBrowser, Panel
from diffbuf_lib.notebook.step_debugger import StepDebugger
from diffbuf_lib.notebook.stream_panel import StreamPanel
from diffbuf_lib.notebook.training_panel import TrainingPanel, remove_run
from diffbuf_lib.notebook.workbench import Workbench, open_workbench

__all__ = [
    "BufferExplorer",
    "ClipBrowser",
    "Panel",
    "SigmaExplorer",
    "StepDebugger",
    "StreamPanel",
    "TrainingPanel",
    "Workbench",
    "open_workbench",
    "remove_run",
]
