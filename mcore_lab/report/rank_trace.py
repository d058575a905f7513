"""What one rank has recorded of some steps, as `trace/rank-N.json` of a run folder holds it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

from mcore_lab.errors import RunFolderError

MEMORY_KINDS = ("weights", "gradients", "optimizer state", "activations")
"""What memory is counted by; of activations, the most that there was at a time."""

NOT_KNOWN = -1
"""Stands for a number that a call does not have, or that was not seen."""


class Step(NamedTuple):
    """An optimizer step, from its beginning to the end of the optimizer's part. Times in µs."""

    step: int
    begin: float
    end: float


class Slice(NamedTuple):
    """What a rank computed: the forward or the backward pass of a micro-batch, or a step of Adam.

    Times are in microseconds since the trace began, the same moment on every rank.
    """

    kind: str
    """`forward`, `backward` or `optimizer`."""
    step: int
    chunk: int
    """Which of the rank's model chunks; 0 without interleaving."""
    microbatch: int
    begin: float
    end: float


class Call(NamedTuple):
    """A call of a process group: a collective, or one end of a message. Times in microseconds."""

    step: int
    op: str
    group: int
    """Which of the trace's groups."""
    size: int
    """Bytes, by NCCL-tests' definition: of all ranks' parts together where they have parts."""
    sent: int
    """Bytes that this rank has to send to others, by the best algorithm that there is."""
    begin: float
    end: float
    """When the call returned; if its end was waited for at once, when the operation had ended."""
    wait_begin: float
    """When the rank began to wait for the end of the operation; NOT_KNOWN if not, or at once."""
    wait_end: float
    peer: int
    """Of a message, the rank at its other end."""
    role: str
    """Of a message between pipeline stages: `forward`, `backward`, or `shape` for the shape of the
    next; else empty."""
    chunk: int
    """Of a message that is sent on, the model chunk that made it, and the micro-batch."""
    microbatch: int


class Group(NamedTuple):
    """A process group."""

    kind: str
    """Which dimensions it spans: `tp`, `dp-cp`; `world` for all ranks."""
    ranks: list[int]
    name: str
    """The same on all of its ranks, and no other group's."""


@dataclass(frozen=True, kw_only=True)
class RankTrace:
    """Everything that one rank recorded."""

    rank: int
    world_size: int
    coordinates: dict[str, int]
    """Its place in each dimension: tp, cp, dp, pp, ep, etp, edp."""
    sizes: dict[str, int]
    """The size of each dimension, and `vpp`."""
    microbatches: int
    """Of a step."""
    device: str
    backend: str
    """What layers are built of: `torch` or `te`."""
    machine: str
    """Its name."""
    cores: int
    """Processor cores of the machine that its ranks may use."""
    ranks_here: int
    """Ranks of this machine."""
    megatron_core: str
    torch: str
    clock: str
    """How this rank's times compare with the others', in words."""
    steps: list[Step]
    slices: list[Slice]
    groups: list[Group]
    calls: list[Call]
    memory: dict[str, int]
    """Bytes of each of MEMORY_KINDS that was counted."""

    def to_json(self) -> str:
        """Return it as JSON: rows of numbers, with the names of their columns."""
        return json.dumps({"columns": _COLUMNS} | asdict(self), separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> RankTrace:
        """Return what `to_json` wrote. Raises RunFolderError if it is anything else."""
        try:
            fields: dict[str, Any] = json.loads(text)
            if fields.pop("columns") != _COLUMNS:
                raise ValueError("its columns are not those of this version")
            for name, row in _ROWS.items():
                fields[name] = [row(*values) for values in fields[name]]
            return cls(**fields)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise RunFolderError(f"not a rank's trace: {error}") from None

    def of_step(self, step: int) -> Iterator[tuple[int, Call]]:
        """Yield the calls of a step, each with its place among all."""
        return ((place, call) for place, call in enumerate(self.calls) if call.step == step)


_ROWS: dict[str, Any] = {"steps": Step, "slices": Slice, "groups": Group, "calls": Call}
_COLUMNS = {name: list(row._fields) for name, row in _ROWS.items()}
