"""What a program that is written for CUDA sees of torch, with the CPU layer enabled."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from torch.utils.data import DataLoader, TensorDataset

from mcore_lab.errors import BackendError

CPU = torch.device("cpu")
DEVICES: tuple[Any, ...] = ("cuda", "cuda:1", 0, torch.device("cuda"), torch.device("cuda", 1))


class AllocatesInBackward(torch.autograd.Function):
    """Asks for a CUDA tensor in both directions, as Megatron-Core's layers do."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x + torch.zeros_like(x, device="cuda")

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:
        return grad * torch.full((1,), 3.0, device=torch.cuda.current_device())


@on_ranks(1)
def test_every_way_to_ask_for_a_cuda_tensor_gives_one_on_the_cpu() -> None:
    x = torch.ones(2)
    for device in DEVICES:
        made = [
            torch.tensor([1.0], device=device),
            torch.empty(2, device=device),
            torch.zeros_like(x, device=device),
            x.new_ones(2, device=device),
            torch.arange(3, device=device),
            torch.as_tensor([1.0], device=device),
            x.to(device),
            x.to(device, torch.bfloat16),
            x.to(device=device),
            x.cuda(device),
            torch.rand(2, device=device),
            torch.nn.Parameter(torch.empty(1, device=device)),
        ]
        assert {tensor.device for tensor in made} == {CPU}
    assert x.to("cuda", torch.bfloat16).dtype is torch.bfloat16
    for device in ("cuda", 0):
        with torch.device(device):
            assert torch.ones(2).device == CPU


@on_ranks(1)
def test_the_default_device_can_be_cuda() -> None:
    torch.set_default_device("cuda")
    assert torch.ones(2).device == CPU
    assert torch.nn.Linear(2, 2).weight.device == CPU


@on_ranks(1)
def test_modules_move_to_cuda_and_keep_their_values() -> None:
    for move in (
        lambda module: module.cuda(),
        lambda module: module.cuda(0),
        *(lambda module, device=device: module.to(device) for device in DEVICES),
        *(lambda module, device=device: module.to(device=device) for device in DEVICES),
    ):
        module = torch.nn.Linear(2, 2)
        weight = module.weight.detach().clone()
        assert torch.equal(move(module).weight, weight)
        assert module.weight.device == CPU
    assert torch.nn.Linear(2, 2).to(0, torch.bfloat16).weight.dtype is torch.bfloat16
    assert torch.nn.Linear(2, 2, device="cuda").weight.device == CPU
    assert torch.nn.Linear(2, 2, device="meta").to_empty(device="cuda").weight.device == CPU


@on_ranks(1)
def test_moving_to_the_gpu_keeps_a_tensor_and_leaving_it_copies() -> None:
    x = torch.ones(2)
    assert x.cuda() is x
    assert x.to("cuda") is x
    assert x.to(x.device) is x
    for copy in (x.cpu(), x.to("cpu"), x.to(device="cpu"), x.to("cuda", copy=True)):
        copy.add_(1)
    assert x.tolist() == [1, 1]
    assert x.cpu().dtype is x.dtype


@on_ranks(1)
def test_offloaded_buffers_come_back_as_they_were() -> None:
    buffer = torch.arange(4.0)
    size = buffer.untyped_storage().size()
    kept = buffer.cpu().pin_memory()
    buffer.untyped_storage().resize_(0)
    buffer.untyped_storage().resize_(size)
    assert buffer.copy_(kept).tolist() == [0, 1, 2, 3]


@on_ranks(1)
def test_types_have_the_names_that_megatron_compares_with() -> None:
    for dtype, name in {
        torch.float32: "FloatTensor",
        torch.bfloat16: "BFloat16Tensor",
        torch.float16: "HalfTensor",
        torch.int64: "LongTensor",
    }.items():
        x = torch.ones(2, dtype=dtype)
        assert x.type() == f"torch.cuda.{name}"
        assert torch.nn.Parameter(x, requires_grad=False).type() == f"torch.cuda.{name}"
        assert torch.ones(2).type(f"torch.cuda.{name}").dtype is dtype
        assert torch.ones(2).type(dtype).dtype is dtype
        cuda_type = getattr(torch.cuda, name)
        assert isinstance(x, cuda_type)
        assert not isinstance(torch.ones(2, dtype=torch.float64), cuda_type)
        assert torch.ones(2).type(cuda_type).dtype is dtype
        assert cuda_type([1, 2]).dtype is dtype


@on_ranks(1)
def test_backward_passes_may_allocate_on_cuda() -> None:
    def fresh() -> torch.Tensor:
        return torch.ones(2, requires_grad=True)

    x = fresh()
    AllocatesInBackward.apply(x).sum().backward()
    y = fresh()
    torch.autograd.backward(AllocatesInBackward.apply(y).sum())
    z = fresh()
    (grad,) = torch.autograd.grad(AllocatesInBackward.apply(z).sum(), z)
    assert x.grad is not None
    assert y.grad is not None
    assert x.grad.tolist() == y.grad.tolist() == grad.tolist() == [3, 3]


@on_ranks(1)
def test_threads_allocate_on_cuda_too() -> None:
    def allocate() -> torch.device:
        return torch.ones(2, device="cuda").device

    with ThreadPoolExecutor(2) as pool:
        assert {future.result() for future in [pool.submit(allocate) for _ in range(4)]} == {CPU}
    found: list[torch.device] = []
    timer = threading.Timer(0, lambda: found.append(allocate()))
    timer.start()
    timer.join()
    assert found == [CPU]


@on_ranks(1)
def test_pinned_memory_is_plain_memory() -> None:
    assert torch.empty(2, pin_memory=True).device == CPU
    assert torch.ones(2).pin_memory().tolist() == [1, 1]
    assert torch.ones(2).pin_memory("cuda").tolist() == [1, 1]


@pytest.mark.filterwarnings("ignore:.*pin_memory.*")
@pytest.mark.parametrize("workers", [0, 2])
@on_ranks(1)
def test_a_data_loader_with_pinned_memory_gives_every_sample_once(workers: int) -> None:
    data = TensorDataset(torch.arange(8))
    loader = DataLoader(data, batch_size=2, pin_memory=True, num_workers=workers)
    assert [x.cuda(non_blocking=True).tolist() for (x,) in loader] == [
        [0, 1],
        [2, 3],
        [4, 5],
        [6, 7],
    ]


@on_ranks(1)
def test_streams_and_events_are_in_program_order() -> None:
    side = torch.cuda.Stream()
    assert isinstance(side, torch.cuda.Stream)
    assert torch.cuda.current_stream() == torch.cuda.default_stream()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
        start.record()
        x = torch.ones(200, 200, device="cuda")
        x = x @ x
        end.record()
        x.record_stream(side)
    with torch.cuda.stream(None):
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    torch.cuda.current_stream().wait_stream(side)
    side.record_event().synchronize()
    assert end.query()
    assert start.elapsed_time(end) > 0
    assert side.device == torch.device("cuda", torch.cuda.current_device())


@on_ranks(2)
def test_each_rank_has_a_device_of_its_own() -> None:
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    assert torch.cuda.is_available()
    assert torch.cuda.device_count() == 2
    assert torch.cuda.current_device() == rank
    torch.cuda.set_device(f"cuda:{1 - rank}")
    assert torch.cuda.current_device() == 1 - rank
    with torch.cuda.device(rank):
        torch.cuda.synchronize()
    properties = torch.cuda.get_device_properties(0)
    assert properties.multi_processor_count == os.cpu_count()
    assert properties.total_memory > 0
    assert torch.cuda.get_device_capability() == (0, 0)
    assert torch.cuda.nccl.version() == (0, 0, 0)


@on_ranks(1)
def test_memory_is_the_processes_own_and_its_peak_can_be_reset() -> None:
    size = 200 * 2**20
    before = torch.cuda.memory_allocated()
    block = torch.ones(size // 4, device="cuda")
    assert torch.cuda.memory_allocated() - before > 0.9 * size
    del block
    torch.cuda.empty_cache()
    assert torch.cuda.max_memory_allocated() - before > 0.9 * size
    assert torch.cuda.memory_stats()["allocated_bytes.all.peak"] - before > 0.9 * size
    torch.cuda.reset_peak_memory_stats()
    assert torch.cuda.max_memory_allocated() - before < 0.5 * size
    free, total = torch.cuda.mem_get_info()
    assert 0 < free < total
    assert "Allocated memory" in torch.cuda.memory_summary()


@on_ranks(1)
def test_a_file_loads_whatever_device_it_is_mapped_to() -> None:
    file = io.BytesIO()
    torch.save({"weight": torch.arange(3.0)}, file)
    for location in (
        "cuda",
        "cuda:0",
        torch.device("cuda"),
        {"cpu": "cuda:0"},
        lambda storage, _: storage.cuda(),
        "cpu",
        None,
    ):
        file.seek(0)
        weight = torch.load(file, map_location=location)["weight"]
        assert weight.device == CPU
        assert weight.tolist() == [0, 1, 2]


@on_ranks(1)
def test_a_file_that_names_a_gpu_loads() -> None:
    torch.serialization.register_package(0, lambda _: "cuda:0", lambda *_: None)
    file = io.BytesIO()
    torch.save(torch.arange(3.0), file)
    assert b"cuda:0" in file.getvalue()
    file.seek(0)
    assert torch.load(file).tolist() == [0, 1, 2]


@on_ranks(1)
def test_a_cuda_generator_is_a_generator_with_a_state_of_its_own() -> None:
    generator = torch.Generator(device="cuda").manual_seed(7)
    first = torch.rand(3, generator=generator, device="cuda")
    assert torch.equal(torch.rand(3, generator=torch.Generator("cuda").manual_seed(7)), first)
    assert isinstance(generator, torch.Generator)
    assert isinstance(torch.default_generator, torch.Generator)
    assert not isinstance(first, torch.Generator)
    assert hasattr(torch.Generator, "get_state")


@on_ranks(1)
def test_autocast_computes_in_the_lower_type_in_both_directions() -> None:
    x, weight = torch.ones(2, 2), torch.ones(2, 2, requires_grad=True)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = x @ weight
        assert torch.is_autocast_enabled()
        assert torch.get_autocast_dtype("cuda") is torch.bfloat16
    assert y.dtype is torch.bfloat16
    y.sum().backward()
    assert weight.grad is not None
    assert weight.grad.dtype is torch.float32
    assert not torch.is_autocast_enabled()
    with torch.autocast("cuda"):
        assert (x @ x).dtype is torch.float16
    with torch.cuda.amp.autocast(dtype=torch.bfloat16):
        assert (x @ x).dtype is torch.bfloat16
    with torch.autocast("cuda", enabled=False):
        assert (x @ x).dtype is torch.float32


@on_ranks(1)
def test_cuda_graphs_are_refused_in_words() -> None:
    with pytest.raises(BackendError, match="CUDA graphs need a GPU"):
        torch.cuda.CUDAGraph()


@on_ranks(1)
def test_there_is_no_accelerator_beside_the_facade() -> None:
    assert not torch.accelerator.is_available()
    assert torch.accelerator.current_accelerator() is None
    assert torch.accelerator.device_count() == 0
    torch.accelerator.synchronize()


@on_ranks(1)
def test_enabling_twice_changes_nothing() -> None:
    from mcore_lab import cpu

    before = torch.cuda.synchronize, torch.distributed.all_gather, torch.Generator
    cpu.enable()
    assert cpu.is_enabled()
    assert (torch.cuda.synchronize, torch.distributed.all_gather, torch.Generator) == before


AFTER_MEGATRON = """
import warnings; warnings.simplefilter("ignore")
import megatron.core.tensor_parallel.mappings as mappings
from megatron.core.transformer.moe import token_dispatcher
from megatron.core.fusions import fused_bias_gelu
import torch
from mcore_lab import cpu
cpu.enable()
assert not hasattr(fused_bias_gelu.bias_gelu, "_torchdynamo_orig_callable")
assert mappings.dist_all_gather_func is torch.distributed.all_gather_into_tensor
tensor = token_dispatcher.maybe_move_tensor_to_cpu(torch.ones(1), as_numpy=True)
assert tensor.tolist() == [1] and not torch.is_tensor(tensor)
torch.ones(1, device="cuda")
"""


def test_enabling_after_megatron_core_was_imported_reaches_its_own_names() -> None:
    done = subprocess.run(
        [sys.executable, "-c", AFTER_MEGATRON],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_this_process_is_left_as_it_was() -> None:
    if torch.version.cuda is None:
        assert not torch.cuda.is_available()
    assert torch.ones(1).type() == "torch.FloatTensor"
    assert threading.Thread.start.__module__ == "threading"


@on_ranks(1)
def test_rows_that_are_one_row_repeated_are_rows_of_their_own_on_the_device() -> None:
    rows = torch.arange(3).expand(2, 3).cuda()
    rows[0, 0] = 7
    assert rows.tolist() == [[7, 1, 2], [0, 1, 2]]
