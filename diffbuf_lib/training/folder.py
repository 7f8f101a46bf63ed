"""The results folder: its files, written whole or not at all, and when a run may resume there.

config.yaml           the whole config, defaults filled in
history.jsonl         one line per step and per validation
checkpoints/last.pt   to resume from, written at step 0, at every epoch's end and on a stop
checkpoints/best.pt   the same, of the best validation
model/                averaged weights of the best validation, for `from_pretrained`
tensorboard/          event files; wandb/, trackers.json: see `training.trackers`
capsule_<step>/       a failed step, to be replayed; see `training.failure`
.lock                 while a run is active here
"""

from __future__ import annotations

import errno
import json
import math
import os
import pickle
import shutil
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import filelock
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from diffbuf_lib import pretrained
from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import atomic_file, wait_for_disk, writing
from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.figures import spectrograms, to_pixels
from diffbuf_lib.foreign import flatten
from diffbuf_lib.trace import to_plain
from diffbuf_lib.training.step import StepRecord, Validation

FORMAT = 1  # of a checkpoint; raised when an older library can no longer read it
# What a checkpoint holds. No state of random generators: all draws are keyed (see feed.py).
KEYS = {
    *("format", "version", "config", "step", "epoch", "examples", "processes", "pending", "best"),
    *("bad_validations", "bad_batches", "model", "ema", "optimizer", "scheduler", "scaler"),
    *("global_batch", "unit"),
}

_ENDS = frozenset({"training.num_epochs", "training.num_steps"})  # a linear rate depends on them
# Config keys that a resumed run may change: the steps before would have been the same (but scores
# before and after a change of valid_clips are less comparable).
CHANGEABLE = _ENDS | {
    *("training.early_stopping", "training.num_workers", "training.log_every"),
    *("training.checkpoint_every", "training.on_nonfinite", "training.max_skipped"),
    *("training.valid_clips", "training.checkpoint_minutes", "training.mirror"),
    *("data.cache_path", "data.cache_gb"),
    "training.memory_format",  # the run keeps its own
    *("training.trackers", "training.tracker_project"),
}
# Keys that change the steps that follow; the change is written into the history.
NOTED = {
    *("training.lr", "training.metrics", "training.batch_size", "training.accumulation_steps"),
    "training.global_batch",
}
_writing = partial(
    writing, fails=RuntimeError, makes=CheckpointError,
    fix="free space or choose another --results_path; what was there before is untouched",
)  # fmt: skip


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint, with the names in `KEYS` except "format"; make its folder if needed.

    CheckpointError if that fails; an older file at `path` is then still intact.
    """
    path = Path(path)
    with _writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            torch.save({"format": FORMAT, **state}, temporary)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, without running code in it.

    CheckpointError as in `load_tensors`, and for a file that is not a checkpoint of this library.
    """
    path = Path(path)
    state = load_tensors(path, "checkpoint")
    if not isinstance(state, dict) or not KEYS.issubset(state):
        fix = "take the last.pt of a run (an older one's weights serve as --start_check_point)"
        raise CheckpointError(f"{path} is not a training checkpoint of this version: {fix}")
    if (found := state["format"]) != FORMAT:
        fix = f"install diffbuf {state['version']}, which wrote it"
        raise CheckpointError(f"checkpoint {path} has format {found}, not {FORMAT}: {fix}")
    return state


def saved_step(results_path: str | Path) -> int | None:
    """Return the step that a results folder's last.pt holds; None if there is none."""
    path = ResultsFolder(results_path).last
    if not path.is_file():
        return None
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    return int(state["step"])


def load_tensors(path: Path, what: str, pickle_module: Any = None) -> Any:
    """Read what `torch.save` wrote: tensors and plain values only, onto the CPU.

    `pickle_module` may accept more: see `diffbuf_lib.authors`. CheckpointError, in which the file
    is called `what`, if it is missing or damaged, or if reading it would run code.
    """
    if not path.is_file():
        raise CheckpointError(f"{what} {path} does not exist: check the path")
    try:
        with zipfile.ZipFile(path) as archive:  # torch's reader does not look at checksums
            if (damaged := archive.testzip()) is not None:
                raise zipfile.BadZipFile(damaged)
        safe = {"weights_only": pickle_module is None, "pickle_module": pickle_module}
        return torch.load(path, map_location="cpu", **safe)
    except pickle.UnpicklingError as error:
        why = "it holds more than tensors and plain values, and reading it could run code"
        fix = "use one made by diffbuf (`diffbuf import` converts the authors' checkpoints)"
        raise CheckpointError(f"{what} {path} is refused: {why}; {fix}") from error
    except Exception as error:  # whatever the zip and pickle readers raise for damaged bytes
        why = f"damaged or cut short ({type(error).__name__}: {reason(error)[:80]})"
        raise CheckpointError(f"{what} {path} is {why}: take another one") from error


def load_weights(path: str | Path) -> dict[str, Tensor]:
    """Read only the weights, from any kind of source.

    That is a `save_pretrained` folder, a name such as diffbuf/cpu-demo, a .safetensors file, a
    checkpoint of ours (its averaged weights), or what others save: a state_dict, plain or under
    "state_dict" (Lightning), with or without prefixes module., model. or _orig_mod. (compiled).
    CheckpointError as in `load_tensors`, and for one without weights.
    """
    path = Path(path)
    if not path.exists() and str(path) in pretrained.NAMES:
        path = pretrained.FOLDER / path.name
    file = path / "model.safetensors" if path.is_dir() else path
    if path.is_dir() and not file.is_file():
        raise CheckpointError(f"{path} holds no model.safetensors: give a checkpoint or run/model")
    if file.suffix == ".safetensors":
        try:
            return plain_names(load_file(file))
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"weights {file} are damaged: {error}") from error
    state = load_tensors(path, "checkpoint")
    if isinstance(state, dict) and {"format", "ema"}.issubset(state):  # also of an older library
        prefix = "module."  # of the names in torch's AveragedModel
        return {n.removeprefix(prefix): t for n, t in state["ema"].items() if n.startswith(prefix)}
    inner = state.get("state_dict", state) if isinstance(state, dict) else {}
    weights = {name: t for name, t in dict(inner).items() if isinstance(t, Tensor)}
    if not weights:
        raise CheckpointError(f"checkpoint {path} holds no weights: give one with a state_dict")
    return plain_names(weights)


def plain_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Remove the prefixes that wrappers add to names."""
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    for prefix in ("module.", "model.", "dnn.", "module."):
        if all(name.startswith(prefix) for name in weights):
            weights = {name.removeprefix(prefix): tensor for name, tensor in weights.items()}
    return weights


def apply_weights(model: nn.Module, weights: Mapping[str, Tensor], source: str | Path) -> None:
    """Load weights of a model, or of its network alone, into a model.

    CheckpointError names the first tensors that are missing, unknown or of another shape.
    """
    if not model.state_dict().keys() & weights.keys():
        weights = {f"network.{name}": tensor for name, tensor in weights.items()}
    try:
        model.load_state_dict(dict(weights))
    except RuntimeError as error:  # a line of title, then one for each kind of problem
        why = "; ".join(line.strip().rstrip(".")[:300] for line in str(error).splitlines()[1:4])
        what = f"weights of {source} do not fit: {why}"
        raise CheckpointError(f"{what}; use the same `model` config") from error


class ResultsFolder:
    """The paths of one run."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = self.path / "config.yaml"
        self.history = self.path / "history.jsonl"
        self.last = self.path / "checkpoints" / "last.pt"
        self.best = self.path / "checkpoints" / "best.pt"
        self.model = self.path / "model"
        self.tensorboard = self.path / "tensorboard"
        self._new, self._old = self.path / ".model.new", self.path / ".model.old"

    def check_fresh(self) -> None:
        """Raise CheckpointError if a run lives here; it says how to go on or where else to go."""
        found = [file.name for file in (self.config, self.history, self.last) if file.exists()]
        if found:
            fix = "add --resume to go on with it, or choose another --results_path"
            raise CheckpointError(f"folder {self.path} already holds a run ({found[0]}): {fix}")

    def load_last(self, cfg: Config) -> dict[str, Any]:
        """Return last.pt, and as "changed" the config keys that changed: key -> (old, new).

        CheckpointError if there is none, or if its run's config differs in keys other than
        `CHANGEABLE` and `NOTED`.
        """
        if not self.last.is_file():
            fix = "check --results_path, or leave out --resume to start there"
            raise CheckpointError(f"{self.path} holds no checkpoints/last.pt to resume: {fix}")
        state = load_checkpoint(self.last)
        changed = check_same_config(state["config"], cfg.to_dict(), self.path)
        return {**state, "changed": changed}

    def write_config(self, cfg: Config) -> None:
        """Write config.yaml."""
        with _writing(self.config), atomic_file(self.config) as temporary:
            temporary.write_text(cfg.to_yaml(), encoding="utf-8")

    def truncate_history(self, step: int, *, validated: bool) -> None:
        """Drop lines after a checkpoint's step; unless `validated`, it is still to be validated."""

        def stays(line: dict[str, Any]) -> bool:
            repeated = "valid" in line and (line["final"] or not validated)
            return line["step"] < step or (line["step"] == step and not repeated)

        kept = [line for line in read_history(self.history) if stays(line)]
        with _writing(self.history), atomic_file(self.history) as temporary:
            temporary.write_text("".join(json.dumps(line) + "\n" for line in kept))

    def export_model(self, model: Any) -> None:
        """Write model/ with `save_pretrained`: the folder is always the old or the new one."""
        try:
            with _writing(self.model):
                model.save_pretrained(self._new)
                wait_for_disk(self._new)
                if self.model.exists():
                    self.model.rename(self._old)
                self._new.rename(self.model)
                wait_for_disk(self.path)
        finally:
            self.tidy()

    def tidy(self) -> None:
        """Finish what a killed run left half done: temporary files and a half-made swap."""
        if self._old.exists() and not self.model.exists():
            self._old.rename(self.model)
        for left in (self._new, self._old):
            shutil.rmtree(left, ignore_errors=True)
        for folder in (self.path, self.last.parent):
            for file in folder.glob(".*.tmp"):
                file.unlink(missing_ok=True)


def check_same_config(
    old: Mapping[str, Any], new: Mapping[str, Any], path: Path
) -> dict[str, list[Any]]:
    """Return old and new value of the `NOTED` keys in which two nested configs differ.

    CheckpointError if they differ in any other key that is not `CHANGEABLE`.
    """
    before, after = dict(flatten(old)), dict(flatten(new))
    linear = "linear" in (before.get("training.lr_schedule"), after.get("training.lr_schedule"))
    changeable = CHANGEABLE.difference(_ENDS if linear else ())
    different = [key for key in {**before, **after} if before.get(key) != after.get(key)]
    changed = [
        f"{key} was {str(before.get(key, 'not there'))[:80]}, is {after.get(key, 'not there')}"
        for key in different
        if key not in changeable | NOTED
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        what = f"folder {path} holds a run of another config: {'; '.join(changed[:3])}{more}"
        fix = "choose another --results_path (--start_check_point takes over the weights)"
        raise CheckpointError(f"{what}. Set them back, or {fix}")
    return {key: [before.get(key), after.get(key)] for key in different if key in NOTED}


def read_history(path: str | Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of a history.jsonl, up to one that was cut off while it was written.

    The line of a step is a `StepRecord`; that of a validation has step, epoch, valid and final
    (made at the end of a run within an epoch); that of a resume has step and changed, config keys
    with their old and new values. A number that was not finite is None.
    """
    if Path(path).is_file():
        for line in Path(path).read_text("utf-8", errors="replace").splitlines():
            try:
                yield json.loads(line)
            except ValueError:
                return


class FolderLock:
    """Allows one run at a time in a results folder, until its process ends, however it ends.

    The system's lock counts, not the file: a file that a killed run left behind blocks no run.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._lock = filelock.FileLock(
            self.path, timeout=0, thread_local=False, fallback_to_soft=False
        )

    def acquire(self) -> None:
        """Take the lock, or go on without it on a file system that has no locks."""
        folder = self.path.parent
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
            self.path.write_text(f"process {os.getpid()}")  # for the message
        except filelock.Timeout:
            owner = self.path.read_text() if self.path.is_file() else ""
            what = f"folder {folder} is in use by another run ({owner or 'process unknown'})"
            fix = "wait for it, stop it, or choose another --results_path"
            raise CheckpointError(f"{what}: {fix}") from None
        except OSError as error:
            if error.errno in (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS):
                return  # some network file systems
            what = f"results folder {folder} cannot be written ({error.strerror})"
            raise CheckpointError(f"{what}: choose another --results_path") from error

    def release(self) -> None:
        """Remove the file and give the lock back; without a lock, do nothing."""
        if self._lock.is_locked:
            self.path.unlink(missing_ok=True)
            self._lock.release()


class RunLog:
    """What the main process writes down: history.jsonl, trackers and a progress bar."""

    def __init__(
        self, cfg: Config, folder: ResultsFolder, step: int, total: int, progress: bool
    ) -> None:
        from tqdm import tqdm

        from diffbuf_lib.training.trackers import Trackers

        self.cfg, self.history = cfg, folder.history
        self._file = open(self.history, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._trackers = Trackers(cfg, folder.path, step)
        hidden = not progress
        self._bar = tqdm(desc="training", total=total, initial=step, unit="step", disable=hidden)

    def step(self, record: StepRecord) -> None:
        """Write one optimizer step."""
        line = record.to_dict()
        del line["valid"]
        self.write(line)
        if record.step % self.cfg.training.log_every == 0:
            points = {name: line[name] for name in ("loss", "grad_norm", "lr")}
            points["steps_per_second"] = 1 / max(record.seconds, 1e-9)
            self._draw("train", points, record.step)
        self._bar.set_postfix(epoch=record.epoch, loss=f"{record.loss:.4g}", refresh=False)
        self._bar.update(record.step - self._bar.n)

    def say(self, text: str) -> None:
        """Print a line above the progress bar, if there is one."""
        if not self._bar.disable:
            self._bar.write(text, file=sys.stderr)

    def validation(self, record: StepRecord, result: Validation, *, final: bool) -> None:
        """Write one validation: its scores, and sound and picture of its first clip."""
        step, rate = record.step, self.cfg.audio.sample_rate
        self.write({"step": step, "epoch": record.epoch, "valid": result.values, "final": final})
        self._draw("valid", result.values, step)
        if result.example is not None and self.cfg.training.trackers:
            waves = dict(zip(("mix", "target", "estimate"), result.example, strict=True))
            picture = to_pixels(spectrograms(waves, rate, self.cfg.audio.stft))
            sounds = {name: torch.nan_to_num(wave).clamp(-1, 1) for name, wave in waves.items()}
            self._trackers.tell("example", sounds, rate, picture, step)

    def failure(self, step: int, error: Exception) -> None:
        """Tell the trackers why the run ends; the error names its capsule."""
        text = " ".join([str(error), *getattr(error, "__notes__", ())])
        self._trackers.tell("text", "failure", text, step)

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._trackers.tell("close")
        self._bar.close()

    def write(self, line: dict[str, Any]) -> None:
        """Write a line of the history."""
        with _writing(self.history):
            self._file.write(json.dumps(to_plain(line), allow_nan=False) + "\n")
            self._file.flush()  # a killed process loses nothing that the system was given

    def _draw(self, group: str, values: Mapping[str, float], step: int) -> None:
        finite = {f"{group}/{name}": v for name, v in values.items() if math.isfinite(v)}
        self._trackers.tell("scalars", finite, step)
