"""Tensors that ask for a CUDA device get the CPU, with the device's random stream.

A tensor does not know whether it was meant for the GPU. What follows from that:

- `x.cuda()`, `x.to("cuda")` and `x.pin_memory()` return `x`, as they do for a tensor that is there
  already. A program that goes on to change the tensor it came from, in place, changes both.
- `x.cpu()` and `x.to("cpu")` return a copy, as they do for a tensor on a GPU: checkpoints that are
  written in the background and buffers that are offloaded are snapshots.
- `x.device` is the CPU and `x.is_cuda` False: what Megatron-Core offloads from the GPU stays.
- In-place draws such as `x.normal_()` come from the CPU's random stream, but for those inside
  `get_cuda_rng_tracker().fork()`. Dropout always draws from the device's.
"""

from __future__ import annotations

import atexit
import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mcore_lab.cpu.random_stream import STREAM
from mcore_lab.cpu.replace import replace

_CPU = torch.device("cpu")
_DRAWS_ON_DEVICE = {
    torch.dropout,
    torch.nn.functional.dropout,
    torch.nn.functional.dropout1d,
    torch.nn.functional.dropout2d,
    torch.nn.functional.dropout3d,
    torch.nn.functional.alpha_dropout,
    torch.nn.functional.feature_alpha_dropout,
    torch.nn.functional.multi_head_attention_forward,
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
_TYPES = ("Float", "Double", "Half", "BFloat16", "Long", "Int", "Short", "Char", "Byte", "Bool")


def is_cuda(device: object) -> bool:
    """Say whether `device`, in any of the forms that torch takes, means a CUDA device."""
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device == "cuda" or device.startswith("cuda:")
    return isinstance(device, int) and not isinstance(device, bool)


def _to(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`x.to("cuda", …)` and `x.to(0, …)` name the device by position."""
    if args and is_cuda(args[0]):
        args = (_CPU, *args[1:])
    moved = tensor.to(*args, **kwargs)
    wanted = args[0] if args else kwargs.get("device")
    leaves_gpu = isinstance(wanted, str) and wanted == "cpu"
    return moved.clone() if leaves_gpu and moved is tensor else moved


def _type(tensor: torch.Tensor, dtype: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`x.type()` says `torch.cuda.…Tensor`: Megatron-Core compares it with these names."""
    if isinstance(dtype, str):
        dtype = dtype.replace("torch.cuda.", "torch.")
    result = tensor.type(dtype, *args, **kwargs)
    return result.replace("torch.", "torch.cuda.", 1) if isinstance(result, str) else result


def _stay(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return tensor


def _cuda(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """`x.expand(5, n).cuda()` has rows of its own there, which can be written to one by one."""
    is_repeated = any(
        stride == 0 and size > 1 for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
    )
    return tensor.contiguous() if is_repeated else tensor


def _device(*args: Any, **kwargs: Any) -> torch.device:
    """`torch.device(0)` is a device of the accelerator, which a CPU build of torch lacks."""
    if args and isinstance(args[0], int):
        args = ("cuda", *args)
    return torch.device(*args, **kwargs)


_METHODS: dict[Any, Callable[..., Any]] = {
    torch.device: _device,
    torch.Tensor.to: _to,
    torch.Tensor.type: _type,
    torch.Tensor.cpu: torch.Tensor.clone,
    torch.Tensor.cuda: _cuda,
    torch.Tensor.pin_memory: _stay,
}
_SPECIAL = _DRAWS_ON_DEVICE | _METHODS.keys()


class CudaOnCpu(TorchFunctionMode):
    """Send every `device="cuda"` to the CPU; costs about 1.3 µs an operation.

    Modes are thread-local, and torch leaves them for the time of a backward pass: `enable()` sees
    to it that new threads and backward passes enter it too.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if not kwargs and func not in _SPECIAL:
            # Nearly all of them.
            return func(*args)
        kwargs = kwargs or {}
        on_device = "device" in kwargs and is_cuda(kwargs["device"])
        if on_device:
            kwargs = {**kwargs, "device": _CPU}
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}
        if func in _DRAWS_ON_DEVICE or (on_device and func in _RANDOM_FACTORIES):
            with STREAM.drawing():
                return func(*args, **kwargs)
        return _METHODS.get(func, func)(*args, **kwargs)


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


def enter_mode_in_backward() -> None:
    """Enter the mode for backward passes: `loss.backward()` is itself an operation that it sees."""
    run = torch.autograd.graph._engine_run_backward

    @functools.wraps(run)
    def run_with_mode(*args: Any, **kwargs: Any) -> Any:
        with CudaOnCpu():
            return run(*args, **kwargs)

    for module in (torch.autograd, torch.autograd.graph):
        replace(module, "_engine_run_backward", run_with_mode)


def record_no_streams() -> None:
    """`x.record_stream(s)` keeps memory from being used again while `s` works on it."""

    def record_stream(self: torch.Tensor, stream: object) -> None:
        """A CPU's stream has no work left."""

    torch.Tensor.record_stream = record_stream  # type: ignore[assignment,method-assign]


def alias_cuda_types() -> None:
    """`isinstance(x, torch.cuda.FloatTensor)` holds, and `torch.cuda.LongTensor([…])` makes one."""
    for name in _TYPES:
        setattr(torch.cuda, f"{name}Tensor", getattr(torch, f"{name}Tensor"))
