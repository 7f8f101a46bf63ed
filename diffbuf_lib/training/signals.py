"""What a run changes in its process, and only while it runs: seeds, flags and signals.

Between two records the caller's own code runs, in a notebook for hours. It must find the random
generators and torch's flags as it left them, and must not change the run by drawing from them.
"""

from __future__ import annotations

import os
import random
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import numpy as np
import torch


@contextmanager
def isolated(device: torch.device, *, deterministic: bool) -> Iterator[None]:
    """Restore the global generators and determinism flags at the end of a block.

    They belong to the process, not to a thread: while a run in another thread is within a step,
    code that draws from the global generators disturbs its dropout (never its noise).

    Args:
        device: whose generator is restored beside the CPU's.
        deterministic: within the block, torch takes algorithms that give the same bits at every
            run and raises where an operation has none.
    """
    flags = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
        torch.backends.cudnn.deterministic,
        torch.backends.cudnn.benchmark,
    )
    numpy_state, python_state = np.random.get_state(), random.getstate()
    devices = [device] if device.type == "cuda" else []
    try:
        if deterministic:
            # cuBLAS reads this when it first runs; without it torch refuses matrix products.
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.use_deterministic_algorithms(True)
            torch.backends.cudnn.deterministic = True
            torch.backends.cudnn.benchmark = False
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        torch.use_deterministic_algorithms(flags[0], warn_only=flags[1])
        torch.backends.cudnn.deterministic, torch.backends.cudnn.benchmark = flags[2:]
        np.random.set_state(numpy_state)
        random.setstate(python_state)


class StopRequest:
    """Turns Ctrl-C and SIGTERM into a stop between two steps.

    Within `running()` the first signal only sets `requested`, so that no optimizer step is cut in
    half; a second one raises KeyboardInterrupt at once. Outside of it, while the caller's code
    runs, either signal raises KeyboardInterrupt there. Signals can be caught in the main thread
    only: in another thread this does nothing, and its owner stops by closing the generator.
    """

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self) -> None:
        self.requested = False
        self._inside = False
        self._previous: dict[int, Any] = {}

    @contextmanager
    def running(self) -> Iterator[None]:
        """Mark the block in which a signal waits for the next `requested` check."""
        self._inside = True
        try:
            yield
        finally:
            self._inside = False

    def install(self) -> None:
        """Put the handlers in place (main thread only)."""
        if threading.current_thread() is threading.main_thread():
            for number in self.SIGNALS:
                self._previous[number] = signal.signal(number, self._handle)

    def restore(self) -> None:
        """Put back the handlers that were there, where they are still ours."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, previous in self._previous.items():
            if signal.getsignal(number) == self._handle:
                signal.signal(number, previous if previous is not None else signal.SIG_DFL)
        self._previous.clear()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._inside and not self.requested:
            self.requested = True
            return
        previous = self._previous.get(number)
        if number == signal.SIGINT and callable(previous):
            previous(number, frame)
        else:
            raise KeyboardInterrupt(signal.Signals(number).name)
