"""The cost of diagnostics: statistics in a training step, inactive hooks, the doctor."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffbuf_lib import DiffusionBufferModel, load_config
from diffbuf_lib.data import DNLMDataset, write_audio
from diffbuf_lib.diagnostics import examine, gradient_statistics, watch_modules

Measurement = tuple[str, float, str, str]  # name, value, unit, note


def bench_diagnostics() -> list[Measurement]:
    """Measure on the configs that people start with: debug.yaml's and the demo's."""
    return [*_statistics("configs/demo.yaml"), *_doctor("configs/demo.yaml")]


def _statistics(config: str) -> list[Measurement]:
    """Compare steps by CPU time on one thread, which other programs hardly disturb."""
    cfg = load_config(config)
    torch.manual_seed(0)
    model = DiffusionBufferModel(cfg)
    optimizer = torch.optim.Adam(model.parameters())
    mix, target = 0.1 * torch.randn(2, 2, 1, cfg.audio.chunk_size)  # batches of 2

    def step(statistics: bool = False) -> None:
        optimizer.zero_grad()
        trace = model.trace(mix, target)
        trace.loss.backward()
        if statistics:
            str(trace.summary())
            gradient_statistics(model)
        optimizer.step()

    def with_statistics() -> None:
        step(statistics=True)

    def after_watching() -> None:
        step()

    def watched(statistics: bool) -> Callable[[], None]:
        def run() -> None:
            with watch_modules(model, statistics=statistics):
                step()

        return run

    step()
    with watch_modules(model):
        step()
    kinds = [step, with_statistics, after_watching, watched(False), watched(True)]
    plain, statistics, off, finite, full = _alternating(kinds)
    note = f"of a step of {1e3 * plain:.0f} ms on one thread, {config}"
    return [
        ("Trace.summary and gradient_statistics", 100 * (statistics / plain - 1), "%", note),
        ("hooks off, after watching", 100 * (off / plain - 1), "%", note),
        ("watch_modules, finiteness only", 100 * (finite / plain - 1), "%", note),
        ("watch_modules, statistics", 100 * (full / plain - 1), "%", note),
    ]


def _doctor(config: str) -> list[Measurement]:
    """Time the doctor on as many clips as the demo set has, in this warm process."""
    cfg = load_config(config)
    rate = cfg.audio.sample_rate
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        sets = []
        for split, count in (("train", 96), ("valid", 12)):
            for i in range(count):
                sample = Path(folder) / split / f"sample_{i:05}"
                sample.mkdir(parents=True)
                target, noise = 0.05 * torch.randn(2, 1, rate, generator=generator)
                for name, wave in (("vocals", target), ("noise", noise)):
                    write_audio(sample / f"{name}.wav", wave, rate, "FLOAT")
                write_audio(sample / "mixture.wav", target + noise, rate, "FLOAT")
            sets.append(DNLMDataset(Path(folder) / split, training=split == "train"))
        seconds = min(_seconds(lambda: examine(cfg, *sets)) for _ in range(3))
    return [("doctor", seconds, "s", f"96 and 12 clips, {config}")]


def _alternating(functions: list[Callable[[], None]], repeats: int = 7) -> list[float]:
    """Return each function's shortest CPU time on one thread, seconds, measured in turns."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        times = [[_cpu_seconds(function) for function in functions] for _ in range(repeats)]
    finally:
        torch.set_num_threads(threads)
    return [min(column) for column in zip(*times, strict=True)]


def _cpu_seconds(function: Callable[[], object]) -> float:
    start = time.process_time()
    function()
    return time.process_time() - start


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start
