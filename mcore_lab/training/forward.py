"""The forward step and the loss that Megatron-Core's schedules call."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper
from megatron.core.transformer.transformer_config import TransformerConfig

from mcore_lab.data.sequences import Batch

LossOutput = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]
ForwardStep = Callable[
    [Iterator[Batch], torch.nn.Module],
    tuple[torch.Tensor, Callable[[torch.Tensor], LossOutput]],
]
"""What `get_forward_backward_func` calls for each micro-batch: see `forward_step`."""

Reports = list[dict[str, torch.Tensor]]
"""What `get_forward_backward_func` returns: the report of each micro-batch, on the last stage."""


def forward_step(
    data_iterator: Iterator[Batch], model: torch.nn.Module
) -> tuple[torch.Tensor, Callable[[torch.Tensor], LossOutput]]:
    """Take one micro-batch through this rank's chunk of the model.

    Returns the chunk's output, `[b, s]` losses on the last pipeline stage and `[s, b, h]`
    activations before it, and the loss function that the last stage calls with it.
    """
    batch = next(data_iterator)
    output = model(
        batch["tokens"],
        batch["position_ids"],
        None,
        labels=batch["labels"],
        # For multi-token prediction, whose loss the model takes care of itself.
        loss_mask=batch["loss_mask"],
        packed_seq_params=packed_seq_params(batch),
    )
    return output, partial(token_loss, batch["loss_mask"])


def packed_seq_params(batch: Batch) -> PackedSeqParams | None:
    """Return Megatron-Core's description of the documents packed in a batch; None if none are."""
    if "cu_seqlens" not in batch:
        return None
    ends, stored_ends = batch["cu_seqlens"], batch["cu_seqlens_padded"]
    longest = int(stored_ends.diff().max())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=stored_ends,
        cu_seqlens_kv_padded=stored_ends,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )


def token_loss(loss_mask: torch.Tensor, losses: torch.Tensor) -> LossOutput:
    """Return the sum of the losses `[b, s]` that the mask keeps, their number, and both to report.

    Three values, not two: Megatron-Core then divides by the tokens of the whole global batch; a
    loss returned with a report alone is scaled by the context-parallel size. The report has storage
    of its own: the schedules divide the loss in place.
    """
    mask = loss_mask.float()
    loss_sum = (losses.float() * mask).sum()
    num_tokens = mask.sum()
    report = torch.stack([loss_sum.detach(), num_tokens])
    return loss_sum, num_tokens.to(torch.int), {"lm loss": report}


def loss_and_tokens(reports: Reports) -> torch.Tensor:
    """Return this rank's part, `[2]`, of a batch's summed loss in nats and of its tokens.

    Only the last pipeline stage has any, and its tensor-parallel ranks have the same.
    """
    if reports and parallel_state.get_tensor_model_parallel_rank() == 0:
        return torch.stack([report["lm loss"] for report in reports]).sum(dim=0)
    return torch.zeros(2, device=torch.cuda.current_device())


def mean_loss(reports: Reports) -> float:
    """Return the mean loss a token, in nats, of one batch's reports; the same on every rank."""
    total = loss_and_tokens(reports)
    dist.all_reduce(total)
    return (total[0] / total[1].clamp(min=1)).item()


def mean_mtp_loss(config: TransformerConfig, num_microbatches: int) -> float | None:
    """Return the mean loss of one step's multi-token prediction, in nats; None without it.

    As Megatron-Core measures it: of its layers, and of the means of all micro-batches. The same on
    every rank.
    """
    if not config.mtp_num_layers:
        return None
    losses: dict[str, torch.Tensor] = {}
    MTPLossLoggingHelper.track_mtp_metrics(1 / num_microbatches, 0, None, total_loss_dict=losses)
    mean = torch.zeros((), device=torch.cuda.current_device())
    if losses:
        mean = torch.stack(list(losses.values())).mean()
    # Only the last pipeline stage has any.
    dist.all_reduce(mean, op=dist.ReduceOp.MAX)
    return mean.item()
