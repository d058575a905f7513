"""Where torch takes a device outside of tensor operations: modules, storages, generators, …"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.distributed.device_mesh

from mcore_lab.cpu.replace import replace
from mcore_lab.cpu.tensors import is_cuda


def _cpu_for_cuda(device: Any) -> Any:
    return "cpu" if is_cuda(device) else device


def move_modules_to_cpu() -> None:
    """`module.to("cuda")` and `module.to(local_rank)`."""
    parse = torch._C._nn._parse_to

    @functools.wraps(parse)
    def parse_to(*args: Any, **kwargs: Any) -> Any:
        if "device" in kwargs:
            kwargs["device"] = _cpu_for_cuda(kwargs["device"])
        return parse(*map(_cpu_for_cuda, args[:1]), *args[1:], **kwargs)

    torch._C._nn._parse_to = parse_to


def load_storages_on_cpu() -> None:
    """`torch.load(…, map_location="cuda")`, and a file that was saved on a GPU."""
    to = torch.UntypedStorage.to

    @functools.wraps(to)
    def storage_to(self: Any, *, device: Any, non_blocking: bool = False) -> Any:
        return self if is_cuda(device) else to(self, device=device, non_blocking=non_blocking)

    def storage_cuda(self: Any, device: Any = None, non_blocking: bool = False) -> Any:
        return self

    torch.UntypedStorage.to = storage_to  # type: ignore[method-assign]
    torch.UntypedStorage.cuda = storage_cuda  # type: ignore[method-assign]


def default_device_is_cpu() -> None:
    """`torch.set_default_device("cuda")` works below every mode, where none can correct it."""
    set_default_device = torch.set_default_device

    @functools.wraps(set_default_device)
    def set_default(device: Any) -> None:
        set_default_device(_cpu_for_cuda(device))

    replace(torch, "set_default_device", set_default)


def make_generators_on_cpu() -> None:
    """`torch.Generator(device="cuda")` is a CPU generator; the name stays a type."""
    generator = torch.Generator

    class GeneratorType(type(generator)):  # type: ignore[misc]
        def __call__(cls, device: Any = "cpu") -> torch.Generator:
            return generator(device=_cpu_for_cuda(device))

        def __instancecheck__(cls, instance: object) -> bool:
            return isinstance(instance, generator)

    class Generator(generator, metaclass=GeneratorType):  # type: ignore[misc, valid-type]
        pass

    replace(torch, "Generator", Generator)


def meshes_on_cpu() -> None:
    """A `DeviceMesh` of "cuda" is one of CPUs: FSDP and DTensor ask it where tensors live."""
    mesh: Any = torch.distributed.device_mesh.DeviceMesh
    init = mesh.__init__

    @functools.wraps(init)
    def init_on_cpu(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:
        init(self, _cpu_for_cuda(device_type), *args, **kwargs)

    mesh.__init__ = init_on_cpu


def autocast_on_cpu() -> None:
    """`torch.autocast("cuda")` is the CPU's autocast, with CUDA's default type: float16.

    Left alone it would compute in the parameters' own type and say nothing. The operations that
    run in the lower type are those of the CPU's list.
    """
    init = torch.autocast.__init__

    @functools.wraps(init)
    def init_on_cpu(self: Any, device_type: str, dtype: Any = None, *args: Any, **kw: Any) -> None:
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        init(self, device_type, dtype, *args, **kw)

    torch.autocast.__init__ = init_on_cpu  # type: ignore[method-assign]
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        replace(torch, name, _of_cpu(getattr(torch, name)))


def _of_cpu(ask: Any) -> Any:
    @functools.wraps(ask)
    def ask_of_cpu(device_type: str = "cuda") -> Any:
        return ask("cpu" if device_type == "cuda" else device_type)

    return ask_of_cpu
