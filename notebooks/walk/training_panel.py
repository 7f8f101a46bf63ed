"""The training panel: a run with buttons, its loss as it falls, and one clip as it gets cleaner."""

from __future__ import annotations

import html
import shutil
import time
import weakref
from collections.abc import Generator
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import torch

from diffbuf_lib.config import Config
from diffbuf_lib.model import DiffusionBufferModel
from diffbuf_lib.training import StepRecord, load_weights, train
from diffbuf_lib.training.feed import ClipSource
from diffbuf_lib.training.folder import ResultsFolder, apply_weights, read_history
from diffbuf_lib.training.trackers import NOTES, tracked
from recipes.demo.progress import training_progress
from walk.panels import WorkerPanel, label

_PICTURE_EVERY = 0.25  # s, at least
_PICTURE_SHARE = 0.2  # of the thread's time that may be spent on pictures
_RECENT = 20  # steps over which the time waiting for data is summed
_BUTTONS = {
    "start": ("play", "begin the run, or go on from its last checkpoint"),
    "pause": ("pause", "stop after this step and keep everything in memory"),
    "resume": ("forward", "go on after a pause"),
    "stop": ("stop", "end with a checkpoint; Start goes on from it"),
    "save": ("save", "write a checkpoint now and go on"),
}
_HINTS = {
    "stopped": ": Start goes on from the checkpoint",
    "finished": ": raise training.num_epochs or num_steps to go on",
}
_panels: weakref.WeakValueDictionary[Path, TrainingPanel] = weakref.WeakValueDictionary()


class TrainingPanel(WorkerPanel[StepRecord]):
    """`training.train` with Start, Pause, Resume, Stop and Save; arguments as there.

    The run is in a thread, so the kernel stays free; but the global random generators are shared,
    so do not create or train other models while it runs. A stopped run continues from its
    checkpoint at the next `start`, also in a new panel over the same folder, which takes it over
    from the previous panel; `fresh` removes it instead.

    Attributes:
        records: a `StepRecord` of every step, of earlier sessions too.
        model: the averaged weights of the last validation; before it, the initial weights.
        folder: the run's files.
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
        self.cfg, self.folder, self.device = cfg, ResultsFolder(results_path), device
        self.train_set, self.valid_set = train_set, valid_set
        path = self.folder.path.resolve()
        if path in _panels:  # two runs cannot share a folder
            _panels[path].close()
        _panels[path] = self
        if fresh:
            remove_run(results_path)
        self.records = _read_records(self.folder)
        mix, target = (valid_set if valid_set is not None and len(valid_set) else train_set)[0]
        self.clip = {"mix": mix.mean(0), "target": target.mean(0)}
        self.clip_step: int | None = None
        self.model = DiffusionBufferModel(cfg).eval()
        self.step_label, self.status = label("step", "260px"), label("status", "600px")
        self.links = widgets.HTML()
        self._drawn, self._cost = 0.0, 0.0
        labels = widgets.HBox([self.step_label, self.status])
        description = "loss, validation scores and a validation clip of a training run"
        super().__init__(_BUTTONS, [], [labels, self.links], description)
        self._show()

    @property
    def running(self) -> bool:
        """Whether steps are being made."""
        return self.state == "running"

    @property
    def paused(self) -> bool:
        """Whether the run waits for `resume`."""
        return self.state == "paused"

    @property
    def steps(self) -> int:
        """Optimizer steps made so far, in earlier sessions too."""
        return self.records[-1].step if self.records else 0

    def pause(self) -> None:
        """Stop making steps; returns when the current step has ended."""
        self.ask(pause=True)
        self.wait_for(lambda: self.resting)

    def resume(self) -> None:
        """Go on after a pause."""
        self.ask(pause=False)
        self.wait_for(lambda: not self.paused)

    def save(self) -> None:
        """Write a checkpoint and continue; a run that is not active already has one."""
        if self.busy:
            self.ask(reopen=True)
            self.wait_for(lambda: not self._wishes["reopen"])

    def wait(self, timeout: float | None = None, *, step: int | None = None) -> bool:
        """Wait for a step or the end of the run, at most `timeout` s; return whether it came.

        It does not if the run is paused, as by Ctrl-C (the toolbar's interrupt). An error in the
        thread is raised here, once.
        """

        def there() -> bool:
            return not self.busy if step is None else self.steps >= step

        try:
            self.wait_for(lambda: there() or self.resting, timeout)
        except KeyboardInterrupt:
            self.ask(pause=True)
            raise
        return there()

    def close(self) -> None:
        """Stop and remove the widgets from the page."""
        self.ask(stop=True)
        self.join()
        labels = self.step_label, self.status, self.links
        for widget in (self.box, self.image, *labels, *self.buttons.values()):
            widget.close()

    def _open(self) -> Generator[StepRecord, None, None]:
        path, resume = self.folder.path, self.folder.last.is_file()
        clips = self.train_set, self.valid_set
        return train(self.cfg, *clips, path, resume=resume, device=self.device)

    def _receive(self, record: StepRecord) -> None:
        while self.records and self.records[-1].step >= record.step:
            self.records.pop()  # steps after the checkpoint that the run resumed from
        self.records.append(record)
        if record.valid is not None:
            self._enhance_clip(record.step)
        if time.monotonic() - self._drawn > max(_PICTURE_EVERY, self._cost / _PICTURE_SHARE):
            self._show()

    def _enhance_clip(self, step: int) -> None:
        """Enhance the clip with the weights just validated and saved, with fixed noise."""
        apply_weights(self.model, load_weights(self.folder.last), self.folder.last)
        noise = torch.Generator().manual_seed(self.cfg.training.seed)
        estimate = self.model.enhance(self.clip["mix"][None, None], noise)[0, 0]
        self.clip = {"mix": self.clip["mix"], "estimate": estimate, "target": self.clip["target"]}
        self.clip_step = step

    def _show(self) -> None:
        started = time.monotonic()
        last = self.records[-1] if self.records else None
        self.step_label.value = f"step {self.steps}" + (f", epoch {last.epoch}" if last else "")
        text = (f", loss {last.loss:.4g}" if last else "") + _waiting(self.records[-_RECENT:])
        text += _HINTS.get(self.state, "")
        if self.error is not None:
            text = f": {' '.join(str(self.error).split()) or type(self.error).__name__}"
        self.status.value = self.state + text
        self.links.value = "; ".join(_link(*run) for run in tracked(self.folder.path).items())
        ready, busy = {"pause": self.running, "resume": self.paused}, self.busy
        for name, button in self.buttons.items():
            button.disabled = busy if name == "start" else not ready.get(name, busy)
        lines, audio = [record.to_dict() for record in self.records], self.cfg.audio
        metric, step = self.cfg.training.metric_for_scheduler, self.clip_step
        self.draw(training_progress(lines, self.clip, audio, metric=metric, clip_step=step))
        self._drawn = time.monotonic()
        self._cost = self._drawn - started


def remove_run(results_path: str | Path) -> None:
    """Remove the files of a run (some may be missing), and nothing else in its folder."""
    folder = ResultsFolder(results_path)
    capsules = folder.path.glob("capsule_*")
    wandb = folder.path / "wandb"
    for path in (folder.last.parent, folder.model, folder.tensorboard, wandb, *capsules):
        shutil.rmtree(path, ignore_errors=True)
    for file in (folder.config, folder.history, folder.path / NOTES):
        file.unlink(missing_ok=True)


def _waiting(records: list[StepRecord]) -> str:
    """Return the share of their time that some steps waited for data."""
    total = sum(record.seconds for record in records)
    share = sum(record.waited for record in records) / total if total else 0
    return f", {share:.0%} of the time waiting for data" if total else ""


def _link(service: str, run: dict[str, str]) -> str:
    """Return where a service shows a run, as HTML: an address, or the command to type."""
    link = html.escape(run["link"])
    address = f'<a href="{link}" target="_blank">{link}</a>'
    shown = address if "://" in link else f"<code>{link}</code>"
    return f"{service}: {shown}"


def _read_records(folder: ResultsFolder) -> list[StepRecord]:
    """Return the steps of a run's history, each with the validation that followed it."""
    records: dict[int, dict[str, Any]] = {}
    for line in read_history(folder.history):
        if "loss" in line:
            numbers = {key: float("nan") for key, value in line.items() if value is None}
            records[line["step"]] = {**line, **numbers}
        elif line["step"] in records:
            records[line["step"]]["valid"] = line["valid"]
    return [StepRecord(**fields) for fields in records.values()]
