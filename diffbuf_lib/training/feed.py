"""One process's batches, in the order of the plan, each with the generators of its examples."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from diffbuf_lib.config import TrainingConfig
from diffbuf_lib.errors import DataError
from diffbuf_lib.training.engine import Batch
from diffbuf_lib.training.plan import EpochPlan, Stream, example_generators, stream_seed
from diffbuf_lib.training.reading import ClipSource, InFlight, read_batches


class Feed:
    """Reads ahead within an epoch, from any round of it.

    Args:
        plan: which clips make up which batch.
        training: for `num_workers` and the seed.
        train_set: the clips.
        device: where batches go, and where the model draws its noise.
        rank: which process this is.
    """

    def __init__(
        self,
        plan: EpochPlan,
        training: TrainingConfig,
        train_set: ClipSource,
        device: torch.device,
        rank: int,
    ) -> None:
        self.plan, self.training, self.train_set = plan, training, train_set
        self.device, self.rank = device, rank
        self._in_flight = InFlight()
        self._reader: Iterator[tuple[torch.Tensor, torch.Tensor]] | None = None

    def batch(self, epoch: int, round_: int) -> Batch:
        """Return the batch of a round; ask for the rounds of an epoch in their order.

        Raises:
            DataError: a clip cannot be read; names it.
        """
        if self._reader is None:
            self.train_set.set_epoch(epoch)
            self._reader = read_batches(
                self.train_set,
                self.plan.batches(epoch, self.rank, start=round_),
                num_workers=self.training.num_workers,
                seed=stream_seed(self.training.seed, Stream.WORKERS, epoch, self.rank),
                pin_memory=self.device.type == "cuda",
                in_flight=self._in_flight,
            )
        mix, target = next(self._reader)
        keys = [(epoch, position) for position in self.plan.positions(round_, self.rank)]
        return Batch(
            mix.to(self.device, non_blocking=True),
            target.to(self.device, non_blocking=True),
            example_generators(keys, self.training.seed, Stream.EXAMPLE, self.device),
        )

    def death(self, error: BaseException) -> DataError | None:
        """Return what to raise if an exception, met anywhere, tells of a reader's death."""
        return self._in_flight.death(error)

    def stop(self) -> None:
        """End the processes that read ahead; the next batch may be of any epoch and round."""
        self._reader = None
