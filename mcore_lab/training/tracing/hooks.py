"""The one place where names of Megatron-Core and torch are wrapped while a step is traced.

- `schedules.forward_step` and `backward_step`, which every schedule calls for each micro-batch and
  model chunk: when, and of which micro-batch.
- `P2PCommunicator._communicate`, through which all that goes from stage to stage comes: what a
  message is for.
- the methods of `ProcessGroup`, to which each collective of `torch.distributed` comes down, by
  whatever name it was called: how many bytes, in which group, when.
- `Work.wait`: when a rank waits for what it has begun.
- the optimizer's `step`.

What does not come through these is not seen: kernels that communicate themselves, such as
Transformer Engine's user buffers or DeepEP's dispatch, and passes that Megatron-Core combines
(`overlap_moe_expert_parallel_comm`).
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.pipeline_parallel import schedules
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from torch.distributed import ProcessGroup, Work

from mcore_lab.report.rank_trace import NOT_KNOWN
from mcore_lab.training.tracing.event_log import EventLog, OpenCall

_NOTHING = object()

Wrap = Callable[[Any], Callable[..., Any]]


class Hooks:
    """The wrapped functions of this rank: made once, and in place only while it records."""

    def __init__(self, log: EventLog, optimizer: Any) -> None:
        self._wrapped: list[tuple[Any, str, Callable[..., Any]]] = []
        self._wrap(schedules, "forward_step", functools.partial(_forward, log))
        self._wrap(schedules, "backward_step", functools.partial(_backward, log))
        self._wrap(P2PCommunicator, "_communicate", functools.partial(_communicate, log))
        self._wrap(P2PCommunicator, "_communicate_shapes", functools.partial(_shapes, log))
        self._wrap(optimizer, "step", functools.partial(_optimizer_step, log))
        for name, (op, size, sent) in _OPERATIONS.items():
            # Names differ from one torch to another.
            if hasattr(ProcessGroup, name):
                wrap = functools.partial(_collective, log, op, size, sent)
                self._wrap(ProcessGroup, name, wrap)
        self._wrap(ProcessGroup, "send", functools.partial(_message, log, "send"))
        self._wrap(ProcessGroup, "recv", functools.partial(_message, log, "receive"))
        self._wrap(Work, "wait", functools.partial(_wait, log))

    def _wrap(self, owner: Any, name: str, wrap: Wrap) -> None:
        original = getattr(owner, name)
        self._wrapped.append((owner, name, functools.wraps(original)(wrap(original))))

    @contextmanager
    def recording(self) -> Iterator[None]:
        """Write down what this rank computes and communicates as long as the body runs."""
        before = [
            (owner, name, vars(owner).get(name, _NOTHING)) for owner, name, _ in self._wrapped
        ]
        try:
            for owner, name, wrapped in self._wrapped:
                setattr(owner, name, wrapped)
            yield
        finally:
            for owner, name, own in before:
                if own is _NOTHING:
                    delattr(owner, name)
                else:
                    setattr(owner, name, own)


def _forward(log: EventLog, forward_step: Any) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        number = kwargs.get("current_microbatch")
        made = (kwargs.get("vp_stage") or 0, NOT_KNOWN if number is None else number)
        begin = log.now()
        result = forward_step(*args, **kwargs)
        log.computed("forward", begin, made)
        log.is_of(result[0], made)
        return result

    return recorded


def _backward(log: EventLog, backward_step: Any) -> Callable[..., Any]:
    def recorded(input_tensor: Any, output_tensor: Any, *rest: Any) -> Any:
        made = log.made_in(output_tensor)
        begin = log.now()
        gradients = backward_step(input_tensor, output_tensor, *rest)
        log.computed("backward", begin, made)
        log.is_of(gradients, made)
        return gradients

    return recorded


def _optimizer_step(log: EventLog, step: Any) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        begin = log.now()
        result = step(*args, **kwargs)
        log.computed("optimizer", begin)
        return result

    return recorded


def _communicate(log: EventLog, communicate: Any) -> Callable[..., Any]:
    def recorded(communicator: Any, **what: Any) -> Any:
        sends = {"forward": what["tensor_send_next"], "backward": what["tensor_send_prev"]}
        # The previous stage is asked first, also where it is the same rank as the next.
        receives = ["forward"] * what["recv_prev"] + ["backward"] * what["recv_next"]
        with log.messages(sends=sends, receives=receives):
            return communicate(communicator, **what)

    return recorded


def _shapes(log: EventLog, communicate_shapes: Any) -> Callable[..., Any]:
    def recorded(*args: Any, **kwargs: Any) -> Any:
        with log.shapes():
            return communicate_shapes(*args, **kwargs)

    return recorded


def _wait(log: EventLog, wait: Any) -> Callable[..., Any]:
    def recorded(work: Any, *args: Any, **kwargs: Any) -> Any:
        call = log.begin_wait(work)
        if call is None:
            return wait(work, *args, **kwargs)
        try:
            return wait(work, *args, **kwargs)
        finally:
            call.wait_end = log.now()

    return recorded


def _message(log: EventLog, op: str, method: Any) -> Callable[..., Any]:
    def recorded(
        group: ProcessGroup, tensors: Sequence[torch.Tensor], peer: int, *rest: Any
    ) -> Any:
        number, described = log.group(group)
        size = _bytes(tensors)
        call = log.call(op, number, size, size if op == "send" else 0)
        call.peer = described.ranks[peer]
        call.role = log.role_of(op, tensors[0])
        if op == "send":  # Of what comes, only who sends it knows.
            call.made = log.made_in(tensors[0])
        return _called(log, call, method, group, tensors, peer, *rest)

    return recorded


def _collective(
    log: EventLog, op: str, size_of: _Size, sent_of: _Sent, method: Any
) -> Callable[..., Any]:
    def recorded(group: ProcessGroup, *args: Any, **kwargs: Any) -> Any:
        number, described = log.group(group)
        given = (*args, *kwargs.values())
        ranks = len(described.ranks)
        size = size_of(given, ranks)
        sent = sent_of(size, ranks, given, group) if ranks > 1 else 0
        return _called(log, log.call(op, number, size, sent), method, group, *args, **kwargs)

    return recorded


def _called(log: EventLog, call: OpenCall, method: Any, *args: Any, **kwargs: Any) -> Any:
    """Call the process group, and keep what there is to wait for."""
    call.begin = log.now()
    work = method(*args, **kwargs)
    log.end_call(call, work)
    return work


# How many bytes an operation is of, and how many of them a rank has to send.

_Size = Callable[[tuple[Any, ...], int], int]
_Sent = Callable[[int, int, tuple[Any, ...], ProcessGroup], int]


def _bytes(tensors: Any) -> int:
    """Return the bytes of a tensor, or of all in a list of them, or of lists of them."""
    if isinstance(tensors, torch.Tensor):
        # On CPU the facade looks at every function of a tensor; this one is none of its business.
        with torch._C.DisableTorchFunction():
            return tensors.nbytes
    return sum(map(_bytes, tensors))


def _of_first(given: tuple[Any, ...], ranks: int) -> int:
    return _bytes(given[0])


def _of_second(given: tuple[Any, ...], ranks: int) -> int:
    return _bytes(given[1])


def _of_each_rank(given: tuple[Any, ...], ranks: int) -> int:
    """A gather: of this rank's part, as only one rank has the whole."""
    return _bytes(given[1]) * ranks


def _of_own_part(given: tuple[Any, ...], ranks: int) -> int:
    """A scatter, likewise."""
    return _bytes(given[0]) * ranks


def _none(given: tuple[Any, ...], ranks: int) -> int:
    return 0


def _all(size: int, ranks: int, given: tuple[Any, ...], group: ProcessGroup) -> int:
    return size


def _all_but_own(size: int, ranks: int, given: tuple[Any, ...], group: ProcessGroup) -> int:
    return size * (ranks - 1) // ranks


def _twice_all_but_own(size: int, ranks: int, given: tuple[Any, ...], group: ProcessGroup) -> int:
    """An all-reduce is a reduce-scatter and an all-gather."""
    return 2 * size * (ranks - 1) // ranks


def _all_but_own_rows(size: int, ranks: int, given: tuple[Any, ...], group: ProcessGroup) -> int:
    """An all-to-all of one tensor, of which every rank gets so many rows, or as many as others."""
    _, _, _, rows, *_ = given
    if not rows:
        return _all_but_own(size, ranks, given, group)
    return size - size * rows[group.rank()] // max(1, sum(rows))


def _all_but_own_tensor(size: int, ranks: int, given: tuple[Any, ...], group: ProcessGroup) -> int:
    return size - _bytes(given[1][group.rank()])


_OPERATIONS: dict[str, tuple[str, _Size, _Sent]] = {
    "allreduce": ("all-reduce", _of_first, _twice_all_but_own),
    "allreduce_coalesced": ("all-reduce", _of_first, _twice_all_but_own),
    "broadcast": ("broadcast", _of_first, _all),
    "reduce": ("reduce", _of_first, _all),
    "allgather": ("all-gather", _of_first, _all_but_own),
    "allgather_coalesced": ("all-gather", _of_first, _all_but_own),
    "_allgather_base": ("all-gather", _of_first, _all_but_own),
    "all_gather_single": ("all-gather", _of_first, _all_but_own),
    "allgather_into_tensor_coalesced": ("all-gather", _of_first, _all_but_own),
    "all_gather_single_coalesced": ("all-gather", _of_first, _all_but_own),
    "reduce_scatter": ("reduce-scatter", _of_second, _all_but_own),
    "_reduce_scatter_base": ("reduce-scatter", _of_second, _all_but_own),
    "reduce_scatter_single": ("reduce-scatter", _of_second, _all_but_own),
    "reduce_scatter_tensor_coalesced": ("reduce-scatter", _of_second, _all_but_own),
    "reduce_scatter_single_coalesced": ("reduce-scatter", _of_second, _all_but_own),
    "alltoall": ("all-to-all", _of_second, _all_but_own_tensor),
    "alltoall_base": ("all-to-all", _of_second, _all_but_own_rows),
    "all_to_all_single": ("all-to-all", _of_second, _all_but_own_rows),
    "gather": ("gather", _of_each_rank, _all_but_own),
    "scatter": ("scatter", _of_own_part, _all_but_own),
    "barrier": ("barrier", _none, _all),
}
"""Of each method of `ProcessGroup` that communicates. The size is by NCCL-tests' definition."""
