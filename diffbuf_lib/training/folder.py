"""The results folder: what is in it, and when a run may start or go on there.

config.yaml           the whole config, defaults filled in
history.jsonl         one line a step and a validation
checkpoints/last.pt   to go on from, written at step 0, at every epoch's end and on a stop
checkpoints/best.pt   the same, of the best validation
model/                averaged weights of the best validation, for `from_pretrained`
tensorboard/          event files
capsule_<step>/       a failed step, to be replayed; see `training.crash`
.lock                 while a run goes on here; see `FolderLock`
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from diffbuf_lib.training.run import StepRecord

import contextlib
import errno
import json
import math
import os
import pickle
import shutil
import time
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from diffbuf_lib.config import Config
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.figures import spectrograms, to_pixels

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
        try:
            check_same_config(state["config"], cfg.to_dict(), self.path)
        except (AttributeError, TypeError, RuntimeError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"checkpoint {self.last} holds no config: {error}") from error
        return state

    def write_config(self, cfg: Config) -> None:
        """Write config.yaml."""
        with replacing(self.config) as file:
            file.write(cfg.to_yaml().encode())

    def truncate_history(self, step: int, *, validated: bool) -> None:
        """Drop what the history holds of steps after a checkpoint.

        So the curve of a resumed run is that of one that was never stopped.

        Args:
            step: of the checkpoint.
            validated: whether the checkpoint comes after that step's validation; if not, a
                validation of that very step will be made again.
        """
        kept = [
            line
            for line in read_history(self.history)
            if line["step"] < step
            or (
                line["step"] == step
                and (("valid" not in line) or (validated and not line["final"]))
            )
        ]
        with replacing(self.history) as file:
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
            sync_folder(new)
            if self.model.exists():
                self.model.rename(old)
            new.rename(self.model)
            sync_folder(self.path)
        except OSError as error:
            self.tidy()
            raise CheckpointError(
                f"{self.model} cannot be written ({error.strerror or error}): free space or choose "
                "another --results_path; what was there before is untouched"
            ) from error
        shutil.rmtree(old, ignore_errors=True)

    def tidy(self) -> None:
        """Finish what a killed run left half done: temporary files and a half-made swap."""
        new, old = self.path / ".model.new", self.path / ".model.old"
        if old.exists() and not self.model.exists():
            old.rename(self.model)
        shutil.rmtree(new, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)
        for folder in (self.path, self.last.parent):
            for file in folder.glob(".*.tmp"):
                if file.is_dir():  # of a capsule
                    shutil.rmtree(file, ignore_errors=True)
                else:
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
    keys = [*before, *(key for key in after if key not in before)]
    changed = [
        f"{key} was {str(before.get(key, 'not there'))[:80]}, is {after.get(key, 'not there')}"
        for key in keys
        if (key in fixed or key not in CHANGEABLE) and before.get(key) != after.get(key)
    ]
    if changed:
        more = f" and {len(changed) - 3} more" if len(changed) > 3 else ""
        raise CheckpointError(
            f"results folder {path} holds a run of another config: {'; '.join(changed[:3])}{more}. "
            "Set them back, or choose another --results_path (--start_check_point takes over the "
            "weights)"
        )


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


def _flat(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


FORMAT = 1
"""Raised when a checkpoint's content changes so that an older library cannot read it."""

KEYS = frozenset(
    {"format", "version", "config", "step", "epoch", "examples", "processes", "pending", "best"}
    | {"bad_validations"}
    | {"model", "ema", "optimizer", "scheduler", "scaler"}
)
"""What a checkpoint holds. No state of random generators: all draws are keyed (see plan.py)."""


def save_checkpoint(path: str | Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint so that, whenever the machine stops, `path` is the old or the new one.

    Args:
        path: the file; its folder is made if needed.
        state: tensors and plain values, with the names in `KEYS` except "format".

    Raises:
        CheckpointError: it cannot be written (disk full, no permission). An older file at `path`
            is still there and whole.
    """
    path = Path(path)
    with replacing(path) as file:
        torch.save({"format": FORMAT, **state}, file)


def load_checkpoint(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint onto the CPU.

    Only tensors and plain values are read (`weights_only`): a file that would run code is refused.

    Raises:
        CheckpointError: no such file, cut short or damaged, not a checkpoint of this library, or
            one that holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"checkpoint {path} does not exist: check the path")
    try:
        _check_whole(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"checkpoint {path} is refused: it holds more than tensors and plain values, and "
            "reading it could run code; take a file that diffbuf has written"
        ) from error
    except OSError as error:
        raise CheckpointError(f"checkpoint {path} cannot be read: {error.strerror}") from error
    except Exception as error:  # whatever the zip and pickle readers meet in damaged bytes
        raise CheckpointError(
            f"checkpoint {path} is damaged or cut short: take another one, such as best.pt "
            f"({type(error).__name__})"
        ) from error
    if not isinstance(state, dict) or not KEYS.issubset(state):
        raise CheckpointError(
            f"{path} is not a training checkpoint of diffbuf: take checkpoints/last.pt or best.pt "
            "of a results folder"
        )
    if state["format"] != FORMAT:
        raise CheckpointError(
            f"checkpoint {path} has format {state['format']}, written by diffbuf "
            f"{state['version']}; this library reads format {FORMAT}: install that version"
        )
    return state


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """Read only the model's weights, averaged ones (EMA) where there are.

    Args:
        path: a checkpoint file, or a folder that `save_pretrained` has written.

    Raises:
        CheckpointError: as in `load_checkpoint`, or a folder without model.safetensors.
    """
    path = Path(path)
    if not path.is_dir():
        state = load_checkpoint(path)
        prefix = "module."  # AveragedModel holds the averaged copy under this name
        averaged = {
            name.removeprefix(prefix): value
            for name, value in (state["ema"] or {}).items()
            if name.startswith(prefix)
        }
        return averaged or state["model"]
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = path / "model.safetensors"
    if not file.is_file():
        raise CheckpointError(
            f"folder {path} holds no model.safetensors: give a checkpoint file or the model/ "
            "folder of a results folder"
        )
    try:
        return dict(load_file(file))
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"weights {file} are damaged: {error}") from error


def apply_weights(model: nn.Module, weights: Mapping[str, torch.Tensor], source: Path) -> None:
    """Put weights into a model of the same architecture.

    Raises:
        CheckpointError: a tensor is missing, unknown or of another shape; names the first.
    """
    own = model.state_dict()
    for name, value in own.items():
        if name not in weights:
            problem = f"it has no {name}, which is {list(value.shape)} in this model"
        elif weights[name].shape != value.shape:
            problem = (
                f"its {name} is {list(weights[name].shape)}, in this model {list(value.shape)}"
            )
        else:
            continue
        raise CheckpointError(f"weights of {source} do not fit: {problem}; make `model` equal")
    for name in weights:
        if name not in own:
            raise CheckpointError(
                f"weights of {source} do not fit: its {name}, {list(weights[name].shape)}, is not "
                "in this model; make `model` equal"
            )
    model.load_state_dict(dict(weights))


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Open a temporary file beside `path` that takes its place once it is safely on the disk.

    Raises:
        CheckpointError: it cannot be written; the temporary file is gone, `path` is as before.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch's zip writer turns some OSErrors into these
        cause = error if isinstance(error, OSError) else error.__context__
        reason = cause.strerror if isinstance(cause, OSError) else None
        raise CheckpointError(
            f"{path} cannot be written ({reason or error}): free space or choose another "
            "--results_path; what was there before is untouched"
        ) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Put a folder's entries on the disk: without it a rename can be lost with the power."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _check_whole(path: Path) -> None:
    """Compare every member of the archive with its checksum; torch's reader does not."""
    with zipfile.ZipFile(path) as archive:
        damaged = archive.testzip()
    if damaged is not None:
        raise zipfile.BadZipFile(damaged)


try:
    import fcntl
except ImportError:  # not a Unix: two runs in one folder are not noticed there
    fcntl = None  # type: ignore[assignment]

_held: set[int] = set()
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)  # some network file systems


def _let_go() -> None:
    """Close a forked child's copies: a reader that outlives a killed run must not hold its lock."""
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go)


class FolderLock:
    """A lock that the system gives back when its process ends, however it ends.

    The file holds the owner's process id, for the message; what counts is the lock on it, so that
    a file which a killed run has left behind stops nobody.

    Args:
        folder: the results folder; made if needed.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / ".lock"
        self._descriptor: int | None = None

    def acquire(self) -> None:
        """Take the lock.

        Raises:
            CheckpointError: another process has it, or the folder cannot be written.
        """
        if fcntl is None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            while not self._try():
                pass
        except BlockingIOError:
            raise CheckpointError(
                f"results folder {self.path.parent} is in use by another run ({self._owner()}): "
                "wait for it, stop it, or choose another --results_path"
            ) from None
        except OSError as error:
            if error.errno in _NO_LOCKS:
                return
            raise CheckpointError(
                f"results folder {self.path.parent} cannot be written ({error.strerror}): choose "
                "another --results_path"
            ) from error

    def release(self) -> None:
        """Give the lock back and remove its file; without a lock, do nothing."""
        if self._descriptor is None:
            return
        with contextlib.suppress(OSError):
            self.path.unlink()
        if self._descriptor in _held:  # not in a forked child
            _held.discard(self._descriptor)
            os.close(self._descriptor)
        self._descriptor = None

    def _try(self) -> bool:
        """Lock the file; False if its last owner removed it meanwhile."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not self.path.exists() or not os.path.samestat(
                os.fstat(descriptor), os.stat(self.path)
            ):
                os.close(descriptor)
                return False
        except BaseException:
            os.close(descriptor)
            raise
        os.ftruncate(descriptor, 0)
        os.write(descriptor, f"{os.getpid()}\n".encode())
        self._descriptor = descriptor
        _held.add(descriptor)
        return True

    def _owner(self) -> str:
        try:
            return f"process {int(self.path.read_text())}"
        except (OSError, ValueError):
            return "a process of unknown id"


class RunLog:
    """Writes records and validations of the main process.

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

        self.cfg = cfg
        self.history = folder.history
        self._file = open(self.history, "a", encoding="utf-8")  # noqa: SIM115 (closed in close)
        self._board = SummaryWriter(
            str(folder.tensorboard), purge_step=step + 1 if step else None, max_queue=100
        )
        self._bar: Any = None
        if progress:
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=step, unit="step", desc="training")
        self._last = (step, time.perf_counter())

    def step(self, record: StepRecord) -> None:
        """Write one optimizer step."""
        line = {
            "step": record.step,
            "epoch": record.epoch,
            "loss": record.loss,
            "grad_norm": record.grad_norm,
            "lr": record.lr,
            "seconds": record.seconds,
            "skipped": record.skipped,
            "bad_batches": record.bad_batches,
        }
        self._write(line)
        if record.step % self.cfg.training.log_every == 0:
            self._scalars(record)
        if self._bar is not None:
            self._bar.set_postfix(epoch=record.epoch, loss=f"{record.loss:.4g}", refresh=False)
            self._bar.update(record.step - self._bar.n)

    def validation(
        self,
        record: StepRecord,
        values: dict[str, float],
        example: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None,
        *,
        final: bool,
    ) -> None:
        """Write one validation: its scores, and sound and picture of its first clip."""
        self._write({"step": record.step, "epoch": record.epoch, "valid": values, "final": final})
        for name, value in values.items():
            self._point(f"valid/{name}", value, record.step)
        if example is not None:
            rate = self.cfg.audio.sample_rate
            waves = dict(zip(("mix", "target", "estimate"), example, strict=True))
            for name, wave in waves.items():
                sound = torch.nan_to_num(wave).clamp(-1, 1)
                self._board.add_audio(f"audio/{name}", sound[None], record.step, sample_rate=rate)
            picture = to_pixels(spectrograms(waves, rate, self.cfg.audio.stft))
            self._board.add_image("spectrogram", picture, record.step, dataformats="HWC")
        self._board.flush()

    def close(self) -> None:
        """Flush and close everything."""
        self._file.close()
        self._board.close()
        if self._bar is not None:
            self._bar.close()

    def _write(self, line: dict[str, Any]) -> None:
        try:
            self._file.write(json.dumps(_finite(line), allow_nan=False) + "\n")
            self._file.flush()  # a killed process loses nothing that the system has
        except OSError as error:
            raise CheckpointError(
                f"{self.history} cannot be written ({error.strerror}): free space, then --resume"
            ) from error

    def _scalars(self, record: StepRecord) -> None:
        step, then = self._last
        now = time.perf_counter()
        for name in ("loss", "grad_norm", "lr"):
            self._point(f"train/{name}", getattr(record, name), record.step)
        rate = (record.step - step) / max(now - then, 1e-9)
        self._point("train/steps_per_second", rate, record.step)
        self._last = (record.step, now)

    def _point(self, name: str, value: float, step: int) -> None:
        if math.isfinite(value):  # else TensorBoard prints a warning of its own and draws nothing
            self._board.add_scalar(name, value, step)


def _finite(value: Any) -> Any:
    """Return a tree with None for each number that JSON cannot hold."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
