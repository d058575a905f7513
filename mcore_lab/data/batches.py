"""Which samples make up step k: drawn by global index, so the same for every layout."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from megatron.core import parallel_state
from torch.utils.data import Dataset, default_collate

from mcore_lab.config import Recipe
from mcore_lab.data.sequences import Batch, packed_share, padded_share


class GlobalBatches:
    """The global batches of a dataset, and this data-parallel rank's part of each.

    Sample n of the run is entry n of an endless sequence: the dataset in a new order each epoch,
    decided by the seed alone. A step takes the `global_batch_size` samples that follow those of the
    steps before it, whatever the layout and however many steps the run has. With `num_samples` the
    sequence ends there, and batches are filled up with samples whose loss is masked. `rank_share`
    takes from the samples of a micro-batch what this rank has of their tokens.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        *,
        micro_batch_size: int,
        global_batch_size: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        seed: int,
        num_samples: int | None = None,
        rank_share: Callable[[Batch], Batch] = dict,
    ) -> None:
        self._dataset = dataset
        self._length = len(dataset)  # type: ignore[arg-type]
        self._micro_batch_size = micro_batch_size
        self._global_batch_size = global_batch_size
        self._rank, self._ranks = data_parallel_rank, data_parallel_size
        self._seed, self._num_samples = seed, num_samples
        self._rank_share = rank_share
        self._epoch_order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def num_microbatches(self) -> int:
        """Micro-batches that this rank takes a step."""
        return self._global_batch_size // (self._micro_batch_size * self._ranks)

    def sample_index(self, position: int) -> int | None:
        """Return the index of the sample at `position` in the run; None after the last."""
        if self._num_samples is not None and position >= self._num_samples:
            return None
        epoch, place = divmod(position, self._length)
        if self._epoch_order[0] != epoch:
            order = np.random.default_rng((self._seed, epoch)).permutation(self._length)
            self._epoch_order = (epoch, order)
        return int(self._epoch_order[1][place])

    def after(self, consumed_samples: int) -> Iterator[Batch]:
        """Yield this rank's micro-batches of the step that follows so many samples of the run."""
        for microbatch in range(self.num_microbatches):
            first = (microbatch * self._ranks + self._rank) * self._micro_batch_size
            start = consumed_samples + first
            positions = range(start, start + self._micro_batch_size)
            yield self._collate([self.sample_index(position) for position in positions])

    def _collate(self, indices: list[int | None]) -> Batch:
        # Megatron-Core's datasets return a sample with an empty loss mask for None.
        batch = self._rank_share(default_collate([self._dataset[index] for index in indices]))
        return {name: value.cuda(non_blocking=True) for name, value in batch.items()}


def global_batches(recipe: Recipe, dataset: Dataset[Any]) -> GlobalBatches:
    """Return the recipe's batches of `dataset`, for this rank of the data-parallel group."""
    return _batches(recipe, dataset, recipe.data.global_batch_size)


def validation_batch(recipe: Recipe, dataset: Dataset[Any]) -> GlobalBatches:
    """Return one batch of the first `eval_samples` samples of `dataset`, or of all if it has fewer.

    They are the same for every layout: what the ranks cannot share evenly is filled up.
    """
    samples = min(recipe.training.eval_samples, len(dataset))  # type: ignore[arg-type]
    unit = recipe.data.micro_batch_size * parallel_state.get_data_parallel_world_size()
    if recipe.layout.vpp > 1:
        group = recipe.model.transformer.get("microbatch_group_size_per_vp_stage")
        unit *= group or recipe.layout.pp
    return _batches(recipe, dataset, -(-samples // unit) * unit, num_samples=samples)


def _batches(
    recipe: Recipe, dataset: Dataset[Any], size: int, num_samples: int | None = None
) -> GlobalBatches:
    share = packed_share if recipe.data.pack_documents else padded_share
    return GlobalBatches(
        dataset,
        micro_batch_size=recipe.data.micro_batch_size,
        global_batch_size=size,
        data_parallel_rank=parallel_state.get_data_parallel_rank(),
        data_parallel_size=parallel_state.get_data_parallel_world_size(),
        seed=recipe.training.seed,
        num_samples=num_samples,
        rank_share=partial(share, layout=recipe.layout),
    )
