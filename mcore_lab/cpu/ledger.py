"""The ledger: every patch of the CPU layer, what it replaces, why, and for which versions.

Nothing else in mcore_lab changes torch or Megatron-Core, and nothing in here is applied where a
CUDA device is used. A test holds for each entry that upstream still needs it.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from packaging.specifiers import SpecifierSet

from mcore_lab.cpu import (
    cuda_api,
    gloo,
    megatron_core,
    placement,
    random_stream,
    tensors,
    transformer_engine,
)
from mcore_lab.cpu.replace import update_importers


@functools.cache
def _megatron_version() -> str:
    return importlib.metadata.version("megatron-core")


@dataclass(frozen=True, kw_only=True)
class Patch:
    """One change to torch or Megatron-Core."""

    replaces: str
    """The name that is replaced, as one would import it."""
    why: str
    """What fails without it."""
    apply: Callable[[], None]
    """Makes the change, once a process."""
    versions: str = ""
    """The Megatron-Core versions it is for, as a version specifier; all if empty."""
    torch_build: Literal["cpu", "cuda"] | None = None
    """The build of torch it is for; both if not set."""

    @property
    def is_for_this(self) -> bool:
        """Whether the patch is meant for the installed Megatron-Core and torch."""
        version = _megatron_version()
        build = "cuda" if torch.backends.cuda.is_built() else "cpu"
        return self.torch_build in (None, build) and SpecifierSet(self.versions).contains(
            version, prereleases=True
        )


TORCH = (
    Patch(
        replaces="torch.cuda",
        why="there is no CUDA device; what is asked of one is answered for the CPU",
        apply=cuda_api.install_cuda,
    ),
    Patch(
        replaces="torch.accelerator",
        why="a CUDA build of torch reaches for the driver once torch.cuda is available",
        apply=cuda_api.install_accelerator,
    ),
    Patch(
        replaces="torch.get_rng_state, torch.set_rng_state",
        why="the default generator holds the device's state while the device draws",
        apply=random_stream.keep_cpu_state_apart,
    ),
    Patch(
        replaces="torch.utils.checkpoint.get_device_states",
        why="it asks the tensors' devices, which are the CPU, whose dropout state to restore",
        apply=random_stream.restore_device_state_in_recomputation,
    ),
    Patch(
        replaces="torch functions on 'cuda' or 0, .cuda(), .cpu(), .type(), pin_memory, dropout",
        why="tensors live on the CPU and draw from the device's random stream",
        apply=tensors.enter_mode_in_every_thread,
    ),
    Patch(
        replaces="torch.autograd.graph._engine_run_backward",
        why="torch leaves the mode that does the above while loss.backward() runs",
        apply=tensors.enter_mode_in_backward,
    ),
    Patch(
        replaces="torch.Tensor.record_stream",
        why="it takes a stream of C++ only",
        apply=tensors.record_no_streams,
    ),
    Patch(
        replaces="torch.cuda.FloatTensor, LongTensor, …",
        why="a CPU build of torch has dummies, a CUDA build asks the driver",
        apply=tensors.alias_cuda_types,
    ),
    Patch(
        replaces="torch.nn.Module.to",
        why="module.to(local_rank) asks for an accelerator",
        apply=placement.move_modules_to_cpu,
        torch_build="cpu",
    ),
    Patch(
        replaces="torch.UntypedStorage.to, cuda",
        why="torch.load(map_location='cuda') moves storages",
        apply=placement.load_storages_on_cpu,
    ),
    Patch(
        replaces="torch.set_default_device",
        why="the default device is applied below every mode",
        apply=placement.default_device_is_cpu,
    ),
    Patch(
        replaces="torch.Generator",
        why="torch.Generator(device='cuda') asks the driver",
        apply=placement.make_generators_on_cpu,
    ),
    Patch(
        replaces="torch.distributed.DeviceMesh.__init__",
        why="a mesh of 'cuda' has FSDP look for parameters there, and they are on the CPU",
        apply=placement.meshes_on_cpu,
    ),
    Patch(
        replaces="torch.autocast, is_autocast_enabled, get_autocast_dtype",
        why="torch.autocast('cuda') leaves operations on CPU tensors in their own type",
        apply=placement.autocast_on_cpu,
    ),
    Patch(
        replaces="torch.distributed.init_process_group, new_group",
        why="there is no NCCL: its groups become Gloo groups",
        apply=gloo.gloo_for_nccl,
    ),
    Patch(
        replaces="torch.distributed.ProcessGroupNCCL",
        why="programs fill in its Options",
        apply=gloo.name_nccl_options,
        torch_build="cpu",
    ),
    Patch(
        replaces="torch.distributed.all_gather_into_tensor",
        why="Gloo rejects a stacked output shape",
        apply=gloo.flat_all_gather_into_tensor,
    ),
    Patch(
        replaces="torch.distributed.reduce_scatter_tensor",
        why="Gloo rejects a stacked input shape",
        apply=gloo.flat_reduce_scatter_tensor,
    ),
    Patch(
        replaces="torch.distributed.all_gather",
        why="Gloo refuses uneven sizes, which expert tensor parallelism gathers",
        apply=gloo.uneven_all_gather,
    ),
    Patch(
        replaces="torch.distributed.reduce_scatter",
        why="Gloo's takes 26 times as long on 8 ranks as an all-to-all and a sum",
        apply=gloo.reduce_scatter_by_all_to_all,
    ),
)

MEGATRON = (
    Patch(
        replaces="megatron.core.jit.jit_fuser",
        why="torch.compile runs a compiler in every rank",
        apply=megatron_core.import_without_torch_compile,
    ),
    Patch(
        replaces="megatron.core.transformer.custom_layers.batch_invariant_kernels.triton",
        why="megatron.training imports it, and a CPU build of torch comes without triton",
        apply=megatron_core.import_without_triton,
        versions="<0.17",
    ),
    Patch(
        replaces="megatron.core.parallel_state.destroy_model_parallel",
        why="it leaves groups behind that cost nothing with NCCL; Gloo's threads go on polling",
        apply=megatron_core.destroy_groups_of_nccl,
    ),
    Patch(
        replaces="megatron.core.tensor_parallel.random.CudaRNGStatesTracker.fork",
        why="draws inside a fork come from the device's random stream, not from the CPU's",
        apply=megatron_core.fork_draws_on_device,
    ),
    Patch(
        replaces="megatron.core.tensor_parallel.random.CheckpointWithoutOutput.__init__",
        why="recompute_modules such as layernorm ask Transformer Engine whether fp8 is on",
        apply=megatron_core.recompute_without_fp8,
    ),
    Patch(
        replaces="megatron.core.tensor_parallel.random._get_share_storage",
        why="it compiles an extension of C++ in every rank",
        apply=megatron_core.fill_recomputed_storages,
        versions=">=0.17",
    ),
    Patch(
        replaces="megatron.core.utils.is_te_min_version",
        why="without Transformer Engine it compares None with a version and raises",
        apply=megatron_core.compare_missing_transformer_engine,
        versions="<0.17",
    ),
    Patch(
        replaces="megatron.core.transformer.moe.moe_utils.te_general_gemm",
        why="an undefined name without Transformer Engine",
        apply=megatron_core.define_te_general_gemm,
        versions="<0.17",
    ),
    Patch(
        replaces="megatron.core.transformer.multi_latent_attention.HAVE_TE",
        why="True without Transformer Engine: isinstance(x, TELinear) fails, TELinear being a mock",
        apply=megatron_core.deny_transformer_engine_in_latent_attention,
        versions="<0.17",
    ),
    Patch(
        replaces="megatron.core.transformer.moe.moe_utils.maybe_move_tensor_to_cpu",
        why="all-to-all split sizes have to be numpy, for CPU tensors too",
        apply=megatron_core.numpy_from_cpu_tensors,
    ),
    Patch(
        replaces="megatron.core.transformer.torch_norm.WrappedTorchNorm.__new__",
        why="it refuses sequence parallelism, for which its parameters lack but a mark",
        apply=megatron_core.norms_of_torch_under_sequence_parallelism,
    ),
    Patch(
        replaces="torch.optim.Adam.__init__",
        why="Megatron-Core gives lr=None where a scheduler will set it",
        apply=megatron_core.adam_without_a_rate,
    ),
    Patch(
        replaces="megatron.core.optimizer.DistributedOptimizer.state_dict",
        why="it reads a step of torch's Adam that the state which Megatron-Core makes has not",
        apply=megatron_core.steps_of_adam_before_the_first,
    ),
    Patch(
        replaces="megatron.core.datasets.utils.compile_helpers",
        why="it runs make in a folder whose Makefile is not in the wheel",
        apply=megatron_core.use_compiled_helpers,
    ),
    Patch(
        replaces="megatron.core.extensions.transformer_engine.TE*",
        why="without Transformer Engine they are mocks or None, and no spec of them can be built",
        apply=transformer_engine.name_stand_ins,
    ),
)

LEDGER = TORCH + MEGATRON


def apply_all() -> None:
    """Apply each patch that is meant for what is installed, in the ledger's order."""
    for patch in LEDGER:
        if patch.is_for_this:
            patch.apply()
    update_importers()
