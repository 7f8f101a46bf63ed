"""Which example goes where, and with which noise: all of it a function of (seed, epoch, position).

Nothing here keeps a state that would have to be saved. The order of an epoch, the noise of the
example at a position of that order and the dropout of a step are all seeded from their names, so
they depend neither on the batch size, nor on the number of processes, nor on where a run was
stopped and resumed.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
import torch

from diffbuf_lib.errors import DataError


class Stream(IntEnum):
    """What a seed is for: two streams never share one, whatever their other numbers are."""

    WEIGHTS = 0
    ORDER = 1
    EXAMPLE = 2
    STEP = 3
    VALID = 4
    WORKERS = 5


def stream_seed(seed: int, stream: Stream, *key: int) -> int:
    """Return a 64-bit seed for one stream of one run.

    Args:
        seed: `training.seed`.
        stream: what the seed is for.
        key: what names the draw within the stream, such as (epoch, position).
    """
    sequence = np.random.SeedSequence([seed, int(stream), *key])
    return int(sequence.generate_state(1, np.uint64)[0])


def example_generators(
    keys: Sequence[tuple[int, ...]], seed: int, stream: Stream, device: torch.device
) -> list[torch.Generator]:
    """Return one generator an example, each seeded from its own key.

    Args:
        keys: one key an example: (epoch, position) in training, (clip,) in validation.
        seed: `training.seed`.
        stream: `Stream.EXAMPLE` or `Stream.VALID`.
        device: where the model draws its noise; a generator works on one device only.
    """
    return [torch.Generator(device).manual_seed(stream_seed(seed, stream, *key)) for key in keys]


def seed_everything(seed: int, stream: Stream, *key: int) -> None:
    """Seed the global generators of torch (all devices), numpy and Python, for dropout and such."""
    value = stream_seed(seed, stream, *key)
    torch.manual_seed(value)
    np.random.seed(value & 0xFFFFFFFF)
    random.seed(value)


@dataclass(frozen=True)
class EpochPlan:
    """How one epoch is cut into batches, over all processes.

    A batch is one model call of one process; `processes` batches side by side are a round, and
    `accumulation` rounds (fewer at the end of the epoch) are one optimizer step. A last round
    that is not full is dropped, except when the whole set is smaller than one round: then the
    only round holds all of it in smaller batches.

    Args:
        size: examples in the training set.
        batch_size: examples of a batch.
        accumulation: rounds whose gradients make one step.
        processes: how many processes train.
        seed: `training.seed`.

    Raises:
        DataError: the training set is empty.
    """

    size: int
    batch_size: int
    accumulation: int
    processes: int
    seed: int

    def __post_init__(self) -> None:
        if self.size < 1:
            raise DataError("the training set holds no clip: check the path of the training data")

    @property
    def rounds(self) -> int:
        """Rounds of an epoch, at least 1."""
        return max(1, self.size // (self.batch_size * self.processes))

    @property
    def steps(self) -> int:
        """Optimizer steps of an epoch, at least 1."""
        return -(-self.rounds // self.accumulation)

    @property
    def examples_per_round(self) -> int:
        """Examples that all processes together take in one round."""
        return min(self.batch_size * self.processes, self.size)

    def positions(self, round_: int, rank: int) -> list[int]:
        """Return where in the epoch's order the examples of one batch stand.

        Example j of round b on process r of W stands at (b W + r) batch_size + j. So two
        processes with batches of 1 see, together, what one process with batches of 2 sees.
        """
        if self.size >= self.batch_size * self.processes:
            start = (round_ * self.processes + rank) * self.batch_size
            return list(range(start, start + self.batch_size))
        # Fewer examples than one round: equal shares, and where they do not come out even the
        # last process starts again at the front. All processes must have a batch, or the
        # gradient exchange would wait for one that never comes.
        share = -(-self.size // self.processes)
        return [(rank * share + j) % self.size for j in range(share)]

    def order(self, epoch: int) -> list[int]:
        """Return the shuffled indices of the training set in one epoch."""
        generator = torch.Generator().manual_seed(stream_seed(self.seed, Stream.ORDER, epoch))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order

    def batches(self, epoch: int, rank: int, start: int = 0) -> list[list[int]]:
        """Return the dataset indices of one process's batches from round `start` on.

        Because the rest of an epoch is computed rather than skipped, a resumed run does not read
        the files that came before.
        """
        order = self.order(epoch)
        return [
            [order[position] for position in self.positions(round_, rank)]
            for round_ in range(start, self.rounds)
        ]
