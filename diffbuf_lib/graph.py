"""One hop of a stream as a graph for ONNX Runtime or ExecuTorch, and the sampler that runs it.

A graph maps the newest frame, its noise and the state to the clean frame and the next state, all
real tensors [batch, ...]; batch is dynamic in ONNX (.onnx), and 1 in ExecuTorch (.pte). The state
is all tensors of `BufferState`, including the network's memory, in dataclasses, lists, tuples and
dicts, in order.
"""

from __future__ import annotations

import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from diffbuf_lib.data.audio import atomic_file
from diffbuf_lib.diffusion.buffer import Generators
from diffbuf_lib.diffusion.sampler import BufferSampler, BufferState
from diffbuf_lib.errors import ConfigError, MissingExtraError, need
from diffbuf_lib.model import DiffusionBufferModel, evaluating, fingerprint
from diffbuf_lib.networks import can_stream

_INSTALL = "pip install 'diffbuf[export]'"
_MOBILE = "in a separate environment, pip install executorch==1.2.0, which is made for torch 2.11"
Run = Callable[[list[Tensor]], Sequence[Tensor]]
Backend = Literal["torch", "onnx"]
OPSET = 18
LIMIT = 1e-4  # the largest error that a graph may have, over the peak


class GraphSampler:
    """A `BufferSampler` whose hops run in a graph's runtime; ONNX uses as many threads as torch.

    The graph at `path` is from `write_hop`; the sampler of the same model draws the noise and
    begins the streams. Raises MissingExtraError if the runtime is missing.
    """

    def __init__(self, sampler: BufferSampler, path: Path) -> None:
        self.t, self.delay = sampler.t, sampler.delay
        self.start, self.draw = sampler.start, sampler.draw
        self.run = _program(path) if path.suffix == ".pte" else _session(path)

    def step(self, state: BufferState, R: Tensor, generator: Generators = None) -> Tensor:
        """Take in one noisy frame and return one clean frame; see `BufferSampler.step`."""
        return self.move(state, R, self.draw(R, generator))

    def move(self, state: BufferState, R: Tensor, z: Tensor) -> Tensor:
        """Do what `step` does, with the noise of `draw`."""
        clean, *after = self.run([_real(t).contiguous() for t in (R, z, *tensors(state))])
        moved = with_tensors(state, after)
        for field in fields(BufferState):
            setattr(state, field.name, getattr(moved, field.name))
        state.pushed += 1
        return torch.view_as_complex(clean)


def _session(path: Path) -> Run:
    runtime = need("onnxruntime", "ONNX", _INSTALL)
    options = runtime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    names = [given.name for given in session.get_inputs()]

    def run(given: list[Tensor]) -> list[Tensor]:
        feeds = {name: tensor.numpy() for name, tensor in zip(names, given, strict=True)}
        return [torch.from_numpy(made) for made in session.run(None, feeds)]

    return run


def _program(path: Path) -> Run:
    program = need("executorch.runtime", "ExecuTorch", _MOBILE).Runtime.get().load_program(path)
    method = program.load_method("forward")
    # Cloned, since the next call reuses the memory of its results.
    return lambda given: [made.clone() for made in method.execute(given)]


def cached_graph(model: DiffusionBufferModel, delay: int | None = None) -> Path:
    """Return the graph of a model's hop, made anew unless a cached one agrees with the model.

    Making it takes half a minute; it is kept in diffbuf/ in the user's cache folder.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffbuf"
    path = cache / f"{fingerprint(model)}-{hop_sampler(model, delay).delay}.onnx"
    # A few hops show whether another version of this library made it.
    if not path.is_file() or worst_error(model, path, delay, hops=8) > LIMIT:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            write_hop(model, temporary, delay)
    return path


def hop_sampler(model: DiffusionBufferModel, delay: int | None = None) -> BufferSampler:
    """Return the sampler of a model whose hop can be exported.

    Raises ConfigError for a network that cannot stream, or a model not in float32 on the CPU.
    """
    if not can_stream(model.network):
        what = f"model.name {model.cfg.model.name} computes all {model.cfg.num_frames} frames"
        fix = "export a network that can stream, such as block_causal"
        raise ConfigError(f"{what} for each new one, so it has no hop: {fix}")
    sampler = model.sampler(delay)
    if sampler.t.dtype != torch.float32 or sampler.t.device.type != "cpu":
        what = f"a float32 model on the CPU, not {sampler.t.dtype} on {sampler.t.device}"
        raise ConfigError(f"a graph is made from {what}: use model.float().cpu()")
    return sampler


def worst_error(
    model: DiffusionBufferModel, path: Path, delay: int | None = None, hops: int = 500
) -> float:
    """Return a graph's largest difference from the model's hops, over the peak of each tensor.

    The next state is compared too. Every hop starts from the model's state, since an untrained
    network can be chaotic, and rounding differences would then grow over time. The input is noise
    that rises and falls by 60 dB within 200 hops; in ONNX, two streams side by side.
    """
    sampler, shape = hop_sampler(model, delay), (_streams(path), model.framing.num_bins)
    graph, generator = GraphSampler(sampler, path), torch.Generator().manual_seed(0)
    state = sampler.start(*shape, generator)
    errors, peaks = [], []
    with torch.inference_mode(), evaluating(model):
        for hop in range(hops):
            level = 10 ** (-1.5 - 1.5 * math.cos(hop * math.pi / 100))
            R = level * torch.randn(*shape, dtype=torch.complex64, generator=generator)
            z = sampler.draw(R, generator)
            copies = [_real(tensor).clone() for tensor in tensors(state)]
            same = with_tensors(state, copies)
            expected = [sampler.move(state, R, z), *tensors(state)]
            found = [graph.move(same, R, z), *tensors(same)]
            differences = [a - b for a, b in zip(expected, found, strict=True)]
            errors.append(torch.stack([d.abs().max() for d in differences]))
            peaks.append(torch.stack([a.abs().max() for a in expected]))
    peak = torch.stack(peaks).amax(dim=0).clamp_min(1e-9)
    return float((torch.stack(errors).amax(dim=0) / peak).max())


def write_hop(
    model: DiffusionBufferModel, path: Path, delay: int | None = None, hops: int = 50
) -> float:
    """Write the graph of a hop, from noisy, noise, state.0, ... to clean, next.0, ...

    noisy and clean are [batch, F, 2], compressed spectra, real and imaginary; noise is [batch, F,
    Kb + 1, 2] of variance 1/2. The path ends in .onnx or .pte. Returns `worst_error` over
    `hops` hops. Raises ConfigError for a network that cannot stream or be traced by torch.export,
    or if the error exceeds `LIMIT`.
    """
    mobile = path.suffix == ".pte"
    for package in ("executorch.exir",) if mobile else ("onnx", "onnxscript"):
        need(package, *(("ExecuTorch", _MOBILE) if mobile else ("ONNX", _INSTALL)))
    sampler, kept = hop_sampler(model, delay), model.memory_format

    def hop(given: list[Tensor]) -> list[Tensor]:
        R, z, *own = (tensor.clone() for tensor in given)  # the network changes its state in place
        after = with_tensors(state, own)
        clean = sampler.move(after, torch.view_as_complex(R), torch.view_as_complex(z))
        return [_real(tensor) for tensor in (clean, *tensors(after))]

    with torch.no_grad(), evaluating(model):
        state = sampler.start(_streams(path), model.framing.num_bins)
        noisy = torch.zeros_like(state.V[..., 0])
        given = [_real(tensor) for tensor in (noisy, sampler.draw(noisy), *tensors(state))]
        numbers = range(len(given) - 2)
        shapes = None if mobile else ([{0: torch.export.Dim("batch")} for _ in given],)
        try:
            if mobile:  # its kernels support no other
                model.set_memory_format("contiguous")
            with quiet():
                traced = torch.export.export(_Call(hop, model), (given,), dynamic_shapes=shapes)
                graph: Any = traced.module(check_guards=False)
                step = _Call(lambda given: _RealArithmetic(graph).run(*given), graph)
                if mobile:
                    lowered = _lowered(torch.export.export(step, (given,)))
                else:
                    program: Any = torch.onnx.export(
                        step, (given,), dynamo=True, dynamic_shapes=shapes,
                        opset_version=OPSET, verbose=False,
                        input_names=["noisy", "noise", *(f"state.{i}" for i in numbers)],
                        output_names=["clean", *(f"next.{i}" for i in numbers)],
                    )  # fmt: skip
        except MissingExtraError:
            raise
        except Exception as error:  # whatever makes a user's network untraceable
            why = str(error).strip().partition("\n")[0]
            what = f"the step of model.name {model.cfg.model.name} cannot be exported"
            raise ConfigError(f"{what}: {why}") from error
        finally:
            if kept != model.memory_format:
                model.set_memory_format(kept)
    if mobile:
        path.write_bytes(lowered)
    else:
        program.save(path, external_data=False)
    worst = worst_error(model, path, delay, hops)
    if not worst <= LIMIT:
        what = f"the graph differs from the model by {worst:.1e} of the peak, more than {LIMIT:.0e}"
        fix = f"see what StreamingNetwork.start requires of the memory of {model.cfg.model.name}"
        raise ConfigError(f"{what}: {fix}; an SDE must be linear in its spectra")
    return worst


def _streams(path: Path) -> int:
    return 1 if path.suffix == ".pte" else 2


def _lowered(program: Any) -> bytes:
    """Lower an exported program with ExecuTorch, and XNNPACK for the operations it supports."""
    partition = "executorch.backends.xnnpack.partition.xnnpack_partitioner"
    partitioner = need(partition, "ExecuTorch", _MOBILE).XnnpackPartitioner()
    if (flatc := Path(sys.executable).with_name("flatc")).is_file():  # may not be on PATH
        os.environ.setdefault("FLATC_EXECUTABLE", str(flatc))
    exir = need("executorch.exir", "ExecuTorch", _MOBILE)
    lowered = exir.to_edge_transform_and_lower(program, partitioner=[partitioner])
    return bytes(lowered.to_executorch().buffer)


class _Call(nn.Module):
    """A function as a module for torch.export, with the module that holds its weights."""

    def __init__(self, function: Callable[[list[Tensor]], Any], weights: nn.Module) -> None:
        super().__init__()
        self.function, self.weights = function, weights

    def forward(self, given: list[Tensor]) -> Any:
        return self.function(given)


class _Complex:
    """A complex tensor as two real ones."""

    def __init__(self, real: Any, imag: Any) -> None:
        self.real, self.imag = real, imag


class _RealArithmetic(torch.fx.Interpreter):
    """Run a traced graph without complex tensors, which ONNX does not have.

    Linear operations are applied to both parts. Any other operation that is not handled here makes
    a wrong graph, which the comparison with the model rejects.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op, aten = getattr(target, "overloadpacket", target), torch.ops.aten
        if op is aten.view_as_complex:
            return _Complex(*args[0].unbind(-1))
        if op is aten.complex:
            return _Complex(*args)
        found = tensors(args, _Complex)
        if not found:
            return super().call_function(target, args, kwargs)
        a, b = found[0], found[-1]
        if op is aten.view_as_real:
            return torch.stack([a.real, a.imag], dim=-1)
        if op is aten.real or op is aten.imag:
            return a.real if op is aten.real else a.imag
        if op is aten.abs:
            return (a.real**2 + a.imag**2).sqrt()
        if op is aten.mul and len(found) == 2:
            return _Complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)
        if op is aten.add or op is aten.sub:  # a real number has no imaginary part to add
            args = tuple(arg if isinstance(arg, _Complex) else _Complex(arg, 0.0) for arg in args)

        def part(name: str) -> Any:
            of = lambda leaf: getattr(leaf, name) if isinstance(leaf, _Complex) else leaf  # noqa: E731
            return target(*map_leaves(of, args), **kwargs)

        return _Complex(part("real"), part("imag"))


def tensors(tree: Any, kind: type = Tensor) -> list[Any]:
    """Return the tensors of a tree, or its leaves of another type, in order."""
    found: list[Any] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, kind) else None, tree)
    return found


def with_tensors(tree: Any, new: list[Tensor]) -> Any:
    """Return a copy of a tree with new tensors; real pairs become complex where the old were."""
    rest = iter(new)

    def other(old: Any) -> Any:
        if not isinstance(old, Tensor):
            return old
        return torch.view_as_complex(next(rest)) if old.is_complex() else next(rest)

    return map_leaves(other, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Copy nested dataclasses, lists, tuples and dicts, with `function` applied to each leaf."""
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: map_leaves(function, getattr(tree, f.name)) for f in fields(tree)}
        return replace(tree, **changed)
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, item) for item in tree)
    return function(tree)


def _real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the exporters' warnings about themselves and about missing torchvision."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
