"""What the wrapped functions of a traced step write down: marks of time and sizes, unresolved."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from mcore_lab.report.rank_trace import NOT_KNOWN, Call, Group, Slice, Step
from mcore_lab.training.tracing.clock import Clock, Mark

_NOT_MADE = (NOT_KNOWN, NOT_KNOWN)
_AT_ONCE = 50.0
"""Microseconds from a call to the wait for it within which a rank computes nothing."""


@dataclass(slots=True)
class OpenCall:
    """A call whose end may be waited for later: a `Call` with marks in the place of times."""

    step: int
    op: str
    group: int
    size: int
    sent: int
    begin: Mark = None
    end: Mark = None
    wait_begin: Mark = None
    wait_end: Mark = None
    peer: int = NOT_KNOWN
    role: str = ""
    made: tuple[int, int] = _NOT_MADE
    """The model chunk and the micro-batch."""
    is_next: bool = False
    """Whether no other call or wait came between this one and the wait for its end."""


class EventLog:
    """Holds what is recorded in memory, until the traced steps are over."""

    def __init__(self, clock: Clock, sizes: dict[str, int]) -> None:
        self.now = clock.now
        self.step = 0
        self.slices: list[tuple[str, int, int, int, Mark, Mark]] = []
        self.calls: list[OpenCall] = []
        self._waiting: dict[int, OpenCall] = {}
        """Calls whose end has not been waited for, by the id of what there is to wait for."""
        self._last: OpenCall | None = None
        self._clock, self._sizes = clock, sizes
        self._groups: list[tuple[Any, Group]] = []
        self._steps: list[tuple[int, Mark, Mark]] = []
        self._made: dict[int, tuple[int, int]] = {}
        self._between_stages = False
        self._roles: dict[int, str] = {}
        self._expected: deque[str] = deque()

    # Steps and passes.

    def begin_step(self, step: int) -> None:
        """Begin a step: what is recorded from now on is of it."""
        self.step = step
        self._made.clear()
        self._begun = self.now()

    def end_step(self) -> None:
        """End the step that has begun."""
        self._steps.append((self.step, self._begun, self.now()))

    def computed(self, kind: str, begin: Mark, made: tuple[int, int] = (0, NOT_KNOWN)) -> None:
        """Write down what has been computed from `begin` until now, for a chunk and micro-batch."""
        self.slices.append((kind, self.step, *made, begin, self.now()))

    def is_of(self, tensors: Any, made: tuple[int, int]) -> None:
        """Remember of which chunk and micro-batch a pass's result is, be it one tensor or a list.

        By identity: a schedule keeps the object that a forward pass returned for its backward pass,
        and sends on the very tensors that a pass has made.
        """
        self._made[id(tensors)] = made
        for tensor in tensors if isinstance(tensors, list) else ():
            self._made[id(tensor)] = made

    def made_in(self, tensors: Any) -> tuple[int, int]:
        """Return the chunk and micro-batch of what `is_of` was told of."""
        return self._made.get(id(tensors), _NOT_MADE)

    # Process groups.

    def group(self, group: Any) -> tuple[int, Group]:
        """Return a process group's number and what it is."""
        for number, (known, described) in enumerate(self._groups):
            if known is group:
                return number, described
        kind = kind_of(group.group_desc, self._sizes)
        described = Group(kind, dist.get_process_group_ranks(group), group.group_name)
        self._groups.append((group, described))
        return len(self._groups) - 1, described

    def end_call(self, call: OpenCall, work: Any) -> None:
        """Write down a call that has returned, and what there is to wait for."""
        call.end = self.now()
        self.calls.append(call)
        self._last = call
        if work is not None:
            self._waiting[id(work)] = call

    def begin_wait(self, work: Any) -> OpenCall | None:
        """Return the call whose end is waited for from now on, if it is one that was recorded."""
        if call := self._waiting.pop(id(work), None):
            call.is_next = self._last is call
            self._last = None
            call.wait_begin = self.now()
        return call

    def call(self, op: str, group: int, size: int, sent: int) -> OpenCall:
        """Return a call of the step that runs, to be filled in."""
        return OpenCall(self.step, op, group, size, sent)

    @contextmanager
    def messages(self, *, sends: dict[str, Any], receives: list[str]) -> Iterator[None]:
        """Take what is sent and received meanwhile for messages between stages, by their roles.

        `sends` are the tensors of each role; `receives` are in the order in which they are asked
        for. What else comes is the shape of a message.
        """
        self._between_stages = True
        self._roles = {id(tensor): role for role, tensor in sends.items() if tensor is not None}
        self._expected = deque(receives)
        before = len(self.calls)
        try:
            yield
            self._end_with_the_batch(before)
        finally:
            self._between_stages = False

    @contextmanager
    def shapes(self) -> Iterator[None]:
        """Take what is sent and received meanwhile for the shapes of the messages that follow."""
        roles, expected = self._roles, self._expected
        self._roles, self._expected = {}, deque()
        try:
            yield
        finally:
            self._roles, self._expected = roles, expected

    def role_of(self, op: str, tensor: torch.Tensor) -> str:
        """Return what a tensor that is sent or received is for; empty if not between stages."""
        if not self._between_stages:
            return ""
        if op == "send":
            return self._roles.get(id(tensor), "shape")
        return self._expected.popleft() if self._expected else "shape"

    def _end_with_the_batch(self, first: int) -> None:
        """Give messages that NCCL sends as one, with one end to wait for, this end."""
        waits = [call for call in self.calls[first:] if call.wait_end is not None]
        for call in self.calls[first:]:
            if call.wait_end is None and waits:
                call.wait_begin, call.wait_end = waits[-1].wait_begin, waits[-1].wait_end

    # What has been recorded.

    @property
    def steps(self) -> list[Step]:
        """Return the steps, with times in microseconds."""
        at = self._clock.microseconds
        return [Step(step, at(begin), at(end)) for step, begin, end in self._steps]

    @property
    def resolved_slices(self) -> list[Slice]:
        """Return what was computed, with times in microseconds."""
        at = self._clock.microseconds
        return [
            Slice(kind, step, chunk, microbatch, at(begin), at(end))
            for kind, step, chunk, microbatch, begin, end in self.slices
        ]

    @property
    def resolved_calls(self) -> list[Call]:
        """Return the calls of process groups, with times in microseconds."""
        return list(map(self._resolved, self.calls))

    @property
    def groups(self) -> list[Group]:
        """Return the process groups that were called, by their numbers."""
        return [described for _, described in self._groups]

    def _resolved(self, call: OpenCall) -> Call:
        begin, end, *wait = map(self._at, (call.begin, call.end, call.wait_begin, call.wait_end))
        if call.is_next and wait[0] - end < _AT_ONCE:
            end, wait = wait[1], [float(NOT_KNOWN)] * 2
        return Call(
            step=call.step,
            op=call.op,
            group=call.group,
            size=call.size,
            sent=call.sent,
            begin=begin,
            end=end,
            wait_begin=wait[0],
            wait_end=wait[1],
            peer=call.peer,
            role=call.role,
            chunk=call.made[0],
            microbatch=call.made[1],
        )

    def _at(self, mark: Mark) -> float:
        return float(NOT_KNOWN) if mark is None else self._clock.microseconds(mark)


_KINDS = {
    "TENSOR_MODEL_PARALLEL_GROUP": "tp",
    "PIPELINE_MODEL_PARALLEL_GROUP": "pp",
    "CONTEXT_PARALLEL_GROUP": "cp",
    "DATA_PARALLEL_GROUP": "dp",
    "DATA_PARALLEL_GROUP_WITH_CP": "dp-cp",
    "MODEL_PARALLEL_GROUP": "tp-pp",
    "TENSOR_AND_DATA_PARALLEL_GROUP": "tp-dp",
    "TENSOR_AND_DATA_PARALLEL_GROUP_WITH_CP": "tp-dp-cp",
    "TENSOR_AND_CONTEXT_PARALLEL_GROUP": "tp-cp",
    "EXPERT_MODEL_PARALLEL_GROUP": "ep",
    "EXPERT_TENSOR_PARALLEL_GROUP": "etp",
    "EXPERT_TENSOR_AND_MODEL_PARALLEL_GROUP": "etp-ep",
    "EXPERT_TENSOR_MODEL_PIPELINE_PARALLEL_GROUP": "etp-ep-pp",
    "EXPERT_DATA_PARALLEL_GROUP": "edp",
    "EMBEDDING_GROUP": "embedding",
    "POSITION_EMBEDDING_GROUP": "position-embedding",
    "INTRA_DISTRIBUTED_OPTIMIZER_INSTANCE_GROUP": "optimizer",
    "default_pg": "world",
}
"""What Megatron-Core's `parallel_state` calls its groups, in the words of `layout.groups`."""


def kind_of(description: str, sizes: dict[str, int]) -> str:
    """Return which dimensions a group spans, by what it was described as when it was made.

    Dimensions of one rank are left out: without context parallelism `dp-cp` is `dp`.
    """
    name = description.removesuffix("_GLOO").removesuffix("_AG")
    kind = _KINDS.get(name, name.lower().removesuffix("_group").replace("_", "-"))
    axes = kind.split("-")
    if not all(axis in sizes for axis in axes):
        return kind
    return "-".join(axis for axis in axes if sizes[axis] > 1) or kind
