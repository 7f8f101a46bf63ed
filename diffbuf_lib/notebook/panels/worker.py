"""A generator that runs in a thread of its own, and can be paused, stopped and opened again.

A loop in a notebook's main thread holds the kernel, so that no button works until it ends.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator
from typing import Any, Generic, Literal, TypeVar

Item = TypeVar("Item")
State = Literal["ready", "running", "paused", "stopped", "finished", "failed"]

_POLL = 0.05  # s; how soon a wait sees Ctrl-C
_FAREWELL = 10.0  # s that a thread has for its checkpoint when Python ends
_alive: weakref.WeakSet[Worker[Any]] = weakref.WeakSet()


class Worker(Generic[Item]):
    """Takes items from a generator in a daemon thread.

    Requests are met between two items, never within one. The thread holds the worker and not the
    worker's owner: give callbacks that do not keep the owner alive either (`weakly`).

    Args:
        make: opens the generator; called in the thread, again after every `start` and `reopen`.
        receive: called in the thread with each item.
        changed: called in the thread when the state has changed; draws, never prints.

    Attributes:
        state: ready, running, paused, stopped (asked to), finished (no more items) or failed.
        error: what the thread raised, until `wait` has raised it again.
    """

    def __init__(
        self,
        make: Callable[[], Generator[Item, None, None]],
        receive: Callable[[Item], None],
        changed: Callable[[], None],
    ) -> None:
        self._make, self._receive, self._changed = make, receive, changed
        self._wish = threading.Condition()  # guards what is asked for, below
        self._pause = self._stop = self._reopen = False
        self._thread: threading.Thread | None = None
        self._told = True  # whether `changed` has been called since the state changed
        self.state: State = "ready"
        self.error: BaseException | None = None

    @property
    def reopening(self) -> bool:
        """Whether `reopen` was asked for and is still to be done."""
        return self._reopen

    @property
    def busy(self) -> bool:
        """Whether there are items to come: running or paused."""
        return self.state in ("running", "paused")

    @property
    def resting(self) -> bool:
        """Whether it is paused, has said so, and stays so until somebody asks for something."""
        asked = self._stop or self._reopen or not self._pause
        return self.state == "paused" and self._told and not asked

    def start(self) -> None:
        """Open the generator and go on with it; a paused worker resumes, a running one runs on."""
        if self.busy and not self._stop:
            self.ask(pause=False)
            return
        self.join()
        self._pause = self._stop = self._reopen = False
        self.error, self.state = None, "running"
        self._thread = threading.Thread(target=self._run, name="diffbuf-worker", daemon=True)
        _alive.add(self)
        self._thread.start()

    def ask(
        self, *, pause: bool | None = None, stop: bool | None = None, reopen: bool | None = None
    ) -> None:
        """Ask for something without waiting for it; what is None stays as it was.

        Args:
            pause: take no item until this is False again.
            stop: close the generator and end the thread.
            reopen: close the generator and open the next one.
        """
        with self._wish:
            self._pause = self._pause if pause is None else pause
            self._stop = self._stop if stop is None else stop
            self._reopen = self._reopen if reopen is None else reopen
            self._wish.notify_all()

    def wait_for(self, reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until something holds or the thread has ended; return whether it holds.

        Args:
            reached: looked at after every item and change of state.
            timeout: s; None: as long as it takes.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._wish:
            while not reached() and self.busy and time.monotonic() < end:
                self._wish.wait(_POLL)  # short: a wait without an end does not see every Ctrl-C
        return reached()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, or for a time in s."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def raise_error(self) -> None:
        """Raise what the thread raised, once."""
        error, self.error = self.error, None
        if error is not None:
            raise error

    # In the thread.

    def _run(self) -> None:
        try:
            end: State = "stopped" if self._take_all() else "finished"
        except BaseException as error:  # nothing may be lost: `wait` raises it again
            self.error, end = error, "failed"
        self._turn(end)

    def _take_all(self) -> bool:
        """Take items until there are none or a stop is asked for; return whether it was."""
        items = self._make()
        try:
            while not self._wait_while_paused():
                if self._reopen:
                    items.close()
                    items = self._make()
                    self.ask(reopen=False)
                    self._turn(self.state)
                    continue
                try:
                    item = next(items)
                except StopIteration:
                    return False
                self._receive(item)
                with self._wish:
                    self._wish.notify_all()
            return True
        finally:
            items.close()

    def _wait_while_paused(self) -> bool:
        """Wait as long as asked to; return whether to stop."""
        if self._pause and not (self._stop or self._reopen):
            self._turn("paused")
            with self._wish:
                self._wish.wait_for(lambda: not self._pause or self._stop or self._reopen)
        if not self._pause and self.state == "paused":
            self._turn("running")
        return self._stop

    def _turn(self, state: State) -> None:
        self._told, self.state = False, state
        try:
            self._changed()
        except Exception as error:  # a picture that cannot be drawn must not cost a checkpoint
            self.error = self.error or error
        with self._wish:
            self._told = True
            self._wish.notify_all()


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a callback that does not keep its object alive, and does nothing once it is gone."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*arguments)

    return call


@atexit.register
def _stop_all() -> None:
    """Let the threads save their checkpoints before Python ends."""
    workers = list(_alive)
    for worker in workers:
        worker.ask(stop=True)
    for worker in workers:
        worker.join(_FAREWELL)
