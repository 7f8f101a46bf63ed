"""Checks that need a GPU: CPU parity, memory, failures, processes, speed (`make gpu-check`).

    python -m benchmarks.gpu                 # says so in one line if there is no GPU
    python -m benchmarks.gpu --device cpu    # a rehearsal: the same code, tiny, on the CPU

A check has a limit and passes or fails; a speed has none. Under ten minutes on one GPU. The table
goes to results/gpu.json too, with the card's name; the exit status is 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffbuf_lib import Config, DiffusionBufferModel, OnlineEnhancer, load_config
from diffbuf_lib.diagnostics.capsule import Capsule
from diffbuf_lib.diffusion.buffer import complex_normal
from diffbuf_lib.errors import NonFiniteError, OutOfMemoryError
from diffbuf_lib.trace import format_table
from diffbuf_lib.training import train
from diffbuf_lib.training.feed import Batch, Stream, example_generators
from diffbuf_lib.training.memory import estimate_step
from diffbuf_lib.training.step import Engine, make_accelerator

TRAINING = "configs/9_Diffusion_Buffer_BBED.yaml"
STREAMING = "configs/block_causal_cpu.yaml"
TINY = ("model.base_channels=8", "model.channel_multipliers=[1,2]", "audio.chunk_size=6144",
        "diffusion_buffer={buffer_size: 4, num_frames: 20}")  # fmt: skip
PLAIN = ("training.num_workers=0", "training.lr=1e-4", "training.use_amp=false")


@dataclass(frozen=True)
class Row:
    """One finding: a value, and whether it is within its limit."""

    name: str
    value: float
    unit: str
    limit: str = ""
    ok: bool = True


class Clips:
    """Tones under noise, as long as the config says; clip `bad` contains a NaN."""

    def __init__(self, cfg: Config, size: int = 64, bad: int | None = None) -> None:
        self.length, self.size, self.bad = cfg.audio.chunk_size, size, bad

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(i)
        moments = torch.arange(self.length) / 16000
        target = 0.3 * torch.sin(2 * torch.pi * (200 + 20 * i) * moments)[None]
        mix = target + 0.2 * torch.randn(1, self.length, generator=generator)
        return (mix * float("nan") if i == self.bad else mix), target

    def set_epoch(self, epoch: int) -> None:
        """Every epoch has the same clips."""

    def name(self, i: int) -> str:
        """Name a clip, for messages."""
        return f"clip {i}"


class Bench:
    """The device, and configs that fit it."""

    def __init__(self, device: str) -> None:
        self.device = torch.device(device)
        self.on_gpu = self.device.type == "cuda"

    def cfg(self, path: str, *overrides: str) -> Config:
        """Load a config, made tiny in a rehearsal."""
        return load_config(path, [*PLAIN, *(() if self.on_gpu else TINY), *overrides])

    def wait(self) -> None:
        """Wait until the GPU has finished its work."""
        if self.on_gpu:
            torch.cuda.synchronize(self.device)

    def seconds(self, run: Callable[[], Any], repeats: int = 10) -> float:
        """Return the median time of a call, after three warm-up calls."""
        repeats, warm = (repeats, 3) if self.on_gpu else (1, 0)
        times = []
        for i in range(warm + repeats):
            self.wait()
            begun = time.perf_counter()
            run()
            self.wait()
            times += [time.perf_counter() - begun] if i >= warm else []
        return statistics.median(times)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run all checks, print the table, write it; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=Path("results/gpu.json"))
    given = parser.parse_args(arguments)
    if given.device == "cuda" and not torch.cuda.is_available():
        print("no GPU on this machine: nothing was checked")
        return 0
    bench, rows = Bench(given.device), []
    for area in AREAS:
        begun = time.perf_counter()
        try:
            rows += list(area(bench))
        except Exception as error:  # the other checks are still useful
            rows.append(
                Row(f"{area.__name__}: {type(error).__name__} {error}"[:120], 0, "", ok=False)
            )
        print(f"{area.__name__}: {time.perf_counter() - begun:.0f} s", file=sys.stderr)
    machine = {"device": _describe(bench.device), "torch": torch.__version__}
    table = [["", "", "", "limit", ""]]
    table += [[r.name, f"{r.value:.4g}", r.unit, r.limit, "ok" if r.ok else "FAILED"] for r in rows]
    print(json.dumps(machine), format_table(table), sep="\n")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    given.out.write_text(json.dumps({**machine, "rows": [asdict(r) for r in rows]}, indent=1))
    return int(not all(row.ok for row in rows))


def parity(bench: Bench) -> Iterator[Row]:
    """Trace, loss, gradients and streams of one model on both devices, in float32."""
    for name in (TRAINING, STREAMING):
        cfg = bench.cfg(name, "training.batch_size=2")
        models = [_model(cfg), _model(cfg).to(bench.device)]
        mix, target = _batch(cfg, 2)
        draws = models[0].draw(mix, torch.Generator().manual_seed(0))
        traces = []
        for model in models:
            device = next(model.parameters()).device
            trace = model.trace(mix.to(device), target.to(device), draws=draws.to(device))
            trace.loss.backward()
            traces.append(trace)
        for stage in ("Y", "V", "score", "loss"):
            pair = [getattr(trace, stage) for trace in traces]
            yield _agreement(f"{cfg.model.name}: {stage}", pair, 1e-3)
        found = [[p.grad for p in model.parameters() if p.grad is not None] for model in models]
        gradients = [torch.cat([grad.flatten().cpu() for grad in one]) for one in found]
        yield _agreement(f"{cfg.model.name}: gradients", gradients, 1e-2)
    outputs = []
    for model in models:
        R = complex_normal((1, model.framing.num_bins, 40), torch.Generator().manual_seed(1))
        sampler, device = model.sampler(), next(model.parameters()).device
        state = sampler.start(1, model.framing.num_bins, torch.Generator(device).manual_seed(0))
        state.V.zero_()
        with torch.inference_mode():
            generator = _Fixed()
            outputs.append(torch.stack([
                sampler.move(state, r.to(device), generator.draw(sampler, r).to(device))
                for r in (0.1 * R).unbind(-1)
            ]))  # fmt: skip
    yield _agreement("stream of 40 hops", outputs, 1e-2)


def precision(bench: Bench) -> Iterator[Row]:
    """A few steps in every precision end near those of float32."""
    losses = {}
    for name in ("fp32", "bf16", "fp16"):
        if name == "fp16" and not bench.on_gpu:
            continue  # the CPU has no scaler
        amp = [f"training.use_amp={str(name != 'fp32').lower()}"]
        amp += [] if name == "fp32" else [f"training.amp_dtype={name}"]
        cfg = bench.cfg(TRAINING, *amp, "training.batch_size=2")
        with _engine(cfg, bench) as (engine, batches):
            outcomes = [engine.step([batch]) for batch in batches(8)]
        losses[name] = statistics.fmean(o.loss for o in outcomes[-4:])
        near = abs(losses[name] / losses["fp32"] - 1) < 0.2
        yield Row(f"loss after 8 steps in {name}", losses[name], "", "within 20 % of fp32", near)


def memory(bench: Bench) -> Iterator[Row]:
    """The doctor's estimate against a step's real memory, and a step that cannot fit."""
    if not bench.on_gpu:
        return
    for batch in (2, 8):
        cfg = bench.cfg(TRAINING, f"training.batch_size={batch}")
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(bench.device)
        before = torch.cuda.memory_allocated(bench.device)
        with _engine(cfg, bench) as (engine, batches):
            for data in batches(2):
                engine.step([data])
        taken = torch.cuda.max_memory_allocated(bench.device) - before
        ratio = estimate_step(cfg).total(batch) / taken
        yield Row(f"estimated over allocated memory, batch {batch}", ratio, "", "0.85 to 1.15",
                  0.85 <= ratio <= 1.15)  # fmt: skip
    cfg = bench.cfg(TRAINING, "training.batch_size=4096")
    with tempfile.TemporaryDirectory() as folder:
        try:
            next(train(cfg, Clips(cfg, 4096), None, folder, device="cuda"))
            told = ""
        except OutOfMemoryError as error:
            told = str(error)
        yield Row("out of memory names a batch that fits", float(bool(told)), "",
                  "training.batch_size", "training.batch_size" in told)  # fmt: skip


def capsules(bench: Bench) -> Iterator[Row]:
    """A step that fails on the device is replayed on the CPU."""
    cfg = bench.cfg(STREAMING, "training.batch_size=1", "training.num_steps=9")
    with tempfile.TemporaryDirectory() as folder:
        try:
            for _ in train(cfg, Clips(cfg, 9, bad=4), None, folder, device=bench.device.type):
                pass
            found = False
        except NonFiniteError:
            (path,) = Path(folder).glob("capsule_*")
            found = Capsule.load(path).replay().reproduced
    yield Row("a capsule made here is replayed on a CPU", float(found), "", "reproduced", found)


def repeatability(bench: Bench) -> Iterator[Row]:
    """Two runs, and a run that was stopped: bit-identical weights."""
    for deterministic in (False, True):
        change = f"training.deterministic={str(deterministic).lower()}"
        cfg = bench.cfg(STREAMING, "training.batch_size=2", "training.num_steps=6",
                        "training.checkpoint_every=3", change)  # fmt: skip
        weights = []
        with tempfile.TemporaryDirectory() as root:
            for name, stop in (("one", None), ("again", None), ("stopped", 3)):
                folder = Path(root) / name
                run = train(cfg, Clips(cfg, 12), None, folder, device=bench.device.type)
                for record in run:
                    if record.step == stop:
                        run.close()
                        run = train(cfg, Clips(cfg, 12), None, folder, device=bench.device.type,
                                    resume=True)  # fmt: skip
                        for _ in run:
                            pass
                        break
                model = DiffusionBufferModel.from_pretrained(folder / "model")
                weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
        for name, other in zip(("repeated", "resumed"), weights[1:], strict=True):
            worst = float((weights[0] - other).abs().max())
            must = deterministic or not bench.on_gpu
            yield Row(f"{name}, deterministic {deterministic}: largest difference", worst, "",
                      "0" if must else "", worst == 0 or not must)  # fmt: skip


def processes(bench: Bench) -> Iterator[Row]:
    """Train under torchrun, with one process and with one per GPU."""
    count = torch.cuda.device_count() if bench.on_gpu else 1
    for number in sorted({1, count}):
        with tempfile.TemporaryDirectory() as folder:
            command = [
                sys.executable, "-m", "torch.distributed.run", "--standalone",
                f"--nproc_per_node={number}", "train.py", "--config_path", "configs/debug.yaml",
                "--results_path", folder, "--data_path", "data/DN-LM-demo/train", "--valid_path",
                "data/DN-LM-demo/valid", "--set", "training.num_steps=4", "--skip_doctor",
            ]  # fmt: skip
            done = subprocess.run(command, capture_output=True, text=True, check=False)
        yield Row(f"torchrun with {number} processes: exit status", done.returncode, "", "0",
                  done.returncode == 0)  # fmt: skip


def training_speed(bench: Bench) -> Iterator[Row]:
    """Clips per second of a training step, each switch separately against the plain step."""
    size = 16 if bench.on_gpu else 1
    cfg = bench.cfg(TRAINING, f"training.batch_size={size}")

    def speed(cfg: Config, change: Callable[[Engine], Any] = lambda engine: None) -> float:
        with _engine(cfg, bench) as (engine, batches):
            change(engine)
            (batch,) = batches(1)
            return size / bench.seconds(lambda: engine.step([batch]), 5)

    plain = speed(cfg)
    yield Row("training, float32", plain, "clips/s")
    bf16 = ("training.use_amp=true", "training.amp_dtype=bf16")
    changed = bench.cfg(TRAINING, *bf16, f"training.batch_size={size}")
    fast = speed(changed)
    yield Row("bf16", fast / plain, "times")
    with _tf32():
        yield Row("TF32", speed(cfg) / plain, "times")

    def contiguous(engine: Engine) -> None:
        engine.model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]

    def compiled(engine: Engine) -> None:
        engine.parallel = torch.compile(engine.model)

    def fused(engine: Engine) -> None:
        for group in engine.optimizer.param_groups:
            group["fused"], group["foreach"] = True, False

    for name, change in (("contiguous instead of channels-last", contiguous),
                         ("torch.compile", compiled), ("fused Adam", fused)):  # fmt: skip
        try:
            yield Row(name, speed(cfg, change) / plain, "times")
        except Exception as error:  # a switch that this card or build does not have is a finding
            yield Row(f"{name}: {type(error).__name__}", 0, "times")
    if bench.on_gpu:
        with _engine(changed, bench) as (engine, batches):
            (batch,) = batches(1)
            with torch.profiler.profile() as profile:
                for _ in range(5):
                    engine.step([batch])
                bench.wait()
            events = profile.key_averages()
            busy = sum(e.self_device_time_total for e in events) / 1e6
            wall = 5 * size / fast
        yield Row("GPU busy in a bf16 step", min(busy / wall, 1), "share")


def stream_speed(bench: Bench) -> Iterator[Row]:
    """A hop by itself and in a CUDA graph, and how many streams one device keeps up with."""
    cfg = bench.cfg(STREAMING)
    model = _model(cfg).to(bench.device).eval()
    hop = cfg.audio.stft.hop_length
    enhancer = OnlineEnhancer(model)
    samples = 0.1 * torch.randn(hop, device=bench.device)
    one = bench.seconds(lambda: enhancer.push(samples), 50)
    yield Row("hop of one stream", 1e3 * one, "ms", "below 1 in a graph")
    if bench.on_gpu:
        graph, keep = _graph_of_a_hop(model)
        replayed = bench.seconds(graph.replay, 50)
        yield Row("hop in a CUDA graph", 1e3 * replayed, "ms", "below 1", replayed < 1e-3)
        del keep
    most = 0
    for streams in (16, 64, 256, 512, 1024, 2048) if bench.on_gpu else (2,):
        try:
            many = OnlineEnhancer(model, batch=streams)
            block = 0.1 * torch.randn(streams, hop, device=bench.device)
            if bench.seconds(partial(many.push, block), 10) > hop / 16000:
                break
        except torch.OutOfMemoryError:
            break
        most = streams
    yield Row("streams in real time", most, "", "aim: 1000")


AREAS = (parity, precision, memory, capsules, repeatability, processes, training_speed,
         stream_speed)  # fmt: skip


class _Fixed:
    """Noise drawn on the CPU, so that both devices get the same."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(2)

    def draw(self, sampler: Any, R: Tensor) -> Tensor:
        return complex_normal((*R.shape, len(sampler.t) + 1), self.generator)


def _model(cfg: Config) -> DiffusionBufferModel:
    torch.manual_seed(0)
    model = DiffusionBufferModel(cfg)
    for parameter in model.parameters():  # zero-initialised layers would hide earlier ones
        if parameter.ndim > 1 and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    return model


def _batch(cfg: Config, size: int) -> tuple[Tensor, Tensor]:
    mix, target = zip(*(Clips(cfg)[i] for i in range(size)), strict=True)
    return torch.stack(mix), torch.stack(target)


@contextmanager
def _engine(cfg: Config, bench: Bench) -> Iterator[tuple[Engine, Callable[[int], list[Batch]]]]:
    """A training engine on the device, and what makes batches for it."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a rehearsal in another precision
        accelerator = make_accelerator(cfg.training, bench.device.type)
    engine = Engine(cfg, DiffusionBufferModel(cfg), accelerator, 100)

    def batches(count: int) -> list[Batch]:
        size = cfg.training.batch_size
        mix, target = (wave.to(bench.device) for wave in _batch(cfg, size))
        return [
            Batch(mix, target, example_generators(
                [(step, i) for i in range(size)], 0, Stream.EXAMPLE, bench.device))
            for step in range(count)
        ]  # fmt: skip

    yield engine, batches
    engine.close()


def _graph_of_a_hop(model: DiffusionBufferModel) -> tuple[torch.cuda.CUDAGraph, Any]:
    """Capture one hop of one stream; returns the graph, and the tensors it works on."""
    sampler = model.sampler()
    state = sampler.start(1, model.framing.num_bins)
    R = torch.zeros_like(state.V[..., 0])
    z = sampler.draw(R)
    with torch.inference_mode():
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            for _ in range(3):
                sampler.move(state, R, z)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out = sampler.move(state, R, z)
    return graph, (state, R, z, out)


@contextmanager
def _tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")  # convolutions have TF32 by default
    yield
    torch.set_float32_matmul_precision(before)


def _agreement(name: str, pair: Sequence[Tensor], limit: float) -> Row:
    expected, found = (tensor.detach().cpu() for tensor in pair)
    worst = float((expected - found).abs().max() / expected.abs().max())
    return Row(f"{name}: largest difference", worst, "relative", f"{limit:g}", worst <= limit)


def _describe(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


if __name__ == "__main__":
    sys.exit(main())
