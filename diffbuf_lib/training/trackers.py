"""Where a run's numbers, sound and pictures go besides history.jsonl: TensorBoard, W&B, trackio.

`training.trackers` names them; they are Accelerate's. One that fails gives one warning and is left
out from then on; the run continues. W&B and trackio work without a network or an account: W&B
then writes to <results>/wandb, which `wandb sync` uploads, and trackio to TRACKIO_DIR.
"""

from __future__ import annotations

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
from diffbuf_lib.errors import need
from diffbuf_lib.registry import TRACKERS

NOTES = "trackers.json"  # of a results folder: what its run is called at each service


class Tracker(Protocol):
    """What a run reports to; made from config, results folder, and the step to resume from."""

    link: str  # where to see the run, an address or a command; "" if that goes without saying
    name: str  # of the run, by which it is resumed after a stop

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
        """Call one of `Tracker`'s methods on every tracker."""
        for name in list(self._open):
            with self._guarded(name):
                getattr(self._open[name], method)(*args)

    @contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # whatever a service raises must not stop the run
            self._open.pop(name, None)
            what = f"{type(error).__name__}: {reason(error)[:300]}"
            warnings.warn(f"tracker {name} is left out from here on: {what}", stacklevel=2)


def tracked(folder: Path) -> dict[str, dict[str, str]]:
    """Return name and link of a folder's run at each service that it reported to."""
    path = folder / NOTES
    notes: dict[str, dict[str, str]] = json.loads(path.read_text()) if path.is_file() else {}
    return notes


class _TensorBoard:
    """Event files in <results>/tensorboard."""

    link = name = ""

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        purge = step + 1 if step else None  # drops points beyond the step that it resumes from
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=purge, max_queue=100)
        tracker.start()
        self._writer = tracker.tracker
        self.text, self.close = self._writer.add_text, self._writer.close

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def example(self, waves: Mapping[str, Tensor], rate: int, picture: Any, step: int) -> None:
        for name, wave in waves.items():
            self._writer.add_audio(f"audio/{name}", wave[None], step, sample_rate=rate)
        self._writer.add_image("spectrogram", picture, step, dataformats="HWC")
        self._writer.flush()


class _Service:
    """W&B or trackio: their calls are alike."""

    _module: Any

    def __init__(self, kind: Any, cfg: Config, folder: Path, step: int, **options: Any) -> None:
        known = tracked(folder).get(kind.name) if step else None
        fresh = re.sub(r"[^\w.-]", "_", f"{folder.resolve().name}-{secrets.token_hex(3)}")
        self.name, project = known["name"] if known else fresh, cfg.training.tracker_project
        if kind is WandBTracker:
            options["id"] = self.name
        config = {**cfg.to_dict(), "results_path": str(folder)}
        tracker = kind(project, name=self.name, config=config, resume="allow", **options)
        tracker.start()
        self._run, self.close = tracker.tracker, tracker.finish
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


class _WandB(_Service):
    """Weights & Biases: online with a key and a network, else offline in <results>/wandb."""

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        self._module = need("wandb", "tracker wandb", "pip install 'diffbuf[wandb]'")
        options = {} if os.environ.get("WANDB_MODE") else self._mode()
        super().__init__(WandBTracker, cfg, folder, step, dir=str(folder), **options)
        self.link = f"wandb sync {shlex.quote(str(Path(self._run.dir).parent))}"
        self.link = self.link if self._run.offline else self._run.url

    def _mode(self) -> dict[str, str]:
        """Go offline where W&B would ask for a key and wait, or fail."""
        try:
            if self._module.login(prompt=False):
                return {}
            why = "no API key"
        except Exception as error:  # no network, or a key that it does not know
            why = reason(error)[:200]
        warnings.warn(f"tracker wandb is offline ({why}): `wandb sync` uploads it", stacklevel=2)
        return {"mode": "offline"}


class _Trackio(_Service):
    """trackio: a database in TRACKIO_DIR, which `trackio show` opens."""

    def __init__(self, cfg: Config, folder: Path, step: int) -> None:
        self._module = need("trackio", "tracker trackio", "pip install 'diffbuf[trackio]'")
        # No dashboard within a notebook: it would start a server of its own.
        super().__init__(TrackioTracker, cfg, folder, step, embed=False)
