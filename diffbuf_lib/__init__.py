"""diffbuf: a workbench for the Diffusion Buffer, online diffusion-based speech enhancement."""

from diffbuf_lib.config import Config, load_config

__version__ = "0.1.0"
__all__ = ["Config", "__version__", "load_config"]
