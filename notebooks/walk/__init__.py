"""What only the notebooks use: workbench, panels, pictures. Needs IPython and ipywidgets.

The notebooks' kernels find it, since they start in notebooks/; elsewhere put that folder on
PYTHONPATH.
"""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2]))  # of recipes/, which is not installed

from walk.panels import Panel
from walk.training_panel import TrainingPanel, remove_run
from walk.workbench import Workbench, open_workbench

__all__ = ["Panel", "TrainingPanel", "Workbench", "open_workbench", "remove_run"]
