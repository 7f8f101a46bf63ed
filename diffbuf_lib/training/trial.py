"""A batch tried in a process of its own: `python -m diffbuf_lib.training.trial FOLDER SIZE`.

`training.memory.find_batch_size` starts it on machines without a GPU.
"""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from pathlib import Path

from diffbuf_lib.config import build_config
from diffbuf_lib.memory import free_memory, taken_memory
from diffbuf_lib.training import memory
from diffbuf_lib.training.engine import make_accelerator
from diffbuf_lib.training.packing import load_json, load_tensors


def main(folder: Path, size: int) -> int:
    """Return 0 if two steps of `size` clips can be made, `memory.TOO_LARGE` if not."""
    warnings.simplefilter("ignore")
    cfg = build_config(load_json(folder / "config.json"))
    clip = load_tensors(folder / "clip.safetensors")
    limit_memory()
    try:
        accelerator = make_accelerator(cfg.training, "cpu")
        memory.try_batch(cfg, accelerator, clip["mix"], clip["target"], size)
    except Exception as error:
        if not memory.is_out_of_memory(error):
            raise
        return memory.TOO_LARGE
    return 0


def limit_memory() -> None:
    """Let this process end where memory does, rather than another one that the system picks."""
    with suppress(ImportError, OSError, ValueError, IndexError):  # where there is no /proc
        import resource

        import torch

        soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
        free = int(0.9 * free_memory(torch.device("cpu")))
        limit = taken_memory() + free
        if soft == resource.RLIM_INFINITY or limit < soft:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, hard))


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), int(sys.argv[2])))
