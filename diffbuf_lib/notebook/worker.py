"""A generator that runs in a thread of its own, and a panel with buttons to start and stop it.

A loop in a notebook's main thread holds the kernel, so that no button works until it ends.
"""

from __future__ import annotations

import atexit
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import ipywidgets as widgets

from diffbuf_lib.notebook.panels import Panel

Item = TypeVar("Item")
State = Literal["ready", "running", "paused", "stopped", "finished", "failed"]

_NOTHING = {"pause": False, "stop": False, "reopen": False}
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
        error: what the thread raised, until `raise_error` has raised it again.
    """

    def __init__(
        self,
        make: Callable[[], Generator[Item, None, None]],
        receive: Callable[[Item], None],
        changed: Callable[[], None],
    ) -> None:
        self._make, self._receive, self._changed = make, receive, changed
        self._news = threading.Condition()  # guards what is asked for, below
        self._wishes = dict(_NOTHING)
        self._thread: threading.Thread | None = None
        self._told = True  # whether `changed` has been called since the state changed
        self.state: State = "ready"
        self.error: BaseException | None = None

    @property
    def busy(self) -> bool:
        """Whether there are items to come: running or paused."""
        return self.state in ("running", "paused")

    @property
    def reopening(self) -> bool:
        """Whether `reopen` was asked for and is still to be done."""
        return self._wishes["reopen"]

    @property
    def resting(self) -> bool:
        """Whether it is paused, has said so, and stays so until somebody asks for something."""
        return self.state == "paused" and self._told and self._wishes == {**_NOTHING, "pause": True}

    def start(self) -> None:
        """Open the generator and go on with it; a paused worker resumes, a running one runs on."""
        if self.busy and not self._wishes["stop"]:
            self.ask(pause=False)
            return
        self.join()
        self._wishes = dict(_NOTHING)
        self.error, self.state = None, "running"
        self._thread = threading.Thread(target=self._run, name="diffbuf-worker", daemon=True)
        _alive.add(self)
        self._thread.start()

    def ask(self, **wishes: bool) -> None:
        """Ask for something without waiting for it; what is not given stays as it was.

        Args:
            wishes: `pause`: take no item until this is False again; `stop`: close the generator
                and end the thread; `reopen`: close the generator and open the next one.
        """
        with self._news:
            self._wishes.update(wishes)
            self._news.notify_all()

    def wait_for(self, reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait until something holds or the thread has ended; return whether it holds.

        Args:
            reached: looked at after every item and change of state.
            timeout: s; None: as long as it takes.
        """
        end = math.inf if timeout is None else time.monotonic() + timeout
        with self._news:
            while not reached() and self.busy and time.monotonic() < end:
                self._news.wait(_POLL)  # short: a wait without an end does not see every Ctrl-C
        return reached()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, or for a time in s."""
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def raise_error(self) -> None:
        """Wait for the thread's end, and raise what it raised, once."""
        self.join()
        error, self.error = self.error, None
        if error is not None:
            raise error

    # In the thread.

    def _run(self) -> None:
        try:
            end: State = "stopped" if self._take_all() else "finished"
        except BaseException as error:  # nothing may be lost: `raise_error` raises it again
            self.error, end = error, "failed"
        self._turn(end)

    def _take_all(self) -> bool:
        """Take items until there are none or a stop is asked for; return whether it was."""
        items = self._make()
        try:
            while not self._wait_while_paused():
                if self.reopening:
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
                with self._news:
                    self._news.notify_all()
            return True
        finally:
            items.close()

    def _wait_while_paused(self) -> bool:
        """Wait as long as asked to; return whether to stop."""
        only_pause = {**_NOTHING, "pause": True}
        if self._wishes == only_pause:
            self._turn("paused")
            with self._news:
                self._news.wait_for(lambda: self._wishes != only_pause)
        if not self._wishes["pause"] and self.state == "paused":
            self._turn("running")
        return self._wishes["stop"]

    def _turn(self, state: State) -> None:
        self._told, self.state = False, state
        try:
            self._changed()
        except Exception as error:  # a picture that cannot be drawn must not cost a checkpoint
            self.error = self.error or error
        with self._news:
            self._told = True
            self._news.notify_all()


class WorkerPanel(Panel, Generic[Item]):
    """A panel over a worker: subclasses say what its items are and what is shown of them.

    Args:
        make: opens the worker's generator; must not hold the panel.
        buttons: icon and tooltip by name: start, stop, and maybe pause, resume, save.
        beside: widgets in the row of the buttons.
        below: rows between the buttons and the picture.
        description: of the picture.

    Attributes:
        buttons: by name.
    """

    _REQUESTS: Mapping[str, dict[str, bool]] = {
        "pause": {"pause": True},
        "resume": {"pause": False},
        "stop": {"stop": True},
        "save": {"reopen": True},
    }

    def __init__(
        self,
        make: Callable[[], Generator[Item, None, None]],
        buttons: Mapping[str, tuple[str, str]],
        beside: Sequence[widgets.Widget],
        below: Sequence[widgets.Widget],
        description: str,
    ) -> None:
        self.buttons = {name: _button(name, *look) for name, look in buttons.items()}
        row = widgets.HBox([*self.buttons.values(), *beside])
        super().__init__([row, *below], description)
        self.worker = Worker(make, weakly(self._receive), weakly(self._turned))
        # Nobody else would end the thread of a panel that is gone.
        weakref.finalize(self, self.worker.ask, stop=True)
        for button in self.buttons.values():
            button.on_click(weakly(self._pressed))

    def start(self) -> None:
        """Begin, or go on after a pause."""
        self.worker.start()

    def stop(self) -> None:
        """End, and raise what the thread raised."""
        self.worker.ask(stop=True)
        self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, for at most a time in s; return whether it has come.

        Raises:
            Exception: what the thread raised, once.
        """
        ended = self.worker.wait_for(lambda: not self.worker.busy, timeout)
        if ended:
            self.worker.raise_error()
            self.keep_still()
        return ended

    def _pressed(self, button: widgets.Button) -> None:
        """Do what a button says, without waiting: the kernel stays free."""
        name = button.description.lower()
        if name == "start":
            self.start()
        else:
            self.worker.ask(**self._REQUESTS[name])

    def _receive(self, item: Item) -> None:
        """Take an item; in the thread."""
        raise NotImplementedError

    def _turned(self) -> None:
        """Show a new state; in the thread."""
        raise NotImplementedError


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a callback that does not keep its object alive, and does nothing once it is gone."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*arguments)

    return call


def _button(name: str, icon: str, tooltip: str) -> widgets.Button:
    layout = widgets.Layout(width="110px")
    button = widgets.Button(
        description=name.capitalize(), icon=icon, tooltip=tooltip, layout=layout
    )
    button.add_class(f"diffbuf-{name}")
    return button


@atexit.register
def _stop_all() -> None:
    """Let the threads save their checkpoints before Python ends."""
    workers = list(_alive)
    for worker in workers:
        worker.ask(stop=True)
    for worker in workers:
        worker.join(_FAREWELL)
