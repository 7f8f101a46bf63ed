"""One hop of a stream as an ONNX graph, and the sampler that runs it in torch's place.

A graph takes the newest frame, its noise and the state as real tensors, and gives the clean frame
and the next state: [batch, ...] each, batch free. The state is whatever tensors a `BufferState` and
the network's own memory hold, in their order.
"""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffbuf_lib.data.audio import atomic_file
from diffbuf_lib.diffusion.buffer import Generators
from diffbuf_lib.diffusion.sampler import BufferSampler, BufferState
from diffbuf_lib.errors import ConfigError, MissingExtraError
from diffbuf_lib.model import DiffusionBufferModel, evaluating, fingerprint
from diffbuf_lib.networks import can_stream

OPSET = 18
LIMIT = 1e-4  # of the peak: the largest error that a graph may have
aten = torch.ops.aten


class GraphSampler:
    """What `BufferSampler` does, its hops run by ONNX Runtime on torch's number of threads.

    Args:
        sampler: of the same model; draws the noise and begins the streams.
        path: the graph, from `write_hop`.

    Raises:
        MissingExtraError: onnxruntime is not installed.
    """

    def __init__(self, sampler: BufferSampler, path: Path) -> None:
        runtime = _extra("onnxruntime")
        options = runtime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        self.session = runtime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        self.names = [given.name for given in self.session.get_inputs()]
        self.t, self.delay, self.start, self.draw = (
            sampler.t, sampler.delay, sampler.start, sampler.draw
        )  # fmt: skip

    def step(self, state: BufferState, R: Tensor, generator: Generators = None) -> Tensor:
        """Take in one noisy frame and put out one clean frame; see `BufferSampler.step`."""
        return self.move(state, R, self.draw(R, generator))

    def move(self, state: BufferState, R: Tensor, z: Tensor) -> Tensor:
        """Do what `step` does, with noise z; see `BufferSampler.move`."""
        before = tensors(state)
        given = [_as_real(tensor).contiguous().numpy() for tensor in (R, z, *before)]
        out, *after = map(
            torch.from_numpy, self.session.run(None, dict(zip(self.names, given, strict=True)))
        )
        after = [_like(new, old) for new, old in zip(after, before, strict=True)]
        moved = with_tensors(state, after)
        for field in fields(BufferState):
            setattr(state, field.name, getattr(moved, field.name))
        state.pushed += 1
        return torch.view_as_complex(out)


def cached_graph(model: DiffusionBufferModel, delay: int | None = None) -> Path:
    """Return a file with the graph of a model's hop, made now if there is none that agrees with it.

    It is kept in diffbuf/ of the user's folder for caches, since making it takes half a minute.
    """
    sampler = checked_sampler(model, delay)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffbuf"
    path = cache / f"{fingerprint(model)}-{sampler.delay}.onnx"
    # A few hops tell whether another version of this library made it.
    if not path.is_file() or worst_error(model, path, delay, hops=8) > LIMIT:
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(path) as temporary:
            write_hop(model, temporary, delay)
    return path


def checked_sampler(model: DiffusionBufferModel, delay: int | None = None) -> BufferSampler:
    """Return the sampler of a model whose hop can be a graph.

    Raises:
        ConfigError: a network that cannot stream, or a model that is not in float32 on the CPU.
    """
    if not can_stream(model.network):
        raise ConfigError(
            f"model.name {model.cfg.model.name} has no hop to export: it remembers nothing and "
            f"computes all {model.cfg.num_frames} frames of its window again for each new one; "
            "a network that streams, such as block_causal, has one"
        )
    sampler = model.sampler(delay)
    if sampler.t.dtype != torch.float32 or sampler.t.device.type != "cpu":
        raise ConfigError(
            f"a graph is made of a model in float32 on the CPU, not {sampler.t.dtype} on "
            f"{sampler.t.device}: model.float().cpu()"
        )
    return sampler


def worst_error(
    model: DiffusionBufferModel, path: Path, delay: int | None = None, hops: int = 500
) -> float:
    """Return a graph's largest difference from the model's hops, over the peak of each tensor.

    Every hop begins with the model's state, and what it makes of the state counts too: a network
    with untrained weights can be chaotic, so that any two ways of rounding part in time. Two
    streams side by side, of noise that rises and falls by 60 dB within 200 hops.
    """
    sampler = checked_sampler(model, delay)
    graph, generator = GraphSampler(sampler, path), torch.Generator().manual_seed(0)
    shape = (2, model.framing.num_bins)
    state = sampler.start(*shape, generator)
    errors, peaks = [], []
    with torch.inference_mode(), evaluating(model):
        for hop in range(hops):
            level = 10 ** (-1.5 - 1.5 * math.cos(hop * math.pi / 100))
            R = level * torch.randn(*shape, dtype=torch.complex64, generator=generator)
            z = sampler.draw(R, generator)
            same = with_tensors(state, [tensor.clone() for tensor in tensors(state)])
            expected = [sampler.move(state, R, z), *tensors(state)]
            found = [graph.move(same, R, z), *tensors(same)]
            peaks.append([float(a.abs().max()) for a in expected])
            errors.append([float((a - b).abs().max()) for a, b in zip(expected, found, strict=True)])
    worst = zip(map(max, zip(*errors, strict=True)), map(max, zip(*peaks, strict=True)), strict=True)
    return max(error / max(peak, 1e-9) for error, peak in worst)


def write_hop(model: DiffusionBufferModel, path: Path, delay: int | None = None) -> None:
    """Write the ONNX graph of a hop: noisy, noise, state.0, ... to clean, next.0, ...

    noisy and clean are [batch, F, 2] compressed spectra, real and imaginary; noise [batch, F,
    Kb + 1, 2] of variance 1/2 each.

    Raises:
        ConfigError: a network that cannot stream or whose steps cannot be traced.
        MissingExtraError: onnx or onnxscript is not installed.
    """
    sampler = checked_sampler(model, delay)
    with torch.no_grad(), evaluating(model):
        state = sampler.start(2, model.framing.num_bins)
        R = torch.randn_like(state.V[..., 0])
        given = [_as_real(value) for value in (R, sampler.draw(R), *tensors(state))]
        count = range(len(given) - 2)
        names = ["noisy", "noise", *(f"state.{i}" for i in count)]
        _write(_Hop(model, sampler, state), given, path, names, "clean", len(count))


def write_start(model: DiffusionBufferModel, path: Path, delay: int | None = None) -> None:
    """Write the ONNX graph that begins streams: noise [batch, F, Kb, 2] to next.0, ..."""
    sampler = checked_sampler(model, delay)
    state = sampler.start(1, model.framing.num_bins)
    noise = torch.zeros(2, model.framing.num_bins, len(sampler.t), 2)
    with torch.no_grad():
        count = len(tensors(state))
        _write(_Start(sampler.next_std, tensors(state)), [noise], path, ["noise"], None, count)


class _Hop(nn.Module):
    """`BufferSampler.move` with all that it takes and gives as real tensors."""

    def __init__(self, model: nn.Module, sampler: BufferSampler, state: BufferState) -> None:
        super().__init__()
        self.model, self.sampler, self.state = model, sampler, state  # model: for its weights
        self.kinds = tensors(state)

    def forward(self, given: list[Tensor]) -> list[Tensor]:
        R, z, *given = given
        own = [_like(new.clone(), old) for new, old in zip(given, self.kinds, strict=True)]
        state = with_tensors(self.state, own)  # the network changes it in place
        out = self.sampler.move(state, torch.view_as_complex(R), torch.view_as_complex(z))
        return [_as_real(value) for value in (out, *tensors(state))]


class _Start(nn.Module):
    """The state of streams that begin, from one stream's: V's buffer is sigma noise."""

    def __init__(self, sigma: Tensor, one: list[Tensor]) -> None:
        super().__init__()
        self.sigma, self.one = sigma, [_as_real(tensor) for tensor in one]

    def forward(self, given: list[Tensor]) -> list[Tensor]:
        (noise,) = given
        V, *others = (one.expand(noise.shape[0], *one.shape[1:]) for one in self.one)
        past = V[:, :, : V.shape[2] - noise.shape[2]] * 0
        V = torch.cat([past, self.sigma[:, None] * noise], dim=2)
        return [V, *(other.clone() for other in others)]


class _Complex:
    """A complex tensor as two real ones."""

    def __init__(self, real: Tensor | float, imag: Tensor | float) -> None:
        self.real, self.imag = real, imag


class _RealArithmetic(torch.fx.Interpreter):
    """Run a traced graph without complex tensors, which ONNX does not have.

    What is linear is done to both parts. What is not, and is missing here, makes a wrong graph,
    which the comparison with the model refuses.
    """

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        op = getattr(target, "overloadpacket", target)
        if op is aten.view_as_complex:
            return _Complex(*args[0].unbind(-1))
        if op is aten.complex:
            return _Complex(*args)
        found: list[_Complex] = []
        map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, _Complex) else None, args)
        if not found:
            return super().call_function(target, args, kwargs)
        a = found[0]
        if op is aten.view_as_real:
            return torch.stack([a.real, a.imag], dim=-1)  # type: ignore[list-item]
        if op in (aten.real, aten.imag):
            return a.real if op is aten.real else a.imag
        if op is aten.abs:
            return (a.real**2 + a.imag**2) ** 0.5
        if op is aten.mul and len(found) == 2:
            b = found[1]
            return _Complex(a.real * b.real - a.imag * b.imag, a.real * b.imag + a.imag * b.real)
        if op in (aten.add, aten.sub):
            args = tuple(each if isinstance(each, _Complex) else _Complex(each, 0.0) for each in args)

        def part(name: str) -> Any:
            return target(
                *map_leaves(
                    lambda leaf: getattr(leaf, name) if isinstance(leaf, _Complex) else leaf, args
                ),
                **kwargs,
            )

        return _Complex(part("real"), part("imag"))


class _Real(nn.Module):
    """A traced graph run in real arithmetic."""

    def __init__(self, traced: torch.fx.GraphModule) -> None:
        super().__init__()
        self.traced = traced

    def forward(self, given: list[Tensor]) -> Any:
        return _RealArithmetic(self.traced).run(*given)


def _write(
    module: nn.Module, given: list[Tensor], path: Path, names: list[str], first: str | None, count: int
) -> None:
    """Trace a module, rid it of complex tensors, and write it as ONNX."""
    for package in ("onnx", "onnxscript"):
        _extra(package)
    batch = torch.export.Dim("batch")
    shapes = ([{0: batch} for _ in given],)
    outputs = [*([first] if first else []), *(f"next.{i}" for i in range(count))]
    log = logging.getLogger("torch.onnx")
    level = log.level
    log.setLevel(logging.ERROR)  # it tells that torchvision is not there
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch's, of torch
            traced = torch.export.export(module, (given,), dynamic_shapes=shapes)
            real = _Real(traced.module(check_guards=False))  # type: ignore[arg-type]
            program = torch.onnx.export(
                real, (given,), dynamo=True, dynamic_shapes=shapes, opset_version=OPSET,
                input_names=names, output_names=outputs, verbose=False,
                optimize=False,  # ONNX Runtime does it as well, when it loads the graph
            )  # fmt: skip
    except Exception as error:  # whatever a network of one's own does that cannot be traced
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"the network's step cannot be exported: {reason}") from error
    finally:
        log.setLevel(level)
    assert program is not None
    program.save(path, external_data=False)


def tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in dataclasses, lists, tuples and dicts, in order."""
    found: list[Tensor] = []
    map_leaves(lambda leaf: found.append(leaf) if isinstance(leaf, Tensor) else None, tree)
    return found


def with_tensors(tree: Any, new: list[Tensor]) -> Any:
    """Return a copy of a tree with other tensors."""
    rest = iter(new)
    return map_leaves(lambda leaf: next(rest) if isinstance(leaf, Tensor) else leaf, tree)


def map_leaves(function: Callable[[Any], Any], tree: Any) -> Any:
    """Return a copy of dataclasses, lists, tuples and dicts with `function` of what they hold."""
    if is_dataclass(tree) and not isinstance(tree, type):
        changed = {f.name: map_leaves(function, getattr(tree, f.name)) for f in fields(tree)}
        return replace(tree, **changed)
    if isinstance(tree, dict):
        return {key: map_leaves(function, value) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        return type(tree)(map_leaves(function, item) for item in tree)
    return function(tree)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def _like(tensor: Tensor, old: Tensor) -> Tensor:
    """Make complex what was."""
    return torch.view_as_complex(tensor) if old.is_complex() else tensor


def _extra(package: str) -> Any:
    try:
        return import_module(package)
    except ImportError:
        raise MissingExtraError(
            f"ONNX needs the {package} package: pip install 'diffbuf[export]'"
        ) from None
