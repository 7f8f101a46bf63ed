"""What the notebooks stand on: a workbench and panels. Needs IPython and ipywidgets.

Nothing else in the library imports this package.
"""

from diffbuf_lib.notebook.panels import Panel
from diffbuf_lib.notebook.training_panel import TrainingPanel, remove_run
from diffbuf_lib.notebook.workbench import Workbench, open_workbench

__all__ = ["Panel", "TrainingPanel", "Workbench", "open_workbench", "remove_run"]
