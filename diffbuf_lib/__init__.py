"""diffbuf: a workbench for the Diffusion Buffer, online diffusion-based speech enhancement.

Public names are imported on first access, so `import diffbuf_lib`, and hence every
`diffbuf ... --help`, runs without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffbuf_lib.config import Config as Config
    from diffbuf_lib.config import load_config as load_config
    from diffbuf_lib.data import DNLMDataset as DNLMDataset
    from diffbuf_lib.model import DiffusionBufferModel as DiffusionBufferModel
    from diffbuf_lib.streaming import OnlineEnhancer as OnlineEnhancer
    from diffbuf_lib.trace import Trace as Trace

__version__ = "0.1.0"
_HOMES = {
    "Config": "config",
    "DNLMDataset": "data",
    "DiffusionBufferModel": "model",
    "OnlineEnhancer": "streaming",
    "Trace": "trace",
    "load_config": "config",
}
__all__ = ["__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
