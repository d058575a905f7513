"""Tensors that ask for a CUDA device get the CPU, with the device's random stream."""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mcore_lab.cpu.random_stream import STREAM

_CPU = torch.device("cpu")
_TAKES_DEVICE_FIRST = {torch.Tensor.to, torch.Tensor.type}
_DRAWS_ON_DEVICE = {
    torch.dropout,
    torch.nn.functional.dropout,
    torch.nn.functional.dropout1d,
    torch.nn.functional.dropout2d,
    torch.nn.functional.dropout3d,
    torch.nn.functional.alpha_dropout,
    torch.nn.functional.feature_alpha_dropout,
    torch.nn.functional.scaled_dot_product_attention,
}
_RANDOM_FACTORIES = {
    torch.rand,
    torch.rand_like,
    torch.randn,
    torch.randn_like,
    torch.randint,
    torch.randint_like,
    torch.randperm,
    torch.normal,
}


def is_cuda(device: object) -> bool:
    """Say whether `device`, in any of the forms that torch takes, means a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)


class CudaOnCpu(TorchFunctionMode):
    """Send every `device="cuda"` to the CPU; costs about 1.5 µs an operation.

    Modes are thread-local: `enable()` sees to it that new threads enter it too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        on_device = False
        if kwargs:
            if is_cuda(kwargs.get("device")):
                on_device = True
                kwargs["device"] = _CPU
            if kwargs.get("pin_memory"):
                kwargs["pin_memory"] = False
        if func in _TAKES_DEVICE_FIRST:
            args, kwargs = _without_cuda_argument(func, args, kwargs or {})
        elif func is torch.Tensor.cuda or func is torch.Tensor.pin_memory:
            return args[0]
        elif func in _DRAWS_ON_DEVICE or (on_device and func in _RANDOM_FACTORIES):
            with STREAM.drawing():
                return func(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _without_cuda_argument(
    func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """`x.to("cuda", …)`, `x.to(0, …)` and `x.type("torch.cuda.FloatTensor")` name the device by position."""
    if len(args) > 1:
        wanted = args[1]
        if func is torch.Tensor.to and is_cuda(wanted):
            args = (args[0], _CPU, *args[2:])
        elif func is torch.Tensor.type and isinstance(wanted, str):
            args = (args[0], wanted.replace("torch.cuda.", "torch."), *args[2:])
    return args, kwargs


def enter_mode_in_every_thread() -> None:
    """Enter the mode here and in every thread that starts from now on, and keep it."""
    mode = CudaOnCpu()
    mode.__enter__()
    # A mode that is still entered when the interpreter is torn down can crash it.
    atexit.register(mode.__exit__, None, None, None)
    start = threading.Thread.start

    @functools.wraps(start)
    def start_with_mode(self: threading.Thread) -> None:
        run = self.run

        def run_with_mode() -> None:
            with CudaOnCpu():
                run()

        self.run = run_with_mode  # type: ignore[method-assign]
        start(self)

    threading.Thread.start = start_with_mode  # type: ignore[method-assign]


def report_cuda_types() -> None:
    """Let `x.type()` say `torch.cuda.…Tensor`: Megatron-Core compares it with these names.

    The names of the types are aliases too: `isinstance(x, torch.cuda.FloatTensor)`.
    """
    plain_type = torch.Tensor.type

    @functools.wraps(plain_type)
    def cuda_type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        result = plain_type(self, *args, **kwargs)
        # The mode calls this function once more from inside `plain_type`.
        if isinstance(result, str) and not result.startswith("torch.cuda."):
            return result.replace("torch.", "torch.cuda.", 1)
        return result

    torch.Tensor.type = cuda_type  # type: ignore[method-assign]
    for name in ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Byte", "Bool"):
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
