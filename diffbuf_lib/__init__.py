"""diffbuf: a workbench for the Diffusion Buffer, online diffusion-based speech enhancement."""

from diffbuf_lib.config import Config, load_config
from diffbuf_lib.data import DNLMDataset
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.streaming import OnlineEnhancer
from diffbuf_lib.trace import Trace

__version__ = "0.1.0"
__all__ = [
    "Config",
    "DNLMDataset",
    "DiffusionBufferModel",
    "OnlineEnhancer",
    "Trace",
    "__version__",
    "load_config",
]
