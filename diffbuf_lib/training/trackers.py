"""Where a run's numbers, sound and pictures go beside history.jsonl: TensorBoard, W&B, trackio.

`training.trackers` names them; they are Accelerate's. One that fails is told of in one warning and
left out from then on: it stops no run. W&B and trackio work without a network or an account: the
one then writes to <results>/wandb, which `wandb sync` sends, the other to TRACKIO_DIR.

A tracker of your own is a class of these methods, `@TRACKERS.register("mine")`.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import secrets
import shlex
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker
from torch import Tensor

from diffbuf_lib.config import Config
from diffbuf_lib.data.audio import write_json
from diffbuf_lib.data.reader import reason
from diffbuf_lib.registry import TRACKERS

NOTES = "trackers.json"  # of a results folder: what its run is called at each service


class Tracker(Protocol):
    """What a run tells. Made of the config, the results folder, and the step that it goes on from.

    Attributes:
        link: where to see the run, an address or a command; "" if that goes without saying.
    """

    link: str
    name: str  # of the run, by which it goes on after a stop

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Take finite numbers by name, such as train/loss."""

    def example(self, waves: Mapping[str, Tensor], rate: int, picture: Any, step: int) -> None:
        """Take sounds [T], full scale 1, by name and a picture [H, W, 3] uint8 of them."""

    def text(self, name: str, text: str, step: int) -> None:
        """Take a line of text."""

    def close(self) -> None:
        """Write what is left."""


class Trackers:
    """All trackers of a run."""

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        self._open: dict[str, Tracker] = {}
        for name in cfg.training.trackers:
            with self._guarded(name):
                self._open[name] = TRACKERS[name].load()(cfg, folder, step)
        runs = {n: {"name": t.name, "link": t.link} for n, t in self._open.items() if t.link}
        if runs:
            write_json(folder / NOTES, {**tracked(folder), **runs})

    def tell(self, method: str, *args: Any) -> None:
        """Call one of `Tracker`'s methods of each of them."""
        for name in list(self._open):
            with self._guarded(name):
                getattr(self._open[name], method)(*args)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service meets: the run is worth more
            self._open.pop(name, None)
            fix = f"pip install 'diffbuf[{name}]'" if isinstance(error, ImportError) else ""
            what = f"tracker {name} is left out from here on: {type(error).__name__}"
            told = f"{what}: {reason(error)[:300]}: {fix or 'or take it out of training.trackers'}"
            warnings.warn(told, stacklevel=2)


def tracked(folder: Path) -> dict[str, dict[str, str]]:
    """Return name and link of a folder's run at each service that it was told to."""
    try:
        notes: dict[str, dict[str, str]] = json.loads((folder / NOTES).read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return notes


class _TensorBoard:
    """Event files in <results>/tensorboard."""

    link = name = ""

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        purge = step + 1 if step else None  # points of a run that went further before a resume
        self._tracker = TensorBoardTracker("tensorboard", folder, purge_step=purge, max_queue=100)
        self._tracker.start()
        self._writer = self._tracker.tracker

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def example(self, waves: Mapping[str, Tensor], rate: int, picture: Any, step: int) -> None:
        for name, wave in waves.items():
            self._writer.add_audio(f"audio/{name}", wave[None], step, sample_rate=rate)
        self._writer.add_image("spectrogram", picture, step, dataformats="HWC")
        self._writer.flush()

    def text(self, name: str, text: str, step: int) -> None:
        self._writer.add_text(name, text, step)

    def close(self) -> None:
        self._tracker.finish()


class _Service:
    """W&B or trackio: their calls are alike."""

    _identity: tuple[str, ...] = ("name",)  # the arguments by which a stopped run is found again

    def __init__(self, tracker: Any, cfg: Config, folder: Path, step: int, **options: Any) -> None:
        self._module: Any = importlib.import_module(tracker.name)
        known = tracked(folder).get(tracker.name) if step else None
        fresh = re.sub(r"[^\w.-]", "_", f"{folder.resolve().name}-{secrets.token_hex(3)}")
        self.name = known["name"] if known else fresh
        project = cfg.training.tracker_project
        config = {**cfg.to_dict(), "results_path": str(folder)}
        same = dict.fromkeys(self._identity, self.name)
        self._tracker = tracker(project, config=config, resume="allow", **same, **options)
        self._tracker.start()
        self._run: Any = self._tracker.tracker
        self.link = f"trackio show --project {project}"

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def example(self, waves: Mapping[str, Tensor], rate: int, picture: Any, step: int) -> None:
        sounds = {}
        for name, wave in waves.items():
            pcm = (wave * 32767).round().short().numpy()  # 16 bits; floats would be normalised
            sounds[f"audio/{name}"] = self._module.Audio(pcm, sample_rate=rate)
        self._run.log({**sounds, "spectrogram": self._module.Image(picture)}, step=step)

    def text(self, name: str, text: str, step: int) -> None:
        self._run.log({name: text}, step=step)

    def close(self) -> None:
        self._tracker.finish()


class _WandB(_Service):
    """Weights & Biases: online with a key and a network, else offline in <results>/wandb."""

    _identity = ("name", "id")

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        options = {"dir": str(folder), **self._mode()}
        super().__init__(WandBTracker, cfg, folder, step, **options)
        self.link = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        self.link = self.link if self._run.offline else self._run.url

    def _mode(self) -> dict[str, str]:
        """Leave the mode to W&B, or go offline where it would ask for a key, or fail."""
        if os.environ.get("WANDB_MODE"):
            return {}
        try:
            if importlib.import_module("wandb").login(prompt=False):
                return {}
            why = "no API key"
        except ImportError:
            raise
        except Exception as error:  # no network, or a key that it does not know
            why = reason(error)[:200]
        warnings.warn(f"tracker wandb is offline ({why}): `wandb sync` sends it", stacklevel=2)
        return {"mode": "offline"}


class _Trackio(_Service):
    """trackio: a database in TRACKIO_DIR, which `trackio show` opens."""

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        # No dashboard within a notebook: it would start a server of its own.
        super().__init__(TrackioTracker, cfg, folder, step, embed=False)
