"""Measure everything in one run, print a table, write results/bench.json.

Machines are shared and noisy, so values to be compared are measured in the same run, and the
fastest of several repetitions counts.
"""

from __future__ import annotations

import argparse
import json
import platform
import resource
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import diffbuf_lib
from benchmarks import streaming
from benchmarks.diagnostics import bench_diagnostics
from benchmarks.shards import bench_shards
from diffbuf_lib import Config, DiffusionBufferModel, load_config
from diffbuf_lib.data import DNLMDataset, build_dnlm, write_audio
from diffbuf_lib.diffusion.buffer import complex_normal, draw_times, perturb
from diffbuf_lib.diffusion.sde import make_sde
from recipes.demo.drone import DroneParameters, synthesise

CONFIG = "configs/9_Diffusion_Buffer_BBED.yaml"
BINS, FRAMES, BUFFER = 256, 128, 20  # the paper's F, K and B


@dataclass(frozen=True)
class Row:
    """One measurement: what, how much, in which unit, and what it was compared with."""

    name: str
    value: float
    unit: str
    note: str = ""


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("areas", nargs="*", help=f"of {', '.join(AREAS)}; without, all")
    areas = parser.parse_args().areas or list(AREAS)
    if unknown := set(areas) - set(AREAS):
        parser.error(f"{', '.join(unknown)}: the areas are {', '.join(AREAS)}")
    rows = [row for area in areas for row in AREAS[area]()]
    rows.append(Row("peak memory of this process", _peak_gib(), "GiB"))
    machine = describe_machine()
    width = max(len(row.name) for row in rows)
    print("\n".join(f"{key}: {value}" for key, value in machine.items()))
    for row in rows:
        print(f"{row.name:{width}}  {row.value:10.2f} {row.unit:10} {row.note}")
    out = Path("results/bench.json")
    out.parent.mkdir(exist_ok=True)
    report = {"machine": machine, "rows": [asdict(row) for row in rows]}
    out.write_text(json.dumps(report, indent=1) + "\n")
    print(f"written: {out}")


def bench_data() -> list[Row]:
    """Samples per second of DNLMDataset, files in the page cache, one process."""
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        generator = torch.Generator().manual_seed(0)
        rng = np.random.default_rng(0)
        for speaker in range(2):
            wave = 0.3 * torch.randn(1, 16000 * 8, generator=generator).clamp(-3, 3)
            write_audio(_made(root / "speech" / f"{speaker}") / "a.wav", wave, 16000)
            noise = synthesise(DroneParameters.draw(rng), 16000 * 8, 16000, rng)
            write_audio(_made(root / "noise") / f"{speaker}.wav", noise, 16000)
        build_dnlm(root / "speech", root / "noise", root / "set", train=200, valid=1, processes=1)
        dataset = DNLMDataset(root / "set" / "train", leading_zeros=62 * 256)
        seconds = best(lambda: [dataset[i] for i in range(len(dataset))], repeats=3)
    return [Row("DNLMDataset", len(dataset) / seconds, "clips/s", "1 s clips, one process, cached")]


def bench_perturb() -> list[Row]:
    """The perturbed input of a batch of 32, first without, then with drawing noise and times."""
    cfg = load_config(CONFIG)
    sde = make_sde(cfg.sde)
    S, Y = (torch.randn(32, BINS, FRAMES, dtype=torch.complex64) for _ in range(2))
    t = draw_times(cfg.diffusion_buffer, 32)
    z = complex_normal((32, BINS, BUFFER))

    def drawn() -> None:
        times = draw_times(cfg.diffusion_buffer, 32)
        perturb(S, Y, times, complex_normal((32, BINS, BUFFER)), sde)

    note = f"batch 32, F {BINS}, K {FRAMES}, B {BUFFER}"
    return [
        Row("perturb", 1e3 * best(lambda: perturb(S, Y, t, z, sde), 20), "ms", note),
        Row("perturb, times and noise drawn", 1e3 * best(drawn, 20), "ms", note),
    ]


def bench_networks() -> list[Row]:
    """Forward passes and training steps, against one channels-last 3x3 convolution."""
    rows = []
    ceiling = conv_gflops()
    rows.append(
        Row("one 3x3 convolution", ceiling, "GFLOP/s", "96 channels, 256 x 128, channels-last")
    )
    for name in ("ncsnpp", "conv"):
        model = _model(name)
        for K in (64, FRAMES):
            V, Y = (torch.randn(1, BINS, K, dtype=torch.complex64) for _ in range(2))
            t = torch.linspace(0.03, 0.8, BUFFER).expand(1, -1)
            with torch.inference_mode():
                with FlopCounterMode(display=False) as counter:
                    model.denoise(V, Y, t)
                seconds = best(lambda: model.denoise(V, Y, t), 7)  # noqa: B023
            gflop = counter.get_total_flops() / 1e9
            share = gflop / seconds / ceiling
            note = f"{gflop:.0f} GFLOP, {share:.0%} of the convolution's speed"
            rows.append(Row(f"{name} forward, batch 1, K {K}", 1e3 * seconds, "ms", note))
        for precision in ("float32", "bfloat16"):
            seconds = best(training_step(model, bf16=precision == "bfloat16"), 3)
            note = f"batch 2, K {FRAMES}, B {BUFFER}, Adam"
            rows.append(Row(f"{name} training step, {precision}", 1e3 * seconds, "ms", note))
    return rows


def bench_enhance() -> list[Row]:
    """All of online enhancement for one frame: V, one network call, one reverse step."""
    rows = []
    for name in ("ncsnpp", "conv"):
        model = _model(name)
        sampler = model.sampler()
        state = sampler.start(1, BINS)
        R = torch.randn(1, BINS, dtype=torch.complex64)
        with torch.inference_mode():
            seconds = best(lambda: sampler.step(state, R), 7)  # noqa: B023
        hop = model.cfg.audio.stft.hop_length / model.cfg.audio.sample_rate
        note = f"K {FRAMES}, all frames recomputed; real-time factor {seconds / hop:.1f}"
        rows.append(Row(f"{name} online, one frame", 1e3 * seconds, "ms", note))
    return rows


def training_step(model: DiffusionBufferModel, *, bf16: bool) -> Callable[[], None]:
    """Return one step of a model on a batch of two clips of K frames."""
    optimizer = torch.optim.Adam(model.parameters())
    mix, target = torch.randn(2, 2, 1, (FRAMES - 1) * 256).mul(0.1).unbind(0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
            loss = model(mix, target)
        loss.backward()
        optimizer.step()

    return step


def conv_gflops() -> float:
    """GFLOP/s of one channels-last 3x3 convolution of the network's finest level."""
    x = torch.randn(1, 96, BINS, FRAMES).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(96, 96, 3, 3).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        seconds = best(lambda: F.conv2d(x, weight, padding=1), 20)
    return 2 * 9 * 96 * 96 * BINS * FRAMES / seconds / 1e9


def best(function: Callable[[], Any], repeats: int) -> float:
    """Return the shortest of `repeats` times in seconds, after one warm-up call."""
    function()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


AREAS: dict[str, Callable[[], list[Row]]] = {
    "data": bench_data,
    "perturb": bench_perturb,
    "networks": bench_networks,
    "enhance": bench_enhance,
    "streaming": lambda: [Row(*row) for row in streaming.measure(best)],
    "shards": lambda: [Row(*row) for row in bench_shards()],
    "diagnostics": lambda: [Row(*row) for row in bench_diagnostics()],
}


def describe_machine() -> dict[str, str]:
    """Describe the machine that the numbers were measured on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if _is_linux() else []:
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    return {
        "cpu": cpu,
        "threads": str(torch.get_num_threads()),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "diffbuf": diffbuf_lib.__version__,
        "system": platform.platform(),
    }


def _model(name: str) -> DiffusionBufferModel:
    cfg: Config = load_config(CONFIG).override(
        f"model.name={name}",
        f"model.base_channels={96 if name == 'ncsnpp' else 16}",
        f"audio.chunk_size={(FRAMES - 1) * 256}",
    )
    torch.manual_seed(0)
    return DiffusionBufferModel(cfg)


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _is_linux() -> bool:
    return platform.system() == "Linux"


if __name__ == "__main__":
    main()
