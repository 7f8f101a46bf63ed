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
from diffbuf_lib.training.feed import ClipSource, Stream, seed_everything
from diffbuf_lib.training.rehearsal import rehearsal
from diffbuf_lib.training.step import precision_on, validate

PARTS = ("waiting for data", "copying", "forward", "backward", "optimizer", "validation")
_WARM_UP = _TRACED = 3  # steps while memory is allocated and readers start; and in a trace file
_BAR = 40  # characters
# Checked in this order: a part, the share of a step from which on it is to blame, key and words.
_ADVICE = (
    ("waiting for data", 0.2, "training.num_workers", "raise {key} (now {value})"),
    ("copying", 0.15, "training.batch_size", "fewer and larger copies: raise {key} (now {value})"),
    ("validation", 0.25, "training.valid_every", "raise {key} (now {value}), or lower valid_clips"),
    ("optimizer", 0.25, "training.batch_size", "more clips an update: raise {key} (now {value})"),
)


@dataclass(frozen=True)
class Timing:
    """Where the time of a step goes; a validation's time is spread over the steps before it."""

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
                value = getattr(training, key.removeprefix("training."))
                return f"{shares[part]:.0%} {part}: {words.format(key=key, value=value)}", key
        computing = f"{shares['forward'] + shares['backward']:.0%} computing"
        if self.device.type == "cuda" and precision_on(training, self.device) == "no":
            return f"{computing}, in float32: set training.use_amp=true", "training.use_amp"
        key, size = "model.base_channels", self.cfg.model.base_channels
        return f"{computing}: only a smaller network ({key}, now {size}) would be faster", key

    def __str__(self) -> str:
        rows = [(part, s, self.shares[part]) for part, s in self.seconds.items()]
        rows.append(("a step", sum(self.seconds.values()), 1.0))
        bars = [(*row, "#" * round(_BAR * row[-1])) for row in rows]
        return "\n".join(f"{part:17}{1000 * s:9.1f} ms {x:4.0%}  {bar}" for part, s, x, bar in bars)


class Stopwatch:
    """Adds up the seconds that blocks take, by name; waits until a GPU has done its work."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.seconds: dict[str, float] = defaultdict(float)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time of a block to that of a part."""
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
    """Time some training steps and a validation; the arguments are as for `train`.

    Readers that work ahead hide a slow disk for as long as their queue lasts, two batches each.
    Torch's trace of a few more steps is written to `trace`, for ui.perfetto.dev.
    """
    with rehearsal(cfg, train_set, device, start_check_point) as stage:
        engine, accelerator = stage.engine, stage.engine.accelerator
        engine.phase = watch = Stopwatch(accelerator.device)
        clips = stage.read()

        def make(steps: int) -> None:
            for number in range(steps):
                batches = []
                for _ in range(stage.feed.plan.accumulation):
                    with watch("waiting for data"):
                        waves = next(clips)
                    with watch("copying"):
                        batches.append(stage.feed.batch(*waves))
                seed_everything(cfg.training.seed, Stream.STEP, number, 0)
                engine.step(batches)

        make(_WARM_UP)
        watch.seconds.clear()
        make(max(1, steps))
        seconds = {part: watch.seconds[part] / max(1, steps) for part in PARTS[:-1]}
        if trace is not None:
            with profile(acc_events=True) as profiler:
                make(_TRACED)
            profiler.export_chrome_trace(str(trace))
        if valid_set is not None and len(valid_set):
            with watch("validation"):
                validate(cfg, engine.ema.module, valid_set, accelerator)
            every = cfg.training.valid_every * stage.feed.plan.steps
            seconds["validation"] = watch.seconds["validation"] / every
        return Timing(cfg, accelerator.device, seconds)
