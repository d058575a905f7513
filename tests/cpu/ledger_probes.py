"""For each entry of the ledger: does upstream still need it? Run as a program, without the layer.

Prints a JSON object: for each entry true, false, or the traceback of a probe that broke.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import multiprocessing
import os
import resource
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.fsdp import fully_shard
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack

from mcore_lab import cpu
from mcore_lab.cpu import cuda_api
from mcore_lab.cpu.random_stream import DeviceRandomStream
from mcore_lab.cpu.tensors import CudaOnCpu
from mcore_lab.runtime import launch

_SECONDS = 60


def _raises(call: Callable[[], Any]) -> bool:
    try:
        call()
    except (Exception, SystemExit):
        return True
    return False


def _answer_that_cuda_is_there() -> None:
    torch.cuda.is_available = lambda: True


def _cuda() -> bool:
    return _raises(torch.cuda.synchronize) and _raises(torch.cuda.current_device)


def _accelerator() -> bool:
    _answer_that_cuda_is_there()
    return _raises(torch.accelerator.synchronize)


def _cpu_state_while_the_device_draws() -> bool:
    before = torch.get_rng_state()
    stream = DeviceRandomStream().manual_seed(7)
    with stream.drawing():
        return not torch.equal(torch.get_rng_state(), before)


def _states_that_recomputation_keeps() -> bool:
    from torch.utils.checkpoint import get_device_states

    return get_device_states(torch.ones(1)) == ([], [])


def _tensors_on_cuda() -> bool:
    return _raises(lambda: torch.ones(1, device="cuda")) and _raises(torch.ones(1).cuda)


def _mode_in_backward() -> bool:
    seen: list[bool] = []

    class Mode(TorchFunctionMode):
        def __torch_function__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            return func(*args, **(kwargs or {}))

    x = torch.ones(1, requires_grad=True)
    x.register_hook(lambda grad: seen.append(bool(_get_current_function_mode_stack())))
    with Mode():
        (x * 2).sum().backward()
    return seen == [False]


def _record_stream() -> bool:
    return _raises(lambda: torch.ones(1).record_stream(cuda_api.Stream()))


def _cuda_types() -> bool:
    return _raises(lambda: torch.cuda.FloatTensor([1.0]))


def _module_to() -> bool:
    with CudaOnCpu():
        return _raises(lambda: torch.nn.Linear(1, 1).to(0))


def _load_to_cuda() -> bool:
    file = io.BytesIO()
    torch.save(torch.ones(1), file)
    file.seek(0)
    cuda_api.install_cuda()
    return _raises(lambda: torch.load(file, map_location="cuda"))


def _default_device() -> bool:
    with CudaOnCpu():
        torch.set_default_device("cuda")
        return _raises(lambda: torch.ones(1))


def _generator() -> bool:
    return _raises(lambda: torch.Generator(device="cuda"))


def _mesh() -> bool:
    cuda_api.install_cuda()
    with CudaOnCpu():
        _init_one_rank("gloo")
        mesh = dist.DeviceMesh.from_group(dist.group.WORLD, "cuda")
        return _raises(lambda: fully_shard(torch.nn.Linear(1, 1), mesh=mesh))


def _autocast() -> bool:
    cuda_api.install_cuda()
    x = torch.ones(2, 2)
    with torch.autocast("cuda", dtype=torch.bfloat16):
        return (x @ x).dtype is torch.float32


def _init_one_rank(backend: str) -> None:
    dist.init_process_group(
        backend, rank=0, world_size=1, store=dist.FileStore(tempfile.mktemp(), 1)
    )


def _nccl() -> bool:
    return _raises(lambda: _init_one_rank("nccl"))


def _nccl_options() -> bool:
    return not hasattr(dist, "ProcessGroupNCCL")


def _stacked_output() -> bool:
    dist.init_process_group("gloo")
    output = torch.empty(2, 3)
    return _raises(lambda: dist.all_gather_into_tensor(output, torch.ones(3)))


def _stacked_input() -> bool:
    dist.init_process_group("gloo")
    return _raises(lambda: dist.reduce_scatter_tensor(torch.empty(3), torch.ones(2, 3)))


def _uneven() -> bool:
    dist.init_process_group("gloo")
    outputs = [torch.empty(1), torch.empty(2)]
    return _raises(lambda: dist.all_gather(outputs, torch.ones(dist.get_rank() + 1)))


def _slow_reduce_scatter() -> bool:
    """Gloo's threads wake each other several times as often as in an all-to-all of as much."""
    dist.init_process_group("gloo")
    parts, output = [torch.ones(4), torch.ones(4)], torch.empty(4)

    def switches(collective: Callable[[], object]) -> int:
        collective()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw
        for _ in range(20):
            collective()
        return resource.getrusage(resource.RUSAGE_SELF).ru_nvcsw - before

    all_to_all = switches(lambda: dist.all_to_all_single(torch.empty(8), torch.cat(parts)))
    return switches(lambda: dist.reduce_scatter(output, parts)) > 1.5 * all_to_all


def _jit_fuser() -> bool:
    jit_fuser = importlib.import_module("megatron.core.jit").jit_fuser
    return hasattr(jit_fuser(lambda x: x), "_torchdynamo_orig_callable")


def _triton() -> bool:
    sys.modules["triton"] = None  # type: ignore[assignment]
    kernels = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
    return _raises(lambda: importlib.import_module(kernels))


def _groups_left_behind() -> bool:
    state = importlib.import_module("megatron.core.parallel_state")
    dist.init_process_group("gloo")
    state.initialize_model_parallel()
    state.destroy_model_parallel()
    return len(dist.distributed_c10d._world.pg_map) > 1


def _tracker_fork() -> bool:
    cuda_api.install_cuda()
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    tracker = random.CudaRNGStatesTracker()
    tracker.add("model-parallel-rng", 7)
    before = torch.get_rng_state()
    with tracker.fork():
        drawn = torch.rand(3)
    torch.set_rng_state(before)
    return torch.equal(torch.rand(3), drawn)


def _recomputation_asks_for_fp8() -> bool:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    return random.CheckpointWithoutOutput().fp8 is True


def _recomputation_compiles() -> bool:
    random = importlib.import_module("megatron.core.tensor_parallel.random")
    return hasattr(random, "_get_share_storage")


def _te_version() -> bool:
    utils = importlib.import_module("megatron.core.utils")
    return _raises(lambda: utils.is_te_min_version("1.0.0"))


def _te_general_gemm() -> bool:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    return not hasattr(moe_utils, "te_general_gemm")


def _te_in_latent_attention() -> bool:
    mla = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    return mla.HAVE_TE and not isinstance(mla.TELinear, type)


def _numpy() -> bool:
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    return torch.is_tensor(moe_utils.maybe_move_tensor_to_cpu(torch.ones(1), as_numpy=True))


def _helpers() -> bool:
    utils = importlib.import_module("megatron.core.datasets.utils")
    return _raises(utils.compile_helpers)


def _te_layers() -> bool:
    te = importlib.import_module("megatron.core.extensions.transformer_engine")
    bert: Any = importlib.import_module("megatron.core.models.bert.bert_layer_specs")
    return (
        not isinstance(te.TELinear, type)
        and te.TEGroupedLinear is None
        and _raises(bert.get_bert_layer_with_transformer_engine_spec)
    )


def _on_two_ranks(probe: Callable[[], bool]) -> Callable[[], bool]:
    return lambda: all(launch(probe, 2, timeout=_SECONDS))


def _norm_refuses() -> bool:
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_config import TransformerConfig

    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 8, "num_attention_heads": 2}
    split = TransformerConfig(**sizes, tensor_model_parallel_size=2, sequence_parallel=True)
    return _raises(lambda: WrappedTorchNorm(split, 8)) and not _raises(
        lambda: WrappedTorchNorm(TransformerConfig(**sizes), 8)
    )


def _adam_without_a_rate() -> bool:
    weight = torch.nn.Parameter(torch.ones(1))
    return _raises(lambda: torch.optim.AdamW([weight], lr=None))  # type: ignore[arg-type]


def _no_step_before_the_first() -> bool:
    from megatron.core.optimizer import DistributedOptimizer

    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = object.__new__(DistributedOptimizer)
    optimizer.optimizer = torch.optim.AdamW([weight])
    optimizer.optimizer.state[weight] = {"exp_avg": torch.ones(1), "exp_avg_sq": torch.ones(1)}
    try:
        optimizer.state_dict()
    except KeyError as error:
        return error.args == ("step",)
    return False


PROBES: dict[str, Callable[[], bool]] = {
    "torch.cuda": _cuda,
    "torch.accelerator": _accelerator,
    "torch.get_rng_state, torch.set_rng_state": _cpu_state_while_the_device_draws,
    "torch.utils.checkpoint.get_device_states": _states_that_recomputation_keeps,
    "torch functions on 'cuda' or 0, .cuda(), .cpu(), .type(), pin_memory, dropout": (
        _tensors_on_cuda
    ),
    "torch.autograd.graph._engine_run_backward": _mode_in_backward,
    "torch.Tensor.record_stream": _record_stream,
    "torch.cuda.FloatTensor, LongTensor, …": _cuda_types,
    "torch.nn.Module.to": _module_to,
    "torch.UntypedStorage.to, cuda": _load_to_cuda,
    "torch.set_default_device": _default_device,
    "torch.Generator": _generator,
    "torch.distributed.DeviceMesh.__init__": _mesh,
    "torch.autocast, is_autocast_enabled, get_autocast_dtype": _autocast,
    "torch.distributed.init_process_group, new_group": _nccl,
    "torch.distributed.ProcessGroupNCCL": _nccl_options,
    "torch.distributed.all_gather_into_tensor": _on_two_ranks(_stacked_output),
    "torch.distributed.reduce_scatter_tensor": _on_two_ranks(_stacked_input),
    "torch.distributed.all_gather": _on_two_ranks(_uneven),
    "torch.distributed.reduce_scatter": _on_two_ranks(_slow_reduce_scatter),
    "megatron.core.jit.jit_fuser": _jit_fuser,
    "megatron.core.transformer.custom_layers.batch_invariant_kernels.triton": _triton,
    "megatron.core.parallel_state.destroy_model_parallel": _on_two_ranks(_groups_left_behind),
    "megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork": _tracker_fork,
    "megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__": (
        _recomputation_asks_for_fp8
    ),
    "megatron.core.tensor_parallel.random._get_share_storage": _recomputation_compiles,
    "megatron.core.utils.is_te_min_version": _te_version,
    "megatron.core.transformer.moe.moe_utils.te_general_gemm": _te_general_gemm,
    "megatron.core.transformer.multi_latent_attention.HAVE_TE": _te_in_latent_attention,
    "megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu": _numpy,
    "megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__": _norm_refuses,
    "torch.optim.Adam.__init__": _adam_without_a_rate,
    "megatron.core.optimizer.DistributedOptimizer.state_dict": _no_step_before_the_first,
    "megatron.core.datasets.utils.compile_helpers": _helpers,
    "megatron.core.extensions.transformer_engine.TE*": _te_layers,
}
"""What each entry `replaces`, and a function that says whether upstream still needs it replaced."""


def _answer(probe: Callable[[], bool]) -> bool | str:
    """Run the probe in a process of its own, so that none sees what another has changed."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)

    def run() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            try:
                sender.send(probe())
            except BaseException:
                sender.send(traceback.format_exc())
        os._exit(0)

    process = context.Process(target=run)
    process.start()
    sender.close()
    try:
        return receiver.recv() if receiver.poll(_SECONDS) else f"no answer in {_SECONDS} s"
    except EOFError:
        process.join()
        return f"the probe's process ended with status {process.exitcode}"
    finally:
        process.kill()


def main() -> None:
    """Print what each probe says; Megatron-Core's `jit_fuser` is asked before it is imported."""
    warnings.simplefilter("ignore")
    answers = {name: _answer(PROBES[name]) for name in ("megatron.core.jit.jit_fuser",)}
    cpu.preload()
    answers |= {name: _answer(probe) for name, probe in PROBES.items() if name not in answers}
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
