"""The random stream of a CUDA device, on CPU.

Megatron-Core keeps two kinds of randomness apart: what is drawn on the CPU (weights under
`use_cpu_initialization`, the same on every tensor-parallel rank) and what is drawn on the device
(dropout, weights initialised on the GPU), whose state `CudaRNGStatesTracker` swaps in and out.
Without a GPU all tensors live on the CPU, so the device's stream is a state of its own that takes
the place of the default generator's while the device draws.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.utils.checkpoint

from mcore_lab.cpu.replace import replace


class DeviceRandomStream:
    """A random state apart from the CPU's: what `torch.cuda.default_generators[i]` is on a GPU."""

    def __init__(self) -> None:
        # A generator and not its state: `graphsafe_get_state` hands it out, and shares it.
        self._generator = torch.Generator()
        self._cpu_state = self._generator.get_state()
        self._drawing = 0

    def get_state(self) -> torch.Tensor:
        """Return a copy of the state (`torch.cuda.get_rng_state`)."""
        return self._where_it_is().get_state()

    def set_state(self, state: torch.Tensor) -> DeviceRandomStream:
        """Set the state (`torch.cuda.set_rng_state`)."""
        self._where_it_is().set_state(state)
        return self

    def clone_state(self) -> torch.Generator:
        """Return a generator of its own in this state (`torch.Generator.clone_state`)."""
        return torch.Generator().set_state(self.get_state())

    def graphsafe_get_state(self) -> torch.Generator:
        """Return the generator that keeps the state, and goes on to until another one is set."""
        if self._drawing:
            self._generator.set_state(torch.default_generator.get_state())
        return self._generator

    def graphsafe_set_state(self, generator: torch.Generator) -> DeviceRandomStream:
        """Let `generator` keep the state from now on; the one before keeps what it has."""
        self.graphsafe_get_state()
        self._generator = generator
        if self._drawing:
            torch.default_generator.set_state(generator.get_state())
        return self

    def manual_seed(self, seed: int) -> DeviceRandomStream:
        """Seed this stream and no other."""
        return self.set_state(torch.Generator().manual_seed(seed).get_state())

    def seed(self) -> int:
        """Seed this stream from the operating system's randomness."""
        generator = torch.Generator()
        value = generator.seed()
        self.set_state(generator.get_state())
        return value

    def initial_seed(self) -> int:
        """Return the seed that the state started from."""
        generator = torch.Generator()
        generator.set_state(self.get_state())
        return generator.initial_seed()

    def get_cpu_state(self) -> torch.Tensor:
        """Return the CPU's own state, while the device draws too (`torch.get_rng_state`)."""
        return self._cpu_state.clone() if self._drawing else torch.default_generator.get_state()

    def set_cpu_state(self, state: torch.Tensor) -> None:
        """Set the CPU's own state, while the device draws too (`torch.set_rng_state`)."""
        if self._drawing:
            self._cpu_state = state.clone()
        else:
            torch.default_generator.set_state(state)

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from this stream in the body; the CPU's own stream is as before afterwards."""
        if self._drawing:
            self._drawing += 1
            try:
                yield
            finally:
                self._drawing -= 1
            return
        self._cpu_state = torch.default_generator.get_state()
        torch.default_generator.set_state(self._generator.get_state())
        self._drawing = 1
        try:
            yield
        finally:
            self._drawing = 0
            self._generator.set_state(torch.default_generator.get_state())
            torch.default_generator.set_state(self._cpu_state)

    def _where_it_is(self) -> torch.Generator:
        return torch.default_generator if self._drawing else self._generator


STREAM = DeviceRandomStream()
"""The one device of this process: each rank is a process with one device."""


def keep_cpu_state_apart() -> None:
    """Let `torch.get_rng_state` and `set_rng_state` mean the CPU's stream at all times."""
    for module in (torch, torch.random):
        replace(module, "get_rng_state", STREAM.get_cpu_state)
        replace(module, "set_rng_state", STREAM.set_cpu_state)


def restore_device_state_in_recomputation() -> None:
    """`torch.utils.checkpoint` keeps the random state of the devices that its arguments are on."""
    checkpoint = torch.utils.checkpoint

    def get_device_states(*args: object) -> tuple[list[int], list[torch.Tensor]]:
        return [0], [STREAM.get_state()]

    checkpoint.DefaultDeviceType.set_device_type("cuda")
    replace(checkpoint, "get_device_states", get_device_states)
