"""A run's recorder that traces some of its steps as well: `--trace`."""

from __future__ import annotations

import os
import platform
from contextlib import ExitStack
from typing import Any

import torch
from megatron.core import package_info

from mcore_lab.backends import Backend
from mcore_lab.config import Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.report.rank_trace import RankTrace
from mcore_lab.report.trace_files import trace_files
from mcore_lab.runtime import World
from mcore_lab.runtime.memory import TensorMemory
from mcore_lab.runtime.together import fail_together
from mcore_lab.training.recorder import Recorder
from mcore_lab.training.rules import TRACE_WARM_UP, require_traceable
from mcore_lab.training.tracing.clock import Clock
from mcore_lab.training.tracing.event_log import EventLog
from mcore_lab.training.tracing.hooks import Hooks
from mcore_lab.training.tracing.memory import held_bytes


class TracingRecorder(Recorder):
    """Records the run, and of a few steps what each rank computes and communicates, and when.

    The run's first step is not looked at, in the second the memory of activations is counted, which
    takes time, and the `trace_steps` after it are traced. What they were is then written to the
    folder's `trace/`, and the run goes on as one that is not traced.
    """

    def __init__(self, *args: Any, trace_steps: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._trace_steps = trace_steps
        self._open = ExitStack()

    def begin(self, recipe: Recipe, world: World, backend: Backend, first_step: int) -> None:
        """Make the run folder, and decide which steps are traced."""
        require_traceable(recipe.training.steps, first_step)
        super().begin(recipe, world, backend, first_step)
        self._backend = backend
        first, last = first_step + TRACE_WARM_UP + 1, recipe.training.steps
        self._traced = self._steps_to_trace(first, last)

    def _steps_to_trace(self, first: int, last: int) -> range:
        """Return which of the steps after warm-up are traced."""
        return range(first, min(first + self._trace_steps, last + 1))

    def look_at_start(self, model: Any, optimizer: Any, scheduler: Any) -> None:
        """Keep what there is to trace."""
        super().look_at_start(model, optimizer, scheduler)
        self._model, self._optimizer = model, optimizer

    def begin_step(self, step: int) -> None:
        """Trace the step, or count its memory, if it is one of those."""
        super().begin_step(step)
        if step == self._traced[0] - 1:
            self._clock = Clock(self._world)
            self._events = EventLog(self._clock, _sizes(self._recipe.layout, self._world.size))
            self._hooks = Hooks(self._events, self._optimizer)
            self._memory = self._open.enter_context(TensorMemory())
        if step in self._traced:
            self._open.enter_context(self._hooks.recording())
            self._events.begin_step(step)

    def look_at_gradients(self, step: int, model: Any, reports: Any) -> None:
        """Stop counting memory: what comes now is the optimizer's."""
        if step == self._traced[0] - 1:
            self._open.close()

    def step(self, step: int, *numbers: Any, **more: Any) -> None:
        """Record the step, and write what was traced if it was the last of it."""
        if step in self._traced:
            self._events.end_step()
            self._open.close()
        super().step(step, *numbers, **more)
        if step == self._traced[-1]:
            self._write()

    def close(self) -> None:
        """Leave nothing wrapped, however the run has ended."""
        self._open.close()
        super().close()

    def _write(self) -> None:
        """Write each rank's trace, and then, on the first, the pictures of all of them."""
        first = self._world.is_first
        trace = self._trace()
        with fail_together():
            if first:
                self.folder.remove_trace()
        with fail_together():
            self.folder.write_trace(f"rank-{trace.rank}.json", trace.to_json())
        with fail_together():
            if first:
                traces = self.folder.traces()
                for name, text in trace_files(self._recipe.title, traces).items():
                    self.folder.write_trace(name, text)
        first_step, last_step = self._traced[0], self._traced[-1]
        several = f"steps {first_step} to {last_step}"
        steps = several if first_step < last_step else f"step {last_step}"
        self._console.say(
            f"trace of {steps} in {self.folder.trace}; mcore-lab report {self.folder.path} shows it"
        )

    def _trace(self) -> RankTrace:
        if self._world.device.type == "cuda":
            torch.cuda.synchronize()
        recipe, world, events = self._recipe, self._world, self._events
        layout, data = recipe.layout, recipe.data
        replicas = layout.data_parallel_size(world.size)
        memory = held_bytes(self._model, self._optimizer) | {"activations": self._memory.peak}
        return RankTrace(
            rank=world.rank,
            world_size=world.size,
            coordinates=vars(layout.coordinates(world.rank, world.size)),
            sizes=_sizes(layout, world.size),
            microbatches=data.global_batch_size // (data.micro_batch_size * replicas),
            device=world.device.type,
            backend=self._backend.name,
            machine=platform.node(),
            cores=len(os.sched_getaffinity(0)),
            ranks_here=world.local_size,
            megatron_core=package_info.__version__,
            torch=torch.__version__,
            clock=self._clock.words,
            steps=events.steps,
            slices=events.resolved_slices,
            groups=events.groups,
            calls=events.resolved_calls,
            memory=memory,
        )


def _sizes(layout: ParallelLayout, world_size: int) -> dict[str, int]:
    """Return the size of each dimension."""
    sizes = {name: getattr(layout, name) for name in ("tp", "cp", "pp", "vpp", "ep", "etp")}
    sizes["dp"] = layout.data_parallel_size(world_size)
    sizes["edp"] = layout.expert_data_parallel_size(world_size)
    return sizes
