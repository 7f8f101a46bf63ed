"""A copy of a run's files elsewhere, such as on s3://, for machines that will not come back."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import fsspec

from diffbuf_lib.data.reader import reason
from diffbuf_lib.errors import CheckpointError, MissingExtraError

PLACE = "place.json"  # written last: the step of the checkpoint that is complete there


class Mirror:
    """Copies complete states in a thread; while that is busy, only the newest state waits.

    Object stores show an object only once it is whole. A copy that fails is only a warning: the run
    and its own checkpoints go on, and the next checkpoint is copied again.
    """

    def __init__(self, url: str, folder: Path) -> None:
        self.url, self.folder = url.rstrip("/"), folder
        self._next, self._now = folder / ".mirror.next", folder / ".mirror.now"
        self._pool = ThreadPoolExecutor(1, "mirror")
        self._job: Future[None] | None = None
        self._known: dict[str, tuple[int, int]] = {}  # inode and time of what is copied already

    def fetch(self) -> None:
        """Copy the run here if the mirror is further on; CheckpointError if it cannot be read."""
        try:
            system, root = fsspec.core.url_to_fs(self.url)
            system.invalidate_cache()  # another machine has written there
            if not system.exists(f"{root}/{PLACE}"):
                return
            there = int(json.loads(system.cat_file(f"{root}/{PLACE}"))["step"])
            here, last = self.folder / PLACE, self.folder / "checkpoints" / "last.pt"
            both = here.is_file() and last.is_file()
            if both and there <= json.loads(here.read_text())["step"]:
                return
            shutil.rmtree(self._now, ignore_errors=True)
            names = [str(path)[len(root) :].lstrip("/") for path in system.find(root)]
            names.sort(key=lambda name: (name == PLACE, name.endswith("last.pt")))
            for name in names:
                (self._now / name).parent.mkdir(parents=True, exist_ok=True)
                system.get_file(f"{root}/{name}", str(self._now / name))
            for name in names:
                (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self._now / name, self.folder / name)
            shutil.rmtree(self._now)
        except ImportError as error:
            why = f"training.mirror {self.url}: {reason(error)}"
            raise MissingExtraError(f"{why}; for s3:// pip install 'diffbuf[remote]'") from error
        except Exception as error:  # whatever the store or the network raises
            why = f"training.mirror {self.url} cannot be read ({reason(error)})"
            raise CheckpointError(f"{why}: check the URL and credentials (environment)") from error

    def update(self, step: int) -> None:
        """Let the thread copy the files as they are now."""
        try:
            self._set_aside(step)
        except OSError as error:
            warnings.warn(f"training.mirror {self.url}: {reason(error)}", stacklevel=2)
            return
        if self._job is None or self._job.done():
            self._job = self._pool.submit(self._copy)

    def _set_aside(self, step: int) -> None:
        new = self.folder / ".mirror.new"
        shutil.rmtree(new, ignore_errors=True)
        model = sorted((self.folder / "model").glob("*"))
        files = [self.folder / name for name in ("config.yaml", "history.jsonl")]
        files += [*model, *sorted(self.folder.glob("checkpoints/*.pt"), reverse=True)]
        for path in files:
            name = path.relative_to(self.folder)
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            copy = shutil.copyfile if path.suffix == ".jsonl" else os.link  # that one grows
            copy(path, new / name)
        (new / PLACE).write_text(json.dumps({"step": step}))
        shutil.copyfile(new / PLACE, self.folder / PLACE)
        shutil.rmtree(self._next, ignore_errors=True)
        new.rename(self._next)

    def close(self) -> None:
        """Wait until the last state is copied."""
        self._pool.shutdown()
        self._copy()
        for left in (self._next, self._now):
            shutil.rmtree(left, ignore_errors=True)

    def _copy(self) -> None:
        while self._next.exists():
            shutil.rmtree(self._now, ignore_errors=True)
            try:
                self._next.rename(self._now)
            except FileNotFoundError:
                continue  # replaced by a newer one just now
            try:
                self._upload()
            except Exception as error:  # whatever the store or the network raises
                why = f"training.mirror {self.url}: {type(error).__name__}: {reason(error)}"
                warnings.warn(f"{why}; the next checkpoint tries again", stacklevel=2)

    def _upload(self) -> None:
        system, root = fsspec.core.url_to_fs(self.url)
        files = [path for path in self._now.rglob("*") if path.is_file()]
        # A checkpoint comes after the history of its steps, and place.json after everything.
        files.sort(key=lambda path: (path.name == PLACE, path.name == "last.pt", str(path)))
        for path in files:
            name, state = path.relative_to(self._now).as_posix(), path.stat()
            known = (state.st_ino, state.st_mtime_ns)
            if self._known.get(name) != known:
                try:
                    system.put_file(str(path), f"{root}/{name}")
                except FileNotFoundError:  # a store where folders have to be made
                    system.makedirs(f"{root}/{name}".rpartition("/")[0], exist_ok=True)
                    system.put_file(str(path), f"{root}/{name}")
                self._known[name] = known
