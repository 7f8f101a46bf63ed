"""What can be found in a failed step: the first bad value, and the tensors on the way to it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor, nn

from diffbuf_lib.training.feed import Batch


@dataclass(frozen=True)
class Finding:
    """Where the first bad value stands.

    Args:
        kind: file, stage, sigma, module, gradient, weights or error.
        name: of the file, stage, module or parameter; for sigma, `t=` and the diffusion time.
        detail: one line for people.
        round: which batch of an accumulated step, from 0.
    """

    kind: str
    name: str
    detail: str
    round: int = 0

    def __str__(self) -> str:
        return f"{self.kind} {self.name}: {self.detail}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return asdict(self)


@dataclass(frozen=True)
class Visit:
    """One tensor on the way through a step.

    Args:
        kind: file, stage or module.
        name: such as Y, or network.first.
        shape: of the tensor.
        dtype: of the tensor, without `torch.`.
        bad: NaN and Inf values in it.
        largest: largest finite magnitude.
        round: which batch of an accumulated step.
    """

    kind: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    bad: int
    largest: float
    round: int


def bad_tensors(model: nn.Module) -> list[str]:
    """Return the names of weights and buffers that hold a NaN or an infinity."""
    return [
        name
        for name, value in model.state_dict().items()
        if value.is_floating_point() and not value.isfinite().all()
    ]


def finding_of(error: Exception, model: nn.Module, round_: int = 0) -> Finding:
    """Name the innermost module that an exception came through."""
    modules = {id(module): name for name, module in model.named_modules()}
    where, traceback = "", error.__traceback__
    while traceback is not None:
        where = modules.get(id(traceback.tb_frame.f_locals.get("self")), where)
        traceback = traceback.tb_next
    reason = " ".join(str(error).split())
    return Finding("error", where or "the step", f"{type(error).__name__}: {reason}", round_)


def check_files(batch: Batch, names: Sequence[str], round_: int) -> Finding | None:
    """Name the first file whose samples are not finite."""
    for j, name in enumerate(names):
        for what, wave in (("mix", batch.mix[j]), ("target", batch.target[j])):
            if bad := count_bad(wave):
                channel, sample = (~wave.isfinite()).nonzero()[0].tolist()
                detail = f"{what} holds {bad} NaN or Inf, first at sample {sample}"
                return Finding("file", name, f"{detail} of channel {channel}", round_)
    return None


def check_sigma(trace: dict[str, Tensor], round_: int) -> Finding | None:
    """Name the first diffusion time whose sigma is 0 or not finite: it divides the score."""
    sigma, t = trace["sigma"], trace["t"]
    bad = ~((1 / sigma).isfinite() & sigma.isfinite() & (sigma > 0))
    if not bad.any():
        return None
    example, frame = bad.nonzero()[0].tolist()
    detail = (
        f"sigma is {sigma[example, frame].item():.4g} at diffusion time "
        f"{t[example, frame].item():.6g} (example {example}, buffer frame {frame}); "
        f"{int(bad.sum())} of {bad.numel()} are not usable"
    )
    return Finding("sigma", f"t={t[example, frame].item():.6g}", detail, round_)


def first_bad_gradient(events: list[tuple[str, str, int]]) -> Finding:
    """Name where, from the loss backwards, the gradient was first not finite."""
    for kind, name, bad in events:
        if bad and kind == "module":
            return Finding("gradient", name, f"{bad} NaN or Inf reach its output from the loss")
        if bad:
            return Finding("gradient", name, f"{bad} NaN or Inf, the first from the loss backwards")
    return Finding("gradient", "sum", "finite in every round, but their sum overflows")


def visit(kind: str, name: str, value: Tensor, round_: int) -> Visit:
    """Note a tensor on the way through a step."""
    finite = value.detach().abs().float()
    finite = finite[finite.isfinite()]
    largest = finite.max().item() if finite.numel() else float("nan")
    dtype = str(value.dtype).removeprefix("torch.")
    return Visit(kind, name, tuple(value.shape), dtype, count_bad(value), largest, round_)


def count_bad(value: Tensor) -> int:
    """Count NaN and Inf."""
    return int((~value.detach().isfinite()).sum())
