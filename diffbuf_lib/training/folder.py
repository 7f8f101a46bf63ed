"""The results folder: what is in it, and when a run may start or go on there.

config.yaml           the whole config, defaults filled in
history.jsonl         one line a step and a validation
checkpoints/last.pt   to go on from, written at step 0, at every epoch's end and on a stop
checkpoints/best.pt   the same, of the best validation
model/                averaged weights of the best validation, for `from_pretrained`
tensorboard/          event files
capsule_<step>/       a failed step, to be replayed; see `training.failure`
.lock                 while a run goes on here
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import filelock
import torch

from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import wait_for_disk
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.figures import spectrograms, to_pixels
from diffbuf_lib.trace import to_plain
from diffbuf_lib.training.checkpoint import load_checkpoint, replaced_file, unwritable
from diffbuf_lib.training.step import StepRecord, Validation

CHANGEABLE = {
    "training.num_epochs": "where the run ends does not change the steps before; but see below",
    "training.num_steps": "as num_epochs",
    "training.early_stopping": "as num_epochs",
    "training.num_workers": "clips are keyed by (epoch, index), not by who reads them",
    "training.log_every": "only what is written down",
    "training.checkpoint_every": "only what is written down",
    "training.on_nonfinite": "what happens next time does not change the steps before",
    "training.max_skipped": "as on_nonfinite",
    "training.valid_clips": "scores before and after compare less well, but the user decides",
}
"""Config keys that a resumed run may change, and why; all others would make it another run."""

_ENDS = ("training.num_epochs", "training.num_steps")  # a linear learning rate goes by them


class ResultsFolder:
    """The paths of one run.

    Args:
        path: the results folder; made if needed.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.jsonl"
        self.last = self.path / "checkpoints" / "last.pt"
        self.best = self.path / "checkpoints" / "best.pt"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"

    def check_fresh(self) -> None:
        """Check that no run lives here.

        Raises:
            CheckpointError: one does; it says how to go on or where else to go.
        """
        for file in (self.config, self.history, self.last):
            if file.exists():
                raise CheckpointError(
                    f"results folder {self.path} already holds a run ({file.name}): add --resume "
                    "to go on with it, or choose another --results_path"
                )

    def load_last(self, cfg: Config) -> dict[str, Any]:
        """Return last.pt, after checking that its run had this config.

        Raises:
            CheckpointError: nothing to resume, an unreadable file, or another config.
        """
        if not self.last.is_file():
            raise CheckpointError(
                f"results folder {self.path} holds no checkpoints/last.pt to resume: check "
                "--results_path, or leave out --resume to start there"
            )
        state = load_checkpoint(self.last)
        check_same_config(state["config"], cfg.to_dict(), self.path)
        return state

    def write_config(self, cfg: Config) -> None:
        """Write config.yaml."""
        with replaced_file(self.config) as file:
            file.write(cfg.to_yaml().encode())

    def truncate_history(self, step: int, *, validated: bool) -> None:
        """Drop what the history holds of steps after a checkpoint.

        So the curve of a resumed run is that of one that was never stopped.

        Args:
            step: of the checkpoint.
            validated: whether the checkpoint comes after that step's validation; if not, a
                validation of that very step will be made again.
        """

        def stays(line: dict[str, Any]) -> bool:
            repeated = "valid" in line and (line["final"] or not validated)
            return line["step"] < step or (line["step"] == step and not repeated)

        kept = [line for line in read_history(self.history) if stays(line)]
        with replaced_file(self.history) as file:
            file.write("".join(json.dumps(line) + "\n" for line in kept).encode())

    def export_model(self, model: Any) -> None:
        """Write model/ through `save_pretrained`: the folder is the old or the new one.

        Raises:
            CheckpointError: it cannot be written.
        """
        new, old = self.path / ".model.new", self.path / ".model.old"
        try:
            shutil.rmtree(new, ignore_errors=True)
            shutil.rmtree(old, ignore_errors=True)
            model.save_pretrained(new)
            wait_for_disk(new)
            if self.model.exists():
                self.model.rename(old)
            new.rename(self.model)
            wait_for_disk(self.path)
        except OSError as error:
            self.tidy()
            raise unwritable(self.model, error) from error
        shutil.rmtree(old, ignore_errors=True)

    def tidy(self) -> None:
        """Finish what a killed run left half done: temporary files and a half-made swap."""
        new, old = self.path / ".model.new", self.path / ".model.old"
        if old.exists() and not self.model.exists():
            old.rename(self.model)
        for left in (new, old, *self.path.glob(".capsule_*.tmp")):
            shutil.rmtree(left, ignore_errors=True)
        for folder in (self.path, self.last.parent):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)


def check_same_config(old: Mapping[str, Any], new: Mapping[str, Any], path: Path) -> None:
    """Check that two configs differ at most in the `CHANGEABLE` keys.

    Args:
        old: nested dictionaries, of the checkpoint.
        new: nested dictionaries, of the run that wants to go on.
        path: what the message calls the folder.

    Raises:
        CheckpointError: they differ; names up to three keys with both values.
    """
    before, after = dict(_flat(old)), dict(_flat(new))
    linear = "linear" in (before.get("training.lr_schedule"), after.get("training.lr_schedule"))
    fixed = _ENDS if linear else ()
    changed = [
        f"{key} was {str(before.get(key, 'not there'))[:80]}, is {after.get(key, 'not there')}"
        for key in {**before, **after}
        if (key in fixed or key not in CHANGEABLE) and before.get(key) != after.get(key)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"results folder {path} holds a run of another config: {'; '.join(changed[:3])}{more}. "
            "Set them back, or choose another --results_path (--start_check_point takes over the "
            "weights)"
        )


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def read_history(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a history.jsonl, up to one that was cut off while it was written.

    A line of a step has step, epoch, loss, grad_norm, lr, seconds, skipped; one of a validation
    has step, epoch, valid and final (made at the end of a run within an epoch). A number that was
    not finite is None.
    """
    path = Path(path)
    if not path.is_file():
        return
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            try:
                content = json.loads(line)
            except (ValueError, RecursionError):
                return
            if not isinstance(content, dict) or not isinstance(content.get("step"), int):
                return
            if "valid" in content and "final" not in content:
                return
            yield content


class FolderLock:
    """One run at a time in a results folder, until its process ends, however it ends.

    What counts is the system's lock on the file, not the file: one that a killed run has left
    behind stops nobody. A forked reader that outlives its run does not hold the lock, since
    filelock closes the descriptor in forked children.

    Args:
        folder: the results folder; made if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._lock = filelock.FileLock(
            self.path, timeout=0, thread_local=False, fallback_to_soft=False
        )

    def acquire(self) -> None:
        """Take the lock, or go on without one on a file system that has none.

        Raises:
            CheckpointError: another process has it, or the folder cannot be written.
        """
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self.path.write_text(f"{os.getpid()}\n")  # for the message
        except filelock.Timeout:
            raise CheckpointError(
                f"results folder {folder} is in use by another run ({self._owner()}): wait for "
                "it, stop it, or choose another --results_path"
            ) from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return  # some network file systems
            raise CheckpointError(
                f"results folder {folder} cannot be written ({error.strerror}): choose another "
                "--results_path"
            ) from error

    def release(self) -> None:
        """Remove the file and give the lock back; without a lock, do nothing."""
        if self._lock.is_locked:
            self.path.unlink(missing_ok=True)
            self._lock.release()

    def _owner(self) -> str:
        try:
            return f"process {int(self.path.read_text())}"
        except (OSError, ValueError):
            return "a process of unknown id"


class RunLog:
    """What the main process writes down: history.jsonl, TensorBoard and a progress bar.

    Args:
        cfg: the config.
        folder: where to.
        step: steps made before; what TensorBoard holds of later ones is dropped.
        total: steps of the whole run at most, for the bar's remaining time.
        progress: whether to draw a bar on standard error.
    """

    def __init__(
        self, cfg: Config, folder: ResultsFolder, *, step: int, total: int, progress: bool
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter
        from tqdm import tqdm

        self.cfg, self.history = cfg, folder.history
        self._file = open(self.history, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(
            str(folder.tensorboard), purge_step=step + 1 if step else None, max_queue=100
        )
        self._bar = tqdm(
            total=total, initial=step, unit="step", desc="training", disable=not progress
        )
        self._last = (step, time.perf_counter())

    def step(self, record: StepRecord) -> None:
        """Write one optimizer step."""
        line = record.to_dict()
        del line["valid"]
        self._write(line)
        if record.step % self.cfg.training.log_every == 0:
            step, then = self._last
            self._last = (record.step, time.perf_counter())
            rate = (record.step - step) / max(self._last[1] - then, 1e-9)
            for name in ("loss", "grad_norm", "lr"):
                self._point(f"train/{name}", line[name], record.step)
            self._point("train/steps_per_second", rate, record.step)
        self._bar.set_postfix(epoch=record.epoch, loss=f"{record.loss:.4g}", refresh=False)
        self._bar.update(record.step - self._bar.n)

    def validation(self, record: StepRecord, result: Validation, *, final: bool) -> None:
        """Write one validation: its scores, and sound and picture of its first clip."""
        step, rate = record.step, self.cfg.audio.sample_rate
        self._write({"step": step, "epoch": record.epoch, "valid": result.values, "final": final})
        for name, value in result.values.items():
            self._point(f"valid/{name}", value, step)
        if result.example is not None:
            waves = dict(zip(("mix", "target", "estimate"), result.example, strict=True))
            for name, wave in waves.items():
                sound = torch.nan_to_num(wave).clamp(-1, 1)
                self._board.add_audio(f"audio/{name}", sound[None], step, sample_rate=rate)
            picture = to_pixels(spectrograms(waves, rate, self.cfg.audio.stft))
            self._board.add_image("spectrogram", picture, step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Flush and close everything."""
        for part in (self._file, self._board, self._bar):
            part.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(to_plain(line), allow_nan=False) + "\n")
            self._file.flush()  # a killed process loses nothing that the system has
        except OSError as error:
            raise CheckpointError(
                f"{self.history} cannot be written ({error.strerror}): free space, then --resume"
            ) from error

    def _point(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):  # else TensorBoard prints a warning of its own and draws nothing
            self._board.add_scalar(name, value, step)
