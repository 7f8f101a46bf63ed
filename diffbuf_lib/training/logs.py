"""What a run writes down as it goes: history.jsonl, TensorBoard and a progress bar."""

from __future__ import annotations

import json
import math
import time
from typing import Any

import torch

from diffbuf_lib.config import Config
from diffbuf_lib.errors import CheckpointError
from diffbuf_lib.figures import spectrograms, to_pixels
from diffbuf_lib.training.record import StepRecord
from diffbuf_lib.training.results import ResultsFolder


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
