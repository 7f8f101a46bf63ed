"""Where a training step's time goes, and which config key to change."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.profiler import profile, record_function

from diffbuf_lib.config import Config
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.feed import ClipSource, Stream, seed_everything
from diffbuf_lib.training.rehearsal import rehearsal
from diffbuf_lib.training.step import precision_on, validate

PARTS = ("waiting for data", "copying", "forward", "backward", "optimizer", "validation")
_WARM_UP = 3  # steps in which memory is taken and readers start
_TRACED = 3  # steps in the trace file: each is some ten thousand calls
_BAR = 40  # characters
_WAITING = "the device waits for files: raise training.num_workers (now {0.num_workers})"
# Parts in the order in which they are looked at: the share of a step from which on one is to blame,
# the key, and what to do.
_ADVICE = (
    ("waiting for data", 0.2, "training.num_workers", _WAITING),
    ("copying", 0.15, "training.batch_size", "copies to the device are small and many: raise "
     "training.batch_size (now {0.batch_size})"),
    ("validation", 0.25, "training.valid_every", "validations take much of a run: raise "
     "training.valid_every (now {0.valid_every}), or lower training.valid_clips ({0.valid_clips})"),
    ("optimizer", 0.25, "training.batch_size", "updates cost much beside so few clips: raise "
     "training.batch_size (now {0.batch_size}) or training.accumulation_steps"),
)  # fmt: skip


@dataclass(frozen=True)
class Timing:
    """Where the time of a step goes, each validation's shared out among the steps before it."""

    cfg: Config
    device: torch.device
    seconds: dict[str, float]  # of a mean step, by part

    @property
    def shares(self) -> dict[str, float]:
        """The parts' shares of a step."""
        total = sum(self.seconds.values())
        return {part: value / total for part, value in self.seconds.items()}

    @property
    def verdict(self) -> tuple[str, str]:
        """What to change, in words, and the config key."""
        training, shares = self.cfg.training, self.shares
        for part, limit, key, words in _ADVICE:
            if shares.get(part, 0) >= limit:
                return f"{shares[part]:.0%} {part}: {words.format(training)}", key
        busy = shares["forward"] + shares["backward"]
        if self.device.type == "cuda" and precision_on(training, self.device) == "no":
            return (
                f"{busy:.0%} computing, in float32: set training.use_amp=true",
                "training.use_amp",
            )
        what = "nothing stands in its way; a smaller network (model.base_channels, now "
        return (
            f"{busy:.0%} computing: {what}{self.cfg.model.base_channels}) or a shorter "
            "audio.chunk_size would make it faster",
            "model.base_channels",
        )

    def __str__(self) -> str:
        lines = [
            f"{part:17} {1000 * value:8.1f} ms {self.shares[part]:4.0%}  "
            + "#" * round(_BAR * self.shares[part])
            for part, value in self.seconds.items()
        ]
        return "\n".join([*lines, f"{'a step':17} {1000 * sum(self.seconds.values()):8.1f} ms"])


class _Stopwatch:
    """Adds up the seconds that blocks take, by name; a GPU has ended what it was told to do."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        started = self._now()
        with record_function(part):  # the part's name in a trace
            yield
        self.seconds[part] += self._now() - started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def time_steps(
    cfg: Config,
    train_set: ClipSource,
    device: str = "auto",
    *,
    valid_set: ClipSource | None = None,
    start_check_point: Path | None = None,
    steps: int = 20,
    trace: Path | None = None,
) -> Timing:
    """Make some training steps and a validation, and take their times.

    Readers that are ahead hide a slow disk for as long as their queue lasts, two batches each.

    Args:
        cfg: the config.
        train_set: as for `train`.
        device: as for `train`.
        valid_set: the same; None leaves validation out.
        start_check_point: weights to begin with.
        steps: how many; a few more are made before.
        trace: file for torch's trace of a few steps more, to be opened in a browser at
            chrome://tracing or ui.perfetto.dev.
    """
    if steps < 1:
        raise DataError(f"--steps {steps}: give at least 1")
    with rehearsal(cfg, train_set, device, start_check_point) as stage:
        engine, accelerator = stage.engine, stage.engine.accelerator
        engine.phase = watch = _Stopwatch(accelerator.device)
        clips = stage.read()

        def step(number: int) -> None:
            batches = []
            for _ in range(stage.plan.accumulation):
                with watch("waiting for data"):
                    waves = next(clips)
                with watch("copying"):
                    batches.append(stage.batch(*waves))
            seed_everything(cfg.training.seed, Stream.STEP, number, 0)
            engine.step(batches)

        for number in range(_WARM_UP):
            step(number)
        watch.seconds.clear()
        for number in range(_WARM_UP, _WARM_UP + steps):
            step(number)
        seconds = {part: watch.seconds[part] / steps for part in PARTS[:-1]}
        if trace is not None:
            with profile(acc_events=True) as profiler:
                for number in range(_TRACED):
                    step(number)
            profiler.export_chrome_trace(str(trace))
        if valid_set is not None and len(valid_set):
            with watch("validation"):
                validate(cfg, engine.ema.module, valid_set, accelerator)
            every = cfg.training.valid_every * stage.plan.steps
            seconds["validation"] = watch.seconds["validation"] / every
        return Timing(cfg, accelerator.device, seconds)
