"""What a run changes in its process, and only while it runs: seeds, flags, memory, signals.

Between two records the caller's own code runs: it must find the random generators and torch's flags
as it left them, and must not change the run by drawing from them.
"""

from __future__ import annotations

import ctypes
import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any, Self

import numpy as np
import torch

from diffbuf_lib.training.feed import STOP_SIGNALS


@contextmanager
def isolated(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Restore the global generators (also of `device`) and determinism flags after a block.

    With `deterministic`, torch uses algorithms that give the same bits in every run, or raises.
    All this is per process: another thread's draws disturb a step's dropout, but not its noise.
    """
    cudnn = torch.backends.cudnn
    enabled = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    flags, fills = (cudnn.deterministic, cudnn.benchmark), _FILLING.fill_uninitialized_memory
    numpy_state, python_state = np.random.get_state(), random.getstate()
    try:
        if deterministic:
            # cuBLAS reads this when it first runs; without it torch refuses matrix products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            cudnn.deterministic, cudnn.benchmark = True, False
            _FILLING.fill_uninitialized_memory = False  # debugging aid: a tenth of a CPU step
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warn_only)
        cudnn.deterministic, cudnn.benchmark = flags
        _FILLING.fill_uninitialized_memory = fills
        np.random.set_state(numpy_state)
        random.setstate(python_state)


_FILLING: Any = torch.utils.deterministic
# Options of glibc's mallopt; at the end, thresholds as high as glibc itself would raise them.
_KEEPING = {-4: 0, -1: -1}  # no mapping of its own for a large tensor; never trim
_USUAL = {-4: 65536, -3: 32 << 20, -1: 64 << 20}


@contextmanager
def keeping_memory() -> Iterator[None]:
    """Let glibc keep freed memory; else the pages of every large tensor are faulted in anew."""
    library: Any = ctypes.CDLL(None) if os.name == "posix" else None
    if not hasattr(library, "mallopt"):
        yield
        return
    try:
        for option, value in _KEEPING.items():
            library.mallopt(option, value)
        yield
    finally:
        for option, value in _USUAL.items():
            library.mallopt(option, value)
        library.malloc_trim(0)


class StopRequest:
    """Turns Ctrl-C, SIGTERM, SIGUSR1 and SIGUSR2 into a stop between two steps, in a block.

    Within `running()` a signal only sets `requested`, however many come. While the caller's code
    runs, the first one raises KeyboardInterrupt, unless other processes take part in the run: they
    would wait for this one. Only a second Ctrl-C from a person at a terminal stops at once. Works
    in the main thread only.
    """

    def __init__(self) -> None:
        self.requested = self.together = False
        self._inside = False
        self._previous: dict[int, Any] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the block in which a signal waits for the next `requested` check."""
        before, self._inside = self._inside, True
        try:
            yield
        finally:
            self._inside = before

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        if threading.current_thread() is threading.main_thread():
            for number, previous in self._previous.items():
                if signal.getsignal(number) == self._handle:  # it is still ours
                    signal.signal(number, previous if previous is not None else signal.SIG_DFL)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        again, self.requested = self.requested, True
        if again and number == signal.SIGINT and _at_terminal():
            raise KeyboardInterrupt
        for previous in self._previous.values():  # the command's handler has nothing more to do
            getattr(previous, "disarm", bool)()
        if not (again or self._inside or self.together):
            raise KeyboardInterrupt(signal.Signals(number).name)


def _at_terminal() -> bool:
    """Return whether a person can press Ctrl-C for this process."""
    try:
        return os.isatty(0) and os.tcgetpgrp(0) == os.getpgrp()
    except OSError:
        return False
