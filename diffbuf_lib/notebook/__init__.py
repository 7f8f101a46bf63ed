"""What the notebooks stand on: a workbench, figures and panels.

`panels` is the only module of the library that imports IPython or ipywidgets.
"""

from diffbuf_lib.notebook.workbench import Workbench, open_workbench

__all__ = ["Workbench", "open_workbench"]
