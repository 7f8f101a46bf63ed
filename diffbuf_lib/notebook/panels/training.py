"""The training panel: a run with buttons, its loss as it falls, and one clip as it gets cleaner."""

from __future__ import annotations

import time
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch

from diffbuf_lib.config import Config
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.notebook.panels.base import Panel
from diffbuf_lib.notebook.panels.runs import open_run, read_records, remove_run
from diffbuf_lib.notebook.panels.worker import Worker, weakly
from diffbuf_lib.notebook.plots.training import training_progress
from diffbuf_lib.training import StepRecord, load_weights
from diffbuf_lib.training.checkpoint import apply_weights
from diffbuf_lib.training.feed import ClipSource
from diffbuf_lib.training.folder import ResultsFolder

_PICTURE_EVERY = 0.25  # s, at least
_PICTURE_SHARE = 0.2  # of the thread's time that may go into pictures
_LABEL_EVERY = 0.1  # s
_BUTTONS = {
    "start": ("play", "begin the run, or go on from its last checkpoint"),
    "pause": ("pause", "stop after this step and keep everything in memory"),
    "resume": ("forward", "go on after a pause"),
    "stop": ("stop", "end with a checkpoint; Start goes on from it"),
    "save": ("save", "write a checkpoint now and go on"),
}
_panels: weakref.WeakValueDictionary[Path, TrainingPanel] = weakref.WeakValueDictionary()


class TrainingPanel(Panel):
    """`training.train` with Start, Pause, Resume, Stop and Save.

    The run goes on in a thread, so the kernel stays free; but the global random generators are
    shared, so do not make or train other models while it runs (see `training.signals`). A
    stopped run goes on from its checkpoint at the next `start`, also in a new panel over the same
    folder, which takes it over from the panel before.

    Args:
        cfg: the config.
        train_set: `[i] -> (mix, target)`, each [C, T] float32, full scale 1.
        valid_set: the same; None or empty: no validation.
        results_path: the run's folder; see `training.folder`.
        fresh: remove a run that is there, rather than go on with it.
        device: as in `train`.

    Attributes:
        records: a `StepRecord` of every step, of earlier sessions too.
        model: the averaged weights of the last validation; those of the start before it.
        folder: the run's files.

    Raises:
        DataError: the clip that is shown cannot be read.
    """

    def __init__(
        self,
        cfg: Config,
        train_set: ClipSource,
        valid_set: ClipSource | None,
        results_path: str | Path,
        *,
        fresh: bool = False,
        device: str = "auto",
    ) -> None:
        self.cfg, self.folder = cfg, ResultsFolder(results_path)
        _take_over(self.folder.path.resolve(), self)
        if fresh:
            remove_run(results_path)
        self.records = read_records(self.folder)
        clips = valid_set if valid_set is not None and len(valid_set) else train_set
        mix, target = clips[0]
        self.clip = {"mix": mix.mean(0), "target": target.mean(0)}
        self._clip_step: int | None = None
        self.model = DiffusionBufferModel(cfg).eval()
        self._buttons = {name: _button(name) for name in _BUTTONS}
        self._step = _label("diffbuf-step", "260px")
        self._status = _label("diffbuf-status", "600px")
        row = widgets.HBox(list(self._buttons.values()))
        super().__init__(
            [row, widgets.HBox([self._step, self._status])],
            "loss, validation scores and a validation clip of a training run",
        )
        self.image.add_class("diffbuf-picture")
        self._drawn, self._labelled, self._cost = 0.0, 0.0, 0.0
        self._worker: Worker[StepRecord] = Worker(
            partial(open_run, cfg, train_set, valid_set, self.folder, device),
            weakly(self._receive),
            weakly(self._show),
        )
        # Nobody else would end the thread of a panel that is gone.
        weakref.finalize(self, self._worker.ask, stop=True)
        for name, button in self._buttons.items():
            button.on_click(weakly(getattr(self, f"_on_{name}")))
        self._show()

    @property
    def running(self) -> bool:
        """Whether steps are being made."""
        return self._worker.state == "running"

    @property
    def paused(self) -> bool:
        """Whether the run waits for `resume`."""
        return self._worker.state == "paused"

    @property
    def steps(self) -> int:
        """Optimizer steps made so far, in earlier sessions too."""
        return self.records[-1].step if self.records else 0

    def start(self) -> None:
        """Begin the run, or go on from its last checkpoint; a paused run resumes."""
        self._worker.start()
        self._show()

    def pause(self) -> None:
        """Stop making steps; returns when the step that is being made has ended."""
        self._worker.ask(pause=True)
        self._worker.wait_for(lambda: self._worker.resting)
        self.keep_still()

    def resume(self) -> None:
        """Go on after a pause."""
        self._worker.ask(pause=False)
        self._worker.wait_for(lambda: not self.paused)

    def stop(self) -> None:
        """End with a checkpoint, and raise what the thread raised."""
        self._worker.ask(stop=True)
        self.wait()

    def save(self) -> None:
        """Write a checkpoint and go on from it; a run that is not going on has one already."""
        if self._worker.busy:
            self._worker.ask(reopen=True)
            self._worker.wait_for(lambda: not self._worker.reopening)

    def wait(self, step: int | None = None, timeout: float | None = None) -> bool:
        """Wait for a step, or for the end of the run.

        Ctrl-C (the toolbar's interrupt) pauses the run.

        Args:
            step: come back when so many steps are made; None: when the run has ended.
            timeout: s; None: as long as it takes.

        Returns:
            Whether it came to that; not when the time is over or the run is paused.

        Raises:
            Exception: what the thread raised, once.
        """

        def there() -> bool:
            return not self._worker.busy if step is None else self.steps >= step

        try:
            self._worker.wait_for(lambda: there() or self._worker.resting, timeout)
        except KeyboardInterrupt:
            self._worker.ask(pause=True)
            raise
        if not self._worker.busy:
            self._worker.join()
            self._worker.raise_error()
        self.keep_still()
        return there()

    def close(self) -> None:
        """Stop and remove the widgets from the page."""
        self._worker.ask(stop=True)
        self._worker.join()
        for widget in (self.box, self.image, self._step, self._status, *self._buttons.values()):
            widget.close()

    # Buttons: none of them waits, so that the kernel stays free.

    def _on_start(self, _: Any) -> None:
        self.start()

    def _on_pause(self, _: Any) -> None:
        self._worker.ask(pause=True)

    def _on_resume(self, _: Any) -> None:
        self._worker.ask(pause=False)

    def _on_stop(self, _: Any) -> None:
        self._worker.ask(stop=True)

    def _on_save(self, _: Any) -> None:
        self._worker.ask(reopen=self._worker.busy)

    # In the thread, but for the first picture.

    def _receive(self, record: StepRecord) -> None:
        while self.records and self.records[-1].step >= record.step:
            self.records.pop()  # steps after the checkpoint that the run went on from
        self.records.append(record)
        if record.valid is not None:
            self._enhance_clip(record.step)
        now = time.monotonic()
        if now - self._drawn > max(_PICTURE_EVERY, self._cost / _PICTURE_SHARE):
            self._show()
        elif now - self._labelled > _LABEL_EVERY:
            self._write_labels()

    def _enhance_clip(self, step: int) -> None:
        """Enhance the clip with the weights that were validated: a checkpoint has just been made.

        Always with the same noise, so that pictures differ by what was learned.
        """
        apply_weights(self.model, load_weights(self.folder.last), self.folder.last)
        noise = torch.Generator().manual_seed(self.cfg.training.seed)
        estimate = self.model.enhance(self.clip["mix"][None, None], noise)[0, 0]
        self.clip = {"mix": self.clip["mix"], "estimate": estimate, "target": self.clip["target"]}
        self._clip_step = step

    def _show(self) -> None:
        started = time.monotonic()
        self._write_labels()
        for name, button in self._buttons.items():
            button.disabled = not self._is_possible(name)
        metric = self.cfg.training.metric_for_scheduler
        lines = [record.to_dict() for record in self.records]
        self.draw(
            training_progress(
                lines, self.clip, self.cfg.audio, metric=metric, clip_step=self._clip_step
            )
        )
        self._drawn = time.monotonic()
        self._cost = self._drawn - started

    def _is_possible(self, button: str) -> bool:
        possible = {"start": not self._worker.busy, "pause": self.running, "resume": self.paused}
        return possible.get(button, self._worker.busy)

    def _write_labels(self) -> None:
        self._labelled = time.monotonic()
        last = self.records[-1] if self.records else None
        self._step.value = f"step {self.steps}" + (f", epoch {last.epoch}" if last else "")
        self._status.value = self._describe()

    def _describe(self) -> str:
        state, error = self._worker.state, self._worker.error
        if error is not None:
            return f"{state}: {' '.join(str(error).split()) or type(error).__name__}"
        loss = f", loss {self.records[-1].loss:.4g}" if self.records else ""
        hints = {
            "stopped": ": Start goes on from the checkpoint",
            "finished": ": raise training.num_epochs or num_steps to go on",
        }
        return f"{state}{loss}{hints.get(state, '')}"


def _take_over(path: Path, panel: TrainingPanel) -> None:
    """Make a panel the one of its folder: two runs cannot share it."""
    before = _panels.get(path)
    if before is not None:
        before.close()
    _panels[path] = panel


def _button(name: str) -> widgets.Button:
    icon, tooltip = _BUTTONS[name]
    button = widgets.Button(
        description=name.capitalize(),
        icon=icon,
        tooltip=tooltip,
        layout=widgets.Layout(width="110px"),
    )
    button.add_class(f"diffbuf-{name}")
    return button


def _label(name: str, width: str) -> widgets.Label:
    label = widgets.Label(layout=widgets.Layout(width=width))
    label.add_class(name)
    return label
