"""The results folder: what is in it, and when a run may start or go on there.

config.yaml           the whole config, defaults filled in
history.jsonl         one line a step and a validation
checkpoints/last.pt   to go on from, written at step 0, at every epoch's end and on a stop
checkpoints/best.pt   the same, of the best validation
model/                averaged weights of the best validation, for `from_pretrained`
tensorboard/          event files
capsule_<step>/       a failed step, to be replayed; see `training.crash`
.lock                 while a run goes on here; see `training.lock`
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from diffbuf_lib.config import Config
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.training.checkpoint import load_checkpoint, replacing, sync_folder

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
