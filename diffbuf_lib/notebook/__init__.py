"""What the notebooks stand on: a workbench, figures and panels.

`panels` and `display` are the only modules of the library that import IPython or ipywidgets.
"""

from diffbuf_lib.notebook.workbench import Workbench, open_workbench

__all__ = ["Workbench", "open_workbench"]
