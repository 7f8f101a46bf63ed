"""A picture with controls around it, and one whose numbers come from a thread with buttons.

A loop in a notebook's main thread would hold the kernel: no button would work until it ends.
"""

from __future__ import annotations

import atexit
import base64
import math
import threading
import time
import weakref
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import ipywidgets as widgets
from IPython.display import DisplayHandle, display
from matplotlib.figure import Figure

from diffbuf_lib.figures import to_jpeg

Item = TypeVar("Item")
State = Literal["ready", "running", "paused", "stopped", "finished", "failed"]

_NOTHING = {"pause": False, "stop": False, "reopen": False}
_ONLY_PAUSE = {**_NOTHING, "pause": True}
_POLL = 0.01  # s; how soon a request or a news is seen
_FAREWELL = 10.0  # s that a thread has for its checkpoint when Python ends
_REQUESTS = {
    "pause": {"pause": True},
    "resume": {"pause": False},
    "stop": {"stop": True},
    "save": {"reopen": True},
}


class Panel:
    """Widgets over one picture.

    It is displayed as one bundle of both, since a page that runs no widgets (a rendered notebook,
    a code host) shows the picture alone.

    Args:
        controls: rows of widgets above the picture.
        description: in a few words what the picture shows, for readers who cannot see it.
    """

    def __init__(self, controls: Sequence[widgets.Widget], description: str) -> None:
        self.description = description
        # Without a width JupyterLab draws an image at its size in pixels, past the page's edge. And
        # with a tooltip it draws none: the widget's view then asks for a description.
        layout = widgets.Layout(width="100%", max_width="1000px", margin="0")
        self.image = widgets.Image(format="jpeg", layout=layout)
        self.image.add_class("diffbuf-picture")
        self.box = widgets.VBox([*controls, self.image])
        self._handle: DisplayHandle | None = None

    def draw(self, figure: Figure) -> None:
        """Show a figure in place of the one before; safe in any thread."""
        self.image.value = to_jpeg(figure)

    def keep_still(self) -> None:
        """Let pages without widgets show the current picture; only from the kernel's thread."""
        if self._handle is not None:
            self._handle.update(self.bundle(), raw=True)

    def bundle(self) -> dict[str, Any]:
        """Return the panel by MIME type: widgets, picture and words."""
        picture = base64.b64encode(self.image.value).decode()
        words = f"<panel: {self.description}>"
        return {**self.box._repr_mimebundle_(), "image/jpeg": picture, "text/plain": words}

    def _ipython_display_(self) -> None:
        self._handle = display(self.bundle(), raw=True, display_id=True)
        self.box.panel = self  # what is on the page stays alive, with or without a name


class Worker(Generic[Item]):
    """Takes items from a generator in a daemon thread; meets requests between two items.

    All three functions are called in the thread: `make` opens the generator, `receive` takes an
    item, `changed` shows a new state.
    """

    def __init__(
        self,
        make: Callable[[], Generator[Item, None, None]],
        receive: Callable[[Item], None],
        changed: Callable[[], None],
    ) -> None:
        self._make, self._receive, self._changed = make, receive, changed
        self._thread: threading.Thread | None = None
        self._told = True  # whether `changed` has been called since the state changed
        self.wishes = dict(_NOTHING)  # what was asked for and is not withdrawn or done
        self.state: State = "ready"
        self.error: BaseException | None = None  # until `raise_error` has raised it again

    @property
    def busy(self) -> bool:
        """Whether there are items to come: running or paused."""
        return self.state in ("running", "paused")

    @property
    def resting(self) -> bool:
        """Whether it is paused, has said so, and stays so until somebody asks for something."""
        return self.state == "paused" and self._told and self.wishes == _ONLY_PAUSE

    def start(self) -> None:
        """Open the generator and go on with it; a paused worker resumes, a running one runs on."""
        if self.busy and not self.wishes["stop"]:
            self.ask(pause=False)
            return
        self.join()
        self.ask(**_NOTHING)
        self.error, self.state = None, "running"
        self._thread = threading.Thread(target=self._run, name="diffbuf-worker", daemon=True)
        _alive.add(self)
        self._thread.start()

    def ask(self, **wishes: bool) -> None:
        """Ask for something without waiting: pause, stop, or reopen (close, open the next)."""
        self.wishes.update(wishes)

    def wait_for(self, reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait, at most `timeout` s, until something holds or the thread has ended."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not reached() and self.busy and time.monotonic() < end:
            time.sleep(_POLL)
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
                if self.wishes["reopen"]:
                    items.close()
                    items = self._make()
                    self.ask(reopen=False)
                    self._turn(self.state)
                elif (item := next(items, None)) is None:
                    return False
                else:
                    self._receive(item)
            return True
        finally:
            items.close()

    def _wait_while_paused(self) -> bool:
        """Wait as long as asked to; return whether to stop."""
        while self.wishes == _ONLY_PAUSE:
            if self.state != "paused":
                self._turn("paused")
            time.sleep(_POLL)
        if self.state == "paused" and not self.wishes["pause"]:
            self._turn("running")
        return self.wishes["stop"]

    def _turn(self, state: State) -> None:
        self._told, self.state = False, state
        try:
            self._changed()
        except Exception as error:  # a picture that cannot be drawn must not cost a checkpoint
            self.error = self.error or error
        self._told = True


class WorkerPanel(Panel, Generic[Item]):
    """A panel over a worker: subclasses say what its items are and what is shown of them.

    `make` must not hold the panel; `buttons` gives icon and tooltip by name: start, stop, and maybe
    pause, resume, save; `beside` and `below` are widgets next to them.
    """

    def __init__(
        self,
        make: Callable[[], Generator[Item, None, None]],
        buttons: Mapping[str, tuple[str, str]],
        beside: Sequence[widgets.Widget],
        below: Sequence[widgets.Widget],
        description: str,
    ) -> None:
        self.buttons = {name: _button(name, *look) for name, look in buttons.items()}
        super().__init__([widgets.HBox([*self.buttons.values(), *beside]), *below], description)
        self.worker = Worker(make, weakly(self._receive), weakly(self._turned))
        weakref.finalize(self, self.worker.ask, stop=True)  # else its thread would outlive it
        for button in self.buttons.values():
            button.on_click(weakly(self._pressed))

    def start(self) -> None:
        """Begin, or go on with what is there."""
        self.worker.start()
        self._show()

    def stop(self) -> None:
        """End, and raise what the thread raised."""
        self.worker.ask(stop=True)
        self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` s; raise what the thread raised, once."""
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
            self.worker.ask(**_REQUESTS[name])

    def _receive(self, item: Item) -> None:
        """Take an item; in the thread."""
        raise NotImplementedError

    def _turned(self) -> None:
        """Show a new state; in the thread."""
        self._show()

    def _show(self) -> None:
        raise NotImplementedError


def weakly(method: Callable[..., None]) -> Callable[..., None]:
    """Return a callback that does not keep its object alive, and does nothing once it is gone."""
    reference = weakref.WeakMethod(method)

    def call(*arguments: Any) -> None:
        bound = reference()
        if bound is not None:
            bound(*arguments)

    return call


def slider_look(description: str, width: int = 310) -> dict[str, Any]:
    """Return what all sliders share: they act when they are let go; three of 310 px fit a page."""
    return {
        "description": description,
        "continuous_update": False,
        "style": {"description_width": "80px"},
        "layout": widgets.Layout(width=f"{width}px"),
    }


def label(name: str, width: str) -> widgets.Label:
    """Return a line of text with a CSS class of its own."""
    line = widgets.Label(layout=widgets.Layout(width=width))
    line.add_class(f"diffbuf-{name}")
    return line


def _button(name: str, icon: str, tooltip: str) -> widgets.Button:
    look = {"icon": icon, "tooltip": tooltip, "layout": widgets.Layout(width="110px")}
    button = widgets.Button(description=name.capitalize(), **look)
    button.add_class(f"diffbuf-{name}")
    return button


_alive: weakref.WeakSet[Worker[Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Let the threads save their checkpoints before Python ends."""
    workers = list(_alive)
    for worker in workers:
        worker.ask(stop=True)
    for worker in workers:
        worker.join(_FAREWELL)
