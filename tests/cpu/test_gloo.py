"""The collectives that Megatron-Core asks NCCL for, with their results, over Gloo."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from on_ranks import on_ranks


def _join() -> tuple[int, int]:
    dist.init_process_group("nccl")
    return dist.get_rank(), dist.get_world_size()


def _rows(rank: int, columns: int = 2) -> torch.Tensor:
    """Return rank + 1 rows of the rank's number: a size of its own for each rank."""
    return torch.full((rank + 1, columns), float(rank), device="cuda")


@pytest.mark.parametrize("backend", ["nccl", "NCCL", "cpu:gloo,cuda:nccl", "gloo", None])
@on_ranks(2)
def test_whatever_backend_is_asked_for_the_groups_are_gloos(backend: str | None) -> None:
    dist.init_process_group(
        backend, timeout=timedelta(seconds=30), device_id=torch.device("cuda", 0)
    )
    options = dist.ProcessGroupNCCL.Options()
    groups = [
        None,
        dist.new_group([0, 1]),
        dist.new_group([0, 1], backend="nccl", pg_options=options),
        dist.new_group([0, 1], timedelta(seconds=30), "nccl", options),
    ]
    for group in groups:
        assert dist.get_backend(group) == "gloo"
        x = torch.ones(2, device="cuda")
        dist.all_reduce(x, group=group)
        assert x.tolist() == [2, 2]


@on_ranks(2)
def test_megatron_builds_its_groups_with_settings_for_nccl() -> None:
    from megatron.core import parallel_state

    _join()
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=2, high_priority_stream_groups=["tp", "dp"]
    )
    x = torch.ones(1, device="cuda")
    dist.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
    assert x.item() == 2


@pytest.mark.parametrize("async_op", [False, True])
@on_ranks(3)
def test_all_gather_takes_a_size_of_each_ranks_own(async_op: bool) -> None:
    rank, size = _join()
    outputs = [torch.empty_like(_rows(r)) for r in range(size)]
    mine = _rows(rank).requires_grad_()
    work = dist.all_gather(outputs, mine, async_op=async_op)
    if async_op:
        work.wait()
        assert work.is_completed()
    else:
        assert work is None
    for r, output in enumerate(outputs):
        assert torch.equal(output, _rows(r))
        assert not output.requires_grad


@on_ranks(3)
def test_uneven_all_gather_stays_in_its_group_and_may_be_empty() -> None:
    rank, _ = _join()
    group = dist.new_group([0, 2])
    outputs = [torch.empty(0, 2), torch.empty(3, 2)]
    if rank == 1:
        dist.all_gather(outputs, torch.empty(0, 2), group=group)
        return
    dist.all_gather(outputs, torch.full_like(outputs[rank // 2], rank), group=group)
    assert outputs[1].tolist() == [[2, 2]] * 3


@on_ranks(3)
def test_megatrons_mappings_gather_and_scatter_uneven_sequences() -> None:
    from megatron.core.tensor_parallel import mappings

    rank, size = _join()
    group = dist.group.WORLD
    rows = [r + 1 for r in range(size)]
    x = _rows(rank).requires_grad_()
    whole = mappings.gather_from_sequence_parallel_region(x, group=group, output_split_sizes=rows)
    assert torch.equal(whole, torch.cat([_rows(r) for r in range(size)]))
    whole.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, torch.full_like(x, size))
    part = mappings.reduce_scatter_to_sequence_parallel_region(
        whole.detach(), group=group, input_split_sizes=rows
    )
    assert torch.equal(part, _rows(rank) * size)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64], ids=str)
@on_ranks(3)
def test_uneven_reduce_scatter_sums_in_its_group_and_may_leave_nothing(dtype: torch.dtype) -> None:
    rank, _ = _join()
    group = dist.new_group([0, 2])
    if rank == 1:
        return
    parts = [torch.empty(0, 2, dtype=dtype), torch.tensor([[256, 1], [2, 3]], dtype=dtype)]
    # What is put in has no storage in order, and what comes out goes into a part of another's.
    whole = torch.zeros(2, 4, dtype=dtype)
    output = whole[:, ::2] if rank == 2 else torch.empty(0, 2, dtype=dtype)
    dist.reduce_scatter(output, [parts[0], parts[1].t()], group=group)
    assert whole.tolist() == ([[512, 0, 4, 0], [2, 0, 6, 0]] if rank == 2 else [[0] * 4] * 2)


@pytest.mark.parametrize("async_op", [False, True])
@pytest.mark.parametrize("op", ["SUM", "AVG", "MAX"])
@on_ranks(2)
def test_every_reduction_of_a_list_has_nccls_result(op: str, async_op: bool) -> None:
    rank, _ = _join()
    parts = [torch.tensor([1.0, 2.0]) + rank, torch.tensor([3.0, 4.0]) + rank]
    output = torch.empty(2)
    work = dist.reduce_scatter(output, parts, op=getattr(dist.ReduceOp, op), async_op=async_op)
    assert (work is not None) is async_op
    if work is not None:
        work.wait()
    expected = {"SUM": [3, 5, 7, 9], "AVG": [1.5, 2.5, 3.5, 4.5], "MAX": [2, 3, 4, 5]}[op]
    assert output.tolist() == expected[2 * rank : 2 * rank + 2]


@on_ranks(2)
def test_torchs_differentiable_all_gather_has_its_gradients() -> None:
    import torch.distributed.nn.functional as differentiable

    rank, size = _join()
    x = torch.full((2,), float(rank), requires_grad=True)
    parts = differentiable.all_gather(x)
    assert [part.tolist() for part in parts] == [[0, 0], [1, 1]]
    sum(part.sum() * (i + 1) for i, part in enumerate(parts)).backward()
    assert x.grad is not None
    assert x.grad.tolist() == [size * (rank + 1)] * 2


@pytest.mark.parametrize("async_op", [False, True])
@on_ranks(2)
def test_all_gather_into_tensor_takes_stacked_and_concatenated_outputs(async_op: bool) -> None:
    rank, size = _join()
    mine = torch.full((3, 2), float(rank), device="cuda")
    expected = torch.stack([torch.full((3, 2), float(r)) for r in range(size)])
    for shape in ((size, 3, 2), (size * 3, 2), (size * 6,)):
        output = torch.empty(shape, device="cuda")
        work = dist.all_gather_into_tensor(output, mine, async_op=async_op)
        if work is not None:
            work.wait()
        assert torch.equal(output, expected.view(shape))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@on_ranks(2)
def test_reductions_that_megatron_uses_have_nccls_results(dtype: torch.dtype) -> None:
    rank, _ = _join()
    mine = torch.tensor([1.0, 2.0, 3.0, 4.0], dtype=dtype) + rank
    operations = {
        dist.ReduceOp.SUM: [3, 5, 7, 9],
        dist.ReduceOp.AVG: [1.5, 2.5, 3.5, 4.5],
        dist.ReduceOp.MAX: [2, 3, 4, 5],
        dist.ReduceOp.MIN: [1, 2, 3, 4],
    }
    for op, expected in operations.items():
        x = mine.clone()
        dist.all_reduce(x, op=op)
        assert x.tolist() == expected
    for op in (dist.ReduceOp.SUM, dist.ReduceOp.AVG):
        for source in (mine, mine.view(2, 2)):
            part = torch.empty(2, dtype=dtype)
            dist.reduce_scatter_tensor(part, source, op=op, async_op=True).wait()
            assert part.tolist() == operations[op][2 * rank : 2 * rank + 2]
    exact = torch.tensor([True, rank == 0]).to(torch.uint8)
    dist.all_reduce(exact, op=dist.ReduceOp.MIN)
    assert exact.tolist() == [1, 0]


@on_ranks(3)
def test_all_to_all_takes_uneven_splits() -> None:
    from megatron.core.tensor_parallel.mappings import all_to_all

    rank, size = _join()
    # Rank r sends d + 1 copies of 10 r + d to rank d.
    sizes = [d + 1 for d in range(size)]
    sent = torch.cat([torch.full((d + 1, 1), 10.0 * rank + d) for d in range(size)])
    sent.requires_grad_()
    received = all_to_all(dist.group.WORLD, sent, [rank + 1] * size, sizes)
    expected = [10.0 * r + rank for r in range(size) for _ in range(rank + 1)]
    assert received.flatten().tolist() == expected
    (received * (rank + 1)).sum().backward()
    assert sent.grad is not None
    assert sent.grad.flatten().tolist() == [d + 1 for d in range(size) for _ in range(d + 1)]


@on_ranks(2)
def test_coalesced_collectives_give_what_each_alone_would() -> None:
    from torch.distributed import _coalescing_manager as coalescing

    rank, _ = _join()
    group = dist.group.WORLD
    buffers = [torch.full((4,), float(rank + i)) for i in range(3)]
    with coalescing(group, async_ops=True) as work:
        for buffer in buffers:
            dist.all_reduce(buffer, group=group)
    work.wait()
    assert [buffer[0].item() for buffer in buffers] == [1, 3, 5]
    with coalescing(group, async_ops=True) as work:
        for buffer in buffers:
            half = buffer.view(2, 2)[rank]
            dist.reduce_scatter_tensor(half, buffer, op=dist.ReduceOp.AVG, group=group)
    work.wait()
    assert [buffer.view(2, 2)[rank].tolist() for buffer in buffers] == [[1, 1], [3, 3], [5, 5]]
    for buffer in buffers:
        buffer.view(2, 2)[1 - rank].zero_()
    with coalescing(group, async_ops=True) as work:
        for buffer in buffers:
            half = buffer.view(2, 2)[rank]
            dist.all_gather_into_tensor(buffer, half, group=group)
    work.wait()
    assert [buffer.tolist() for buffer in buffers] == [[1] * 4, [3] * 4, [5] * 4]


@on_ranks(3)
def test_batched_sends_and_receives_go_round_a_ring() -> None:
    rank, size = _join()
    after, before = (rank + 1) % size, (rank - 1) % size
    received = torch.empty(2, device="cuda", dtype=torch.bfloat16)
    sent = torch.full_like(received, rank)
    works = dist.batch_isend_irecv(
        [dist.P2POp(dist.isend, sent, after), dist.P2POp(dist.irecv, received, before)]
    )
    for work in works:
        work.wait()
    assert received.tolist() == [before, before]


@on_ranks(2)
def test_objects_and_barriers_may_name_cuda_devices() -> None:
    rank, _ = _join()
    dist.barrier(device_ids=[rank])
    work: Any = dist.barrier(device_ids=[rank], async_op=True)
    work.wait()
    said: list[Any] = [{"from": rank}]
    dist.broadcast_object_list(said, src=0, device=torch.device("cuda", rank))
    assert said == [{"from": 0}]
    everyone: list[Any] = [None, None]
    dist.all_gather_object(everyone, torch.full((1,), rank, device="cuda"))
    assert [x.item() for x in everyone] == [0, 1]


@on_ranks(2)
def test_fsdp_shards_a_model_over_a_cuda_mesh() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank, size = _join()
    torch.manual_seed(7)
    whole = torch.nn.Linear(4, 2)
    sharded = torch.nn.Linear(4, 2).cuda()
    sharded.load_state_dict(whole.state_dict())
    x = torch.rand(2 * size, 4)
    for mesh in (
        init_device_mesh("cuda", (size,)),
        dist.DeviceMesh.from_group(dist.group.WORLD, "cuda"),
    ):
        assert mesh.device_type == "cpu"
        assert mesh.size() == size
    fully_shard(sharded, mesh=mesh)
    whole(x).square().sum().backward()
    sharded(x[2 * rank : 2 * rank + 2]).square().sum().backward()
    assert sharded.weight.to_local().shape == (1, 4)
    # FSDP averages over the ranks.
    torch.testing.assert_close(sharded.weight.grad.full_tensor() * size, whole.weight.grad)
