"""What goes through the model in the first micro-batch: every layer's output, and on one rank's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.transformer_layer import TransformerLayer

from mcore_lab.backends.context_parallel import zigzag_places
from mcore_lab.config import Recipe
from mcore_lab.runtime.wrappers import unwrapped

_PARTS = ("input_layernorm", "self_attention", "pre_mlp_layernorm", "mlp")
"""What is looked at inside a layer, in forward order; then the layer's own output."""


@dataclass(frozen=True)
class _Part:
    """One rank's part of an output `[s, b, h]`."""

    name: str
    tp: int
    cp: int
    data: torch.Tensor


class Activations:
    """Keeps the output of each part of the model the first time that it is computed.

    Looked at are the embedding, each layer's norms, attention, MLP and output, and the last norm:
    of the first micro-batch, on the first data-parallel replica, which has the first samples.
    """

    def __init__(self, recipe: Recipe, model: list[Any]) -> None:
        self._recipe = recipe
        self._parts: list[_Part] = []
        self._hooks: list[Any] = []
        if parallel_state.get_data_parallel_rank() == 0 and not recipe.data.pack_documents:
            for chunk in model:
                for name, module in _watched(unwrapped(chunk)):
                    self._watch(name, module)

    def _watch(self, name: str, module: torch.nn.Module) -> None:
        def keep(_: Any, __: Any, output: Any) -> None:
            hook.remove()
            output = output[0] if isinstance(output, tuple) else output
            if isinstance(output, torch.Tensor) and output.dim() == 3:
                tp = parallel_state.get_tensor_model_parallel_rank()
                cp = parallel_state.get_context_parallel_rank()
                self._parts.append(_Part(name, tp, cp, output.detach().float().cpu().clone()))

        hook = module.register_forward_hook(keep)
        self._hooks.append(hook)

    def whole(self) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
        """Return each output `[s, b, h]`, in forward order, and by how much copies of it differ.

        Every rank calls this; on other ranks than 0 both are empty.
        """
        for hook in self._hooks:
            hook.remove()
        is_first = dist.get_rank() == 0
        of_ranks: list[Any] | None = [None] * dist.get_world_size() if is_first else None
        dist.gather_object(self._parts, of_ranks)
        by_name: dict[str, dict[tuple[int, int], torch.Tensor]] = {}
        for part in (part for of_rank in of_ranks or [] for part in of_rank):
            by_name.setdefault(part.name, {})[part.cp, part.tp] = part.data
        wholes = {name: self._assembled(parts) for name, parts in by_name.items()}
        ordered = sorted(wholes, key=_forward_order)
        return (
            {name: wholes[name][0] for name in ordered},
            {name: wholes[name][1] for name in ordered if wholes[name][1] > 0},
        )

    def _assembled(self, parts: dict[tuple[int, int], torch.Tensor]) -> tuple[torch.Tensor, float]:
        layout, length = self._recipe.layout, self._recipe.data.sequence_length
        of_cp, spread = [], 0.0
        for cp in range(layout.cp):
            of_tp = [parts[cp, tp] for tp in range(layout.tp) if (cp, tp) in parts]
            if layout.sp:
                of_cp.append(torch.cat(of_tp))
                continue
            of_cp.append(of_tp[0])
            norm = float(of_tp[0].norm()) or 1.0
            spread = max([spread, *(float((one - of_tp[0]).norm()) / norm for one in of_tp[1:])])
        padded = layout.padded(length)
        whole = of_cp[0].new_empty(padded, *of_cp[0].shape[1:])
        for cp, part in enumerate(of_cp):
            whole[zigzag_places([padded], cp, layout.cp)] = part
        return whole[:length], spread


def _watched(model: Any) -> Iterator[tuple[str, torch.nn.Module]]:
    """Yield the parts of a model chunk, with the names that they have in the whole model."""
    embedding = getattr(model, "embedding", None)
    if embedding is not None and getattr(model, "pre_process", False):
        yield "embedding", embedding
    decoder = getattr(model, "decoder", None)
    for module in decoder.modules() if decoder is not None else ():
        if isinstance(module, TransformerLayer):
            layer = f"decoder.layers.{module.layer_number - 1}"
            for part in _PARTS:
                if isinstance(getattr(module, part, None), torch.nn.Module):
                    yield f"{layer}.{part}", getattr(module, part)
            yield layer, module
    norm = getattr(decoder, "final_layernorm", None)
    if norm is not None:
        yield "decoder.final_layernorm", norm


def _forward_order(name: str) -> tuple[int, int, int]:
    if name == "embedding":
        return (0, 0, 0)
    if name == "decoder.final_layernorm":
        return (2, 0, 0)
    _, _, number, *part = name.split(".")
    return (1, int(number), _PARTS.index(part[0]) if part else len(_PARTS))
