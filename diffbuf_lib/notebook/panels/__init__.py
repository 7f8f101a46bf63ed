"""Panels of the notebooks: widgets over a picture, which also work without a browser.

The only package of the library that imports IPython or ipywidgets.
"""

from diffbuf_lib.notebook.panels.base import Panel

__all__ = ["Panel"]
