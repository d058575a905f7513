"""Where a loss or a gradient that is not finite comes from: the rank, and the layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer
from torch.utils._pytree import tree_leaves

from mcore_lab.runtime.wrappers import unwrapped


class _Place(NamedTuple):
    """A module or a parameter of one rank; those of one rank sort in forward order."""

    stage: int
    number: int
    rank: int
    name: str
    is_origin: bool
    """Whether what went into the module was finite."""


def not_finite_where(model: Sequence[Any], loss: float, run_again: Callable[[], object]) -> str:
    """Say where a step's numbers stop being finite; every rank calls this.

    `run_again` takes the step's micro-batches forward once more, while every module's output is
    looked at. Where all of these are finite, it is a gradient that is not.
    """
    places = _outputs(model, run_again)
    if places:
        first = min(places, key=lambda place: (not place.is_origin, place))
        return f"the loss is {loss}; on rank {first.rank} the output of {first.name} is not finite"
    places = _of_all_ranks(_gradients(model))
    if places:
        # Backward they spread from the last layer to the first.
        last = max(places, key=lambda place: (place.stage, place.number, -place.rank))
        return f"the loss is {loss}; on rank {last.rank} the gradient of {last.name} is not finite"
    return f"the loss is {loss}; a second pass over the same batch was finite"


def _outputs(model: Sequence[Any], run_again: Callable[[], object]) -> list[_Place]:
    seen: list[_Place] = []
    hooks = []

    def look(name: str, chunk: int) -> Callable[..., None]:
        def hook(_: Any, args: Any, kwargs: Any, output: Any) -> None:
            if not _is_finite(output):
                is_origin = _is_finite((args, kwargs))
                seen.append(_Place(_stage(chunk), len(seen), dist.get_rank(), name, is_origin))

        return hook

    for number, chunk in enumerate(model):
        for name, module in _named_modules(chunk):
            hooks.append(module.register_forward_hook(look(name, number), with_kwargs=True))
    try:
        with torch.no_grad():
            run_again()
    finally:
        for hook in hooks:
            hook.remove()
    # The first of each kind is enough; the rest follows from it.
    return _of_all_ranks([*seen[:1], *[place for place in seen if place.is_origin][:1]])


def _gradients(model: Sequence[Any]) -> list[_Place]:
    return [
        _Place(_stage(number), index, dist.get_rank(), name, True)
        for number, chunk in enumerate(model)
        for index, (name, parameter) in enumerate(_named_parameters(chunk))
        if not _is_finite(getattr(parameter, "main_grad", None))
    ]


def _named_modules(chunk: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    inside = unwrapped(chunk)
    for name, module in inside.named_modules():
        if name:
            yield _in_whole_model(inside, name), module


def _named_parameters(chunk: Any) -> Iterator[tuple[str, torch.nn.Parameter]]:
    inside = unwrapped(chunk)
    for name, parameter in inside.named_parameters():
        yield _in_whole_model(inside, name), parameter


def _in_whole_model(chunk: torch.nn.Module, name: str) -> str:
    """Return the name with its layer's number in the whole model, not in this stage's part."""
    parts = name.split(".")
    module: Any = chunk
    for place, part in enumerate(parts):
        module = getattr(module, part, None)
        if isinstance(module, TransformerLayer):
            parts[place] = str(module.layer_number - 1)
    return ".".join(parts)


def _stage(chunk: int) -> int:
    """Return which of all (virtual) pipeline stages a chunk of this rank is."""
    stages: int = parallel_state.get_pipeline_model_parallel_world_size()
    return chunk * stages + parallel_state.get_pipeline_model_parallel_rank()


def _is_finite(values: Any) -> bool:
    return all(
        bool(value.isfinite().all())
        for value in tree_leaves(values)
        if isinstance(value, torch.Tensor) and value.is_floating_point()
    )


def _of_all_ranks(places: list[_Place]) -> list[_Place]:
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, places)
    return [place for of_rank in of_ranks for place in of_rank]
