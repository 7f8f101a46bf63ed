"""A picture with controls around it, and one that shows a thread controlled by buttons.

A loop in a notebook's main thread would block the kernel: no button would work until it ends.
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

from diffbuf_lib.figures import to_png

Item = TypeVar("Item")
State = Literal["ready", "running", "paused", "stopped", "finished", "failed"]

_NOTHING = {"pause": False, "stop": False, "reopen": False}
_ONLY_PAUSE = {**_NOTHING, "pause": True}
_POLL = 0.01  # s; how often requests and news are checked
_FAREWELL = 10.0  # s that a thread gets to write its checkpoint when Python ends
_REQUESTS = {
    "pause": {"pause": True},
    "resume": {"pause": False},
    "stop": {"stop": True},
    "save": {"reopen": True},
}


def to_jpeg(figure: Figure) -> bytes:
    """Return the figure as a JPEG file's bytes: a tenth of a spectrogram's PNG."""
    return to_png(figure, format="jpeg", pil_kwargs={"quality": 88})


class Panel:
    """Rows of widgets over one picture, described in words for readers who cannot see it.

    Both are displayed as one bundle, so a page that cannot run widgets (a rendered notebook, a code
    host) shows the picture alone.
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
        """Show a figure in place of the previous one; safe in any thread."""
        self.image.value = to_jpeg(figure)

    def keep_still(self) -> None:
        """Let pages without widgets show the current picture; call it in the kernel's thread."""
        if self._handle is not None:
            self._handle.update(self.bundle(), raw=True)

    def bundle(self) -> dict[str, Any]:
        """Return the panel by MIME type: widgets, picture and words."""
        picture = base64.b64encode(self.image.value).decode()
        words = f"<panel: {self.description}>"
        return {**self.box._repr_mimebundle_(), "image/jpeg": picture, "text/plain": words}

    def _ipython_display_(self) -> None:
        self._handle = display(self.bundle(), raw=True, display_id=True)
        self.box.panel = self  # keeps a displayed panel alive, even without a variable


class WorkerPanel(Panel, Generic[Item]):
    """A panel over a generator in a daemon thread; requests are handled between two items.

    Subclasses open the generator, handle its items and show its progress, all in the thread.
    `buttons` are start, stop, and optionally pause, resume, save, each with icon and tooltip.
    """

    def __init__(
        self,
        buttons: Mapping[str, tuple[str, str]],
        beside: Sequence[widgets.Widget],
        below: Sequence[widgets.Widget],
        description: str,
    ) -> None:
        self.buttons: dict[str, widgets.Button] = {}
        for name, (icon, tooltip) in buttons.items():
            look = {"icon": icon, "tooltip": tooltip, "layout": widgets.Layout(width="110px")}
            self.buttons[name] = widgets.Button(description=name.capitalize(), **look)
            self.buttons[name].add_class(f"diffbuf-{name}")
            self.buttons[name].on_click(self._pressed)
        super().__init__([widgets.HBox([*self.buttons.values(), *beside]), *below], description)
        self.state: State = "ready"
        self.error: BaseException | None = None  # until `wait_for` has raised it again
        self._wishes = dict(_NOTHING)  # requests that are neither withdrawn nor done
        self._shown = True  # whether the state has been shown since it changed
        self._thread = threading.Thread()

    def _open(self) -> Generator[Item, None, None]:
        raise NotImplementedError

    def _receive(self, item: Item) -> None:
        raise NotImplementedError

    def _show(self) -> None:
        raise NotImplementedError

    @property
    def busy(self) -> bool:
        """Whether there are items to come: running or paused."""
        return self.state in ("running", "paused")

    @property
    def resting(self) -> bool:
        """Whether it is paused, shows that, and stays paused until the next request."""
        return self.state == "paused" and self._shown and self._wishes == _ONLY_PAUSE

    def start(self) -> None:
        """Open the generator, or go on after a pause."""
        if self.busy and not self._wishes["stop"]:
            self.ask(pause=False)
        else:
            self.join()
            self.ask(**_NOTHING)
            self.error, self.state = None, "running"
            self._thread = threading.Thread(target=self._run, name="diffbuf-worker", daemon=True)
            _panels.add(self)
            self._thread.start()
        self._show()

    def stop(self) -> None:
        """End, and raise what the thread raised."""
        self.ask(stop=True)
        self.wait()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait for the end, at most `timeout` s; raise what the thread raised, once."""
        return self.wait_for(lambda: not self.busy, timeout)

    def ask(self, **wishes: bool) -> None:
        """Request something without waiting: pause, stop, or reopen (close, open the next)."""
        self._wishes.update(wishes)

    def wait_for(self, reached: Callable[[], bool], timeout: float | None = None) -> bool:
        """Wait as `wait` does, until something holds or the thread has ended."""
        end = math.inf if timeout is None else time.monotonic() + timeout
        while not reached() and self.busy and time.monotonic() < end:
            time.sleep(_POLL)
        if not self.busy:
            self.join()
            error, self.error = self.error, None
            if error is not None:
                raise error
        self.keep_still()
        return reached()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, or for a time in s; raises nothing."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _pressed(self, button: widgets.Button) -> None:
        """Do what a button asks for, without waiting: the kernel stays free."""
        name = button.description.lower()
        if name == "start":
            self.start()
        else:
            self.ask(**_REQUESTS[name])

    # In the thread.

    def _run(self) -> None:
        try:
            end: State = "stopped" if self._take_all() else "finished"
        except BaseException as error:  # nothing may be lost: `wait_for` raises it again
            self.error, end = error, "failed"
        self._turn(end)

    def _take_all(self) -> bool:
        """Take items until there are none or a stop is requested; return whether it was."""
        items = self._open()
        try:
            while not self._wait_while_paused():
                if self._wishes["reopen"]:
                    items.close()
                    items = self._open()
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
        """Wait while paused; return whether to stop."""
        while self._wishes == _ONLY_PAUSE:
            if self.state != "paused":
                self._turn("paused")
            time.sleep(_POLL)
        if self.state == "paused" and not self._wishes["pause"]:
            self._turn("running")
        return self._wishes["stop"]

    def _turn(self, state: State) -> None:
        self._shown, self.state = False, state
        try:
            self._show()
        except Exception as error:  # a picture that cannot be drawn must not cost a checkpoint
            self.error = self.error or error
        self._shown = True


def label(name: str, width: str) -> widgets.Label:
    """Return a line of text with a CSS class of its own."""
    line = widgets.Label(layout=widgets.Layout(width=width))
    line.add_class(f"diffbuf-{name}")
    return line


_panels: weakref.WeakSet[WorkerPanel[Any]] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    """Let the threads save their checkpoints before Python ends."""
    panels = list(_panels)
    for panel in panels:
        panel.ask(stop=True)
    for panel in panels:
        panel.join(_FAREWELL)
