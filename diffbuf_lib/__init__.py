"""diffbuf: a workbench for the Diffusion Buffer, online diffusion-based speech enhancement."""

from diffbuf_lib.config import Config, load_config
from diffbuf_lib.model import DiffusionBufferModel, Trace

__version__ = "0.1.0"
__all__ = ["Config", "DiffusionBufferModel", "Trace", "__version__", "load_config"]
