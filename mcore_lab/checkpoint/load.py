"""Read a sharded checkpoint into a model of any layout."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.dict_utils import dict_list_map_outplace, nested_values
from megatron.core.dist_checkpointing.mapping import (
    ShardedObject,
    ShardedTensor,
    ShardedTensorFactory,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistLoadShardedStrategy
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from mcore_lab import compat
from mcore_lab.checkpoint.admission import admit
from mcore_lab.checkpoint.contents import Contents
from mcore_lab.checkpoint.failures import failures_explained
from mcore_lab.checkpoint.optimizer_state import give_state, put_optimizer, wanted_tensors
from mcore_lab.checkpoint.random_state import (
    KEY,
    has_own_states,
    set_random_state,
    wanted_random_state,
)
from mcore_lab.checkpoint.read import Shards
from mcore_lab.checkpoint.state import Progress, model_keys, model_state, optimizer_state
from mcore_lab.checkpoint.trust import require_harmless, weights_only
from mcore_lab.errors import CheckpointError
from mcore_lab.runtime.together import fail_together
from mcore_lab.runtime.wrappers import unwrapped

Shape = tuple[int, ...]
_SHOWN = 3
_COMMON = "common_state/shard_0_1"
_COMMON_FILE = "common.pt"
"""Where the state is that is common to all ranks: in an object, or before Megatron-Core 0.17."""
_OPTIMIZER = "optimizer."
_OWN = "own optimizer"
"""Where what is read for the optimizer goes: what the checkpoint has beside may be of another."""


def load_weights(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None = None,
    *,
    verify: bool = True,
) -> None:
    """Load the weights of the checkpoint at `path` and nothing else.

    `optimizer` is the one that trains them, if any does. With `verify` its files are first held
    against its manifest. Raises CheckpointError, on every rank, if it cannot be read or is of
    another model.
    """
    _load_weights(path, admit(path, verify=verify), chunks, optimizer)


def load_checkpoint(
    path: Path,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer,
    scheduler: OptimizerParamScheduler,
    *,
    verify: bool = True,
) -> Progress:
    """Load all of the checkpoint at `path` that this layout can take; return how far its run came.

    On another layout that is all but the random generators: see `random_state`. With `verify` its
    files are first held against its manifest. Raises CheckpointError, on every rank, if it cannot
    be read or is of another model.
    """
    contents = admit(path, verify=verify)
    with fail_together():
        common = common_state(path, contents)
        progress = progress_in(path, common)
    if progress.step == 0:
        _load_weights(path, contents, chunks, optimizer)
        return progress
    give_state(optimizer)
    wanted = model_state(chunks)
    own = optimizer_state(optimizer, chunks, wanted, is_loading=True)
    wanted[_OWN] = wanted_tensors(optimizer, own, contents.tensors)
    if has_own_states(common.get("rank_sizes")):
        wanted[KEY] = wanted_random_state()
    state = _read(path, contents, wanted)
    _put_weights(chunks, state)
    put_optimizer(optimizer, own, state[_OWN], state["optimizer"])
    scheduler.load_state_dict(state["opt_param_scheduler"])
    if KEY in wanted:
        set_random_state(state[KEY])
    return progress


def common_state(path: Path, contents: Contents) -> dict[str, Any]:
    """Return what all ranks have alike. Raises CheckpointError."""
    place = contents.objects.get(_COMMON)
    with failures_explained("read", path), weights_only():
        # Megatron-Core takes the file where there are both.
        if place is None or (path / _COMMON_FILE).exists():
            common: dict[str, Any] = dist_checkpointing.load_common_state_dict(str(path))
        elif compat.megatron_core_is_before("0.17"):
            raise CheckpointError(
                f"cannot read the checkpoint {path}: it was written with Megatron-Core 0.17 or "
                "later, and the installed one is older"
            )
        else:
            common = _only(Shards(path).object(place))
    return common


def progress_in(path: Path, common: dict[str, Any]) -> Progress:
    """Return how far the run of a checkpoint came. Raises CheckpointError if it does not say."""
    names = ("iteration", "consumed_train_samples")
    for name in names:
        if name not in common:
            raise CheckpointError(
                f"the checkpoint {path} does not say how far its run came ({name}): "
                "--checkpoint.load to begin with its weights alone"
            )
    return Progress(*(int(common[name]) for name in names))


def shapes_of_all_ranks(state: dict[str, Any]) -> dict[str, Shape]:
    """Return the global shapes of a sharded state's tensors, by name; every rank calls this."""
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, _shapes(nested_values(state)))
    return {key: shape for one in of_ranks for key, shape in one.items()}


def sharded_tensors(state: dict[str, Any]) -> Iterator[ShardedTensor]:
    """Return the parts of tensors that a sharded state has on this rank, with their storage."""
    yield from _sharded(nested_values(state))


def _sharded(values: Iterable[Any]) -> Iterator[ShardedTensor]:
    for value in values:
        if isinstance(value, ShardedTensorFactory):
            yield from _sharded(nested_values({"": value.build()}))
        elif isinstance(value, ShardedTensor):
            yield value


def _load_weights(
    path: Path,
    contents: Contents,
    chunks: Sequence[torch.nn.Module],
    optimizer: MegatronOptimizer | None,
) -> None:
    _put_weights(chunks, _read(path, contents, model_state(chunks)))
    if optimizer is not None:
        # Under bf16 it made its own copies of the weights before these were loaded.
        optimizer.reload_model_params()


def _put_weights(chunks: Sequence[torch.nn.Module], state: dict[str, Any]) -> None:
    with fail_together():
        for key in model_keys(chunks):
            _require_harmless_extras(state[key])
    with weights_only():
        for key, chunk in zip(model_keys(chunks), chunks, strict=True):
            unwrapped(chunk).load_state_dict(state[key])


def _require_harmless_extras(state: dict[str, Any]) -> None:
    for name, value in state.items():
        if name.endswith("_extra_state") and isinstance(value, torch.Tensor) and value.numel():
            require_harmless(name, value.cpu().numpy().tobytes())


def _read(path: Path, contents: Contents, wanted: dict[str, Any]) -> dict[str, Any]:
    """Return what is wanted of a checkpoint in the place of its sharded tensors and objects."""
    shapes = shapes_of_all_ranks(wanted)
    with fail_together(), failures_explained("read", path), weights_only():
        _require_same_model(path, contents, shapes)
        # That each part is some rank's own was seen to when it was saved; here it only costs time.
        state: dict[str, Any] = dist_checkpointing.load(
            wanted, str(path), _FromShards(Shards(path), contents), validate_access_integrity=False
        )
    return state


class _FromShards(TorchDistLoadShardedStrategy):
    """Lets each rank read its own parts itself: see `mcore_lab.checkpoint.read`."""

    def __init__(self, shards: Shards, contents: Contents) -> None:
        super().__init__()
        # Megatron-Core 0.19 leaves quantized tensors to a strategy that has this.
        self.stream_ckpt_dequant = False
        self._shards, self._contents = shards, contents

    def load(self, sharded_state_dict: dict[str, Any], *_: Any) -> dict[str, Any]:
        """Return the state with tensors and objects in the place of what stood for them."""
        state: dict[str, Any] = dict_list_map_outplace(self._stored, sharded_state_dict)
        return state

    def _stored(self, part: ShardedTensor | ShardedObject) -> Any:
        if isinstance(part, ShardedObject):
            place = self._contents.objects.get(part.unique_key)
            if place is None:
                raise CheckpointError(
                    f"cannot read the checkpoint {self._shards.folder}: it has no {part.unique_key}"
                )
            return _only(self._shards.object(place))
        part.init_data("cpu")
        region = part.data.detach()
        self._shards.fill(
            region[(None,) * part.prepend_axis_num],
            self._contents.tensors[part.key],
            part.global_offset,
        )
        return region


def _only(objects: list[Any]) -> Any:
    """Return a rank's object: Megatron-Core saves a list of all that it has under the name."""
    (only,) = objects
    return only


def _require_same_model(path: Path, contents: Contents, shapes: dict[str, Shape]) -> None:
    """Compare names and global shapes, of all ranks, before anything is read into the model."""
    there = {name: tensor.shape for name, tensor in contents.tensors.items()}
    off = list(_differences(shapes, there))
    if off:
        more = f" (and {len(off) - _SHOWN} more)" if len(off) > _SHOWN else ""
        raise CheckpointError(
            f"the checkpoint {path} is of another model: {'; '.join(off[:_SHOWN])}{more}"
        )


def _shapes(values: Iterable[Any]) -> dict[str, Shape]:
    return {tensor.key: tuple(tensor.global_shape) for tensor in _sharded(values)}


def _differences(wanted: dict[str, Shape], there: dict[str, Shape]) -> Iterator[str]:
    for key, shape in wanted.items():
        if key not in there:
            yield f"{key} is not in it"
        elif there[key] != shape:
            yield f"{key} is {there[key]} in it and {shape} in this model"
    for key in sorted(there.keys() - wanted.keys()):
        if not key.startswith(_OPTIMIZER):
            yield f"{key} is in it and not in this model"
