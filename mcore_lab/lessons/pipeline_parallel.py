"""Pipeline parallelism: a deep MLP cut between its layers, and micro-batches that run through it.

Why: a model too deep for one rank is cut into stages. A stage gets activations from the stage
before and sends its own on; on the way back gradients go the other way. A whole batch would keep
one stage busy at a time, so it is cut into m micro-batches that follow each other. While p stages
fill and drain each of them is idle for (p - 1) / (m + p - 1) of the time: the bubble.

Two schedules are written out. All forward, all backward (GPipe) holds the activations of all m. One
forward, one backward (1F1B) turns round as early as it can, and holds those of p - stage, whatever
m is. The bubble is the same: memory is the point of 1F1B.

What to look at: the empty slots of the timelines, drawn from what each stage ran; how many
micro-batches a stage held at most; and that gradients are those of the whole batch on one rank. The
clock's idle time comes near the bubble where layers are large (`--hidden-size 1536
--micro-batch-size 128`) and each stage has a core or a GPU of its own.
Source: Huang et al., arXiv:1811.06965 (GPipe); Narayanan et al., arXiv:2104.04473 (1F1B, which it
calls PipeDream-Flush).
"""

from __future__ import annotations

import itertools
from collections import deque
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from mcore_lab.lessons import ranks
from mcore_lab.lessons.data_parallel import deep_mlp
from mcore_lab.lessons.pipeline_timeline import StageRecord, drawn, idle_share, in_slots, now
from mcore_lab.lessons.start import main
from mcore_lab.runtime import World
from mcore_lab.runtime.memory import TensorMemory


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What the lesson can be given."""

    num_layers: int = 8
    """Linear layers, a nonlinearity after each; stages have as many each."""
    hidden_size: int = 512
    """Width of every layer."""
    num_microbatches: int = 8
    """m, the parts that the batch is cut into."""
    micro_batch_size: int = 64
    """Samples of each part."""
    seed: int = 42
    """Decides weights and data."""


class Stage:
    """One rank's layers, and the micro-batches that are between their two passes."""

    def __init__(self, layers: nn.Module, inputs: Tensor, targets: Tensor, ways: list[Any]) -> None:
        """Take every micro-batch's data `[m, b, h]`; the first and the last stage look at it."""
        self.layers, self.inputs, self.targets = layers, inputs, targets
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        # A group each way: NCCL serves two ranks' messages in one group in turn, and two stages
        # that both send before they receive would wait for ever.
        self.activations, self.gradients = ways
        self.held: deque[tuple[Tensor, Tensor, dist.Work | None]] = deque()
        self.losses: list[float] = []
        self.record = StageRecord()
        self._forwards, self._backwards = itertools.count(), itertools.count()
        self._leaving: tuple[Any, Tensor] | None = None

    def forward(self) -> None:
        """Take the next micro-batch `[b, h]` through the layers, send it on, and hold it."""
        number = next(self._forwards)
        arrived = self.inputs[number]
        if self.rank > 0:
            arrived = torch.empty_like(arrived)
            dist.recv(arrived, self.rank - 1, self.activations)
            arrived.requires_grad_()  # The backward pass ends here, and leaves what is sent back.
        with self.record.runs(f"F{number}", arrived.device):
            output = self.layers(arrived)
            if self.rank == self.size - 1:
                # The mean of m means: micro-batches are of one size.
                output = F.mse_loss(output, self.targets[number]) / len(self.targets)
                self.losses.append(output.item())
        sending = None
        if self.rank < self.size - 1:
            # Not waited for: the next stage may be sending as well.
            sending = dist.isend(output.detach(), self.rank + 1, self.activations)
        self.held.append((arrived, output, sending))
        self.record.most_held = max(self.record.most_held, len(self.held))

    def backward(self) -> None:
        """Take the oldest micro-batch back, add to the weights' gradients, send its own on."""
        arrived, output, sending = self.held.popleft()
        grad_output = None
        if sending is not None:
            grad_output = torch.empty_like(output)
            dist.recv(grad_output, self.rank + 1, self.gradients)
            sending.wait()  # It has been received, since its gradient is back.
        with self.record.runs(f"B{next(self._backwards)}", output.device):
            output.backward(grad_output)
        if self.rank > 0:
            self.finish()
            assert arrived.grad is not None
            self._leaving = dist.isend(arrived.grad, self.rank - 1, self.gradients), arrived.grad

    def finish(self) -> None:
        """Wait until the gradient that was sent last has left: its memory is in use until then."""
        if self._leaving:
            self._leaving[0].wait()
            self._leaving = None


def all_forward_all_backward(stage: Stage, num_microbatches: int) -> None:
    """GPipe: the whole batch forward, then all of it back."""
    for _ in range(num_microbatches):
        stage.forward()
    for _ in range(num_microbatches):
        stage.backward()


def one_forward_one_backward(stage: Stage, num_microbatches: int) -> None:
    """1F1B: fill the stages that follow; then one back for each one that comes; then drain."""
    filling = min(stage.size - stage.rank - 1, num_microbatches)
    for _ in range(filling):
        stage.forward()
    for _ in range(num_microbatches - filling):
        stage.forward()
        stage.backward()
    for _ in range(filling):
        stage.backward()


SCHEDULES = {"GPipe": all_forward_all_backward, "1F1B": one_forward_one_backward}


def run_batch(stage: Stage, schedule: str) -> dict[str, Any]:
    """Take the batch through the pipeline; return what this rank's stage did."""
    dist.barrier()
    started = now(stage.inputs.device)
    with TensorMemory() as memory:
        SCHEDULES[schedule](stage, len(stage.inputs))
        stage.finish()
    dist.barrier()
    seconds = now(stage.inputs.device) - started
    return {
        "stage": stage.rank,
        "micro-batches held": stage.record.most_held,
        "peak MiB": memory.peak / 2**20,
        "idle time": 1 - stage.record.busy_seconds / seconds,
        "passes": stage.record.passes,
    }


def lesson(settings: Settings, world: World) -> dict[str, Any]:
    """Run the batch with both schedules, and hold them to the whole MLP on each rank."""
    m, p, layers = settings.num_microbatches, world.size, settings.num_layers
    ranks.require_shared(settings, "num_layers", p, f"{p} stages")
    draw = torch.Generator().manual_seed(settings.seed + 1)
    shape = 2, m, settings.micro_batch_size, settings.hidden_size
    inputs, targets = torch.randn(shape, generator=draw).to(world.device.type)
    whole, same = (deep_mlp(layers, settings.hidden_size, settings.seed) for _ in range(2))
    F.mse_loss(whole.to(inputs.device)(inputs), targets).backward()
    # Each layer is two modules: a linear one, and a nonlinearity.
    mine = slice(2 * world.rank * layers // p, 2 * (world.rank + 1) * layers // p)
    part = same[mine].to(inputs.device)
    ways = [dist.new_group(), dist.new_group()]

    found: dict[str, Any] = {"expected_bubble": (p - 1) / (m + p - 1)}
    for schedule in SCHEDULES:
        for _ in range(2):  # The first time connections and gradients are made: the second counts.
            part.zero_grad(set_to_none=False)
            row = run_batch(Stage(part, inputs, targets, ways), schedule)
        grads = [[weight.grad for weight in of.parameters()] for of in (part, whole[mine])]
        rows = ranks.rows_of_all(row | {"gradients off by": ranks.largest_difference(*grads)})
        slots = in_slots([row.pop("passes") for row in rows])
        found[schedule] = {"bubble": idle_share(slots), "slots": slots, "stages": rows}
        if world.is_first:
            print(f"{schedule}: {idle_share(slots):.1%} of the slots are empty.", end=" ")
            print(f"(p - 1) / (m + p - 1) is {found['expected_bubble']:.1%}.\n\n{drawn(slots)}\n")
            ranks.print_rows(rows)
            print()
    return found


if __name__ == "__main__":
    main(Settings, lesson)
