"""What Megatron-Core itself needs in order to run without a GPU and without Transformer Engine."""

from __future__ import annotations

import contextlib
import copy
import functools
import importlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import MagicMock

import torch
import torch.distributed as dist

from mcore_lab.cpu.random_stream import STREAM
from mcore_lab.cpu.replace import replace

_MODULES = (
    "megatron.core.models.gpt.gpt_model",
    "megatron.core.models.gpt.gpt_layer_specs",
    "megatron.core.models.bert.bert_layer_specs",
    "megatron.core.models.T5.t5_spec",
    "megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs",
    "megatron.core.models.vision.clip_vit_model",
    "megatron.core.distributed",
    "megatron.core.optimizer",
    "megatron.core.optimizer_param_scheduler",
    "megatron.core.pipeline_parallel",
    "megatron.core.dist_checkpointing.strategies.torch",
    "megatron.core.datasets.gpt_dataset",
    "megatron.core.datasets.blended_megatron_dataset_builder",
    "megatron.core.tokenizers.text",
    # What every rank needs of this project's.
    "mcore_lab.backends.torch_backend",
    "mcore_lab.backends.transformer_engine",
    "mcore_lab.cpu.ledger",
    # Every optimizer imports it when it is made.
    "torch._dynamo",
)
_RANDOM = "megatron.core.tensor_parallel.random"
_BATCH_INVARIANT = "megatron.core.transformer.custom_layers.batch_invariant_kernels"
_HELPERS = "megatron.core.datasets.helpers_cpp"
_EXTENSION_SUFFIX = importlib.machinery.EXTENSION_SUFFIXES[0]


def import_without_torch_compile() -> None:
    """Import what a GPT run needs of Megatron-Core, about 2 s, with torch.compile left out.

    Megatron-Core decorates small functions with it when it is imported, and on CPU each of them
    would run a compiler in every rank. A decorated function is bound by the time the switch
    `disable_jit_fuser` can be called, so `torch.compile` hands back what it is given meanwhile.
    """
    compile_ = torch.compile

    def leave_as_it_is(model: Any = None, **kwargs: Any) -> Any:
        return functools.partial(leave_as_it_is, **kwargs) if model is None else model

    torch.compile = leave_as_it_is
    try:
        for name in _MODULES:
            importlib.import_module(name)
        importlib.import_module("megatron.core.jit").disable_jit_fuser()
    finally:
        torch.compile = compile_


def import_without_triton() -> None:
    """`megatron.training` imports kernels that need triton's name, which no CPU build of torch has.

    A mock stands in for it while they are imported, as it does in later versions.
    """
    if _BATCH_INVARIANT in sys.modules or importlib.util.find_spec("triton") is not None:
        return
    triton = MagicMock()
    mocks: dict[str, Any] = {"triton": triton, "triton.language": triton.language}
    sys.modules.update(mocks)
    try:
        importlib.import_module(_BATCH_INVARIANT)
    finally:
        for name in mocks:
            del sys.modules[name]


def destroy_groups_of_nccl() -> None:
    """`destroy_model_parallel` destroys the groups it made for Gloo, and only drops NCCL's.

    Here those are Gloo's too, and each keeps three threads, of which one wakes 100 times a second:
    a program that changes its layout again and again ends with all processors busy doing nothing.
    Groups end when those that came after them are dropped: by then no rank is using them.
    """
    state: Any = importlib.import_module("megatron.core.parallel_state")
    destroy = state.destroy_model_parallel
    dropped: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()

    @functools.wraps(destroy)
    def destroy_model_parallel() -> None:
        groups = [group for group in state._global_process_group_list or () if group is not None]
        destroy()
        if groups:
            for group in dropped & set(dist.distributed_c10d._world.pg_map):
                dist.destroy_process_group(group)
            dropped.clear()
            dropped.update(groups)

    replace(state, "destroy_model_parallel", destroy_model_parallel)


def fork_draws_on_device() -> None:
    """What is drawn inside `get_cuda_rng_tracker().fork()` comes from the device's stream."""
    tracker = importlib.import_module(_RANDOM).CudaRNGStatesTracker
    fork = tracker.fork

    @contextlib.contextmanager
    def fork_on_device(self: Any, *args: Any, **kwargs: Any) -> Iterator[None]:
        with STREAM.drawing(), fork(self, *args, **kwargs):
            yield

    tracker.fork = fork_on_device


def recompute_without_fp8() -> None:
    """`CheckpointWithoutOutput()` takes its default, `fp8=False`, for a wish, and asks for TE."""
    checkpoint = importlib.import_module(_RANDOM).CheckpointWithoutOutput
    init = checkpoint.__init__

    @functools.wraps(init)
    def init_without_fp8(self: Any, fp8: object = None) -> None:
        init(self, fp8=None)

    checkpoint.__init__ = init_without_fp8


def fill_recomputed_storages() -> None:
    """Recomputed outputs are put back with an extension that each rank would compile.

    Copying their bytes does the same, and is what Megatron-Core 0.16 does.
    """

    def fill(output: torch.Tensor, recomputed: torch.Tensor) -> None:
        source = recomputed.untyped_storage()
        output.untyped_storage().resize_(source.size())
        output.untyped_storage().copy_(source)

    replace(importlib.import_module(_RANDOM), "_get_share_storage", lambda: fill)


def compare_missing_transformer_engine() -> None:
    """Without Transformer Engine no minimum version of it is met."""
    utils = importlib.import_module("megatron.core.utils")
    is_min = utils.is_te_min_version

    @functools.wraps(is_min)
    def is_te_min_version(version: str, check_equality: bool = True) -> bool:
        return utils.get_te_version() is not None and is_min(version, check_equality)

    replace(utils, "is_te_min_version", is_te_min_version)


def define_te_general_gemm() -> None:
    """`moe_utils` asks whether `te_general_gemm is None` without having defined it."""
    moe_utils: Any = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


def deny_transformer_engine_in_latent_attention() -> None:
    """`multi_latent_attention` takes the mock of a missing `TELinear` for the real one."""
    attention: Any = importlib.import_module("megatron.core.transformer.multi_latent_attention")
    attention.HAVE_TE = isinstance(attention.TELinear, type)


def norms_of_torch_under_sequence_parallelism() -> None:
    """Without Apex the norm of layer specs is torch's, and refuses sequence parallelism.

    All it needs is the mark by which `finalize_model_grads` knows its parameters. It refuses
    `persist_layer_norm` as well, which chooses one of Apex's kernels for the same norm.
    """
    norm: Any = importlib.import_module("megatron.core.transformer.torch_norm").WrappedTorchNorm
    build = norm.__new__

    @functools.wraps(build)
    def build_marked(cls: type, config: Any, *args: Any, **kwargs: Any) -> torch.nn.Module:
        plain = copy.copy(config)
        plain.sequence_parallel = plain.persist_layer_norm = False
        module: torch.nn.Module = build(cls, plain, *args, **kwargs)
        for parameter in module.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]
        return module

    norm.__new__ = build_marked


def adam_without_a_rate() -> None:
    """Megatron-Core gives None for a rate that a scheduler sets before the first step.

    The Adam of Transformer Engine and of Apex takes it.
    """
    adam = torch.optim.Adam
    init = adam.__init__

    @functools.wraps(init)
    def init_without_rate(
        self: Any, params: Any, lr: Any = 1e-3, *args: Any, **kwargs: Any
    ) -> None:
        init(self, params, 0.0 if lr is None else lr, *args, **kwargs)

    adam.__init__ = init_without_rate  # type: ignore[method-assign]


def steps_of_adam_before_the_first() -> None:
    """Megatron-Core gives Adam its state before the first step, as checkpoints need it.

    It has no `step` then, which Transformer Engine's and Apex's Adam do not keep there; torch's
    does, and the distributed optimizer reads it, as one for all of a rank's weights.
    """
    kind: Any = importlib.import_module("megatron.core.optimizer").DistributedOptimizer
    state_dict = kind.state_dict

    @functools.wraps(state_dict)
    def state_dict_with_steps(self: Any) -> dict[str, Any]:
        adam = getattr(self, "optimizer", None)
        if not isinstance(adam, torch.optim.Adam):
            return state_dict(self)
        for state in adam.state.values():
            state.setdefault("step", torch.tensor(0.0))
        has_none = not adam.state
        if has_none:
            adam.state["of no weight"] = {"step": torch.tensor(0.0)}  # type: ignore[index]
        try:
            return state_dict(self)
        finally:
            if has_none:
                adam.state.clear()

    kind.state_dict = state_dict_with_steps
    load = kind.load_parameter_state_from_fully_reshardable

    @functools.wraps(load)
    def load_without_steps(self: Any, state: dict[str, Any]) -> None:
        adam = getattr(self, "optimizer", None)
        states = list(adam.state.values()) if isinstance(adam, torch.optim.Adam) else []
        # What is loaded has none: they are in what all ranks have alike.
        steps = [(kept, kept.pop("step")) for kept in states if "step" in kept]
        load(self, state)
        for kept, step in steps:
            # Each a count of its own: one that all share would count every weight's updates.
            kept["step"] = step.clone()

    kind.load_parameter_state_from_fully_reshardable = load_without_steps


def numpy_from_cpu_tensors() -> None:
    """`maybe_move_tensor_to_cpu(as_numpy=True)` leaves tensors that are on the CPU as they are."""
    moe_utils = importlib.import_module("megatron.core.transformer.moe.moe_utils")
    move = moe_utils.maybe_move_tensor_to_cpu

    @functools.wraps(move)
    def move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        if as_numpy and torch.is_tensor(tensor):
            return tensor.numpy()
        return tensor

    replace(moe_utils, "maybe_move_tensor_to_cpu", move_tensor_to_cpu)


def use_compiled_helpers() -> None:
    """`compile_helpers()` runs make in a folder whose Makefile is not in the wheel; the helper is.

    A script that runs from a source checkout gets the installed wheel's helper too: make would
    build one for whichever Python comes first on the path.
    """
    utils = importlib.import_module("megatron.core.datasets.utils")
    compile_with_make = utils.compile_helpers
    if importlib.util.find_spec(_HELPERS) is None:
        _load_helpers_from_wheel()

    @functools.wraps(compile_with_make)
    def compile_helpers() -> None:
        if _HELPERS not in sys.modules and importlib.util.find_spec(_HELPERS) is None:
            compile_with_make()

    replace(utils, "compile_helpers", compile_helpers)


def _load_helpers_from_wheel() -> None:
    for file in importlib.metadata.files("megatron-core") or ():
        if file.name.startswith("helpers_cpp.") and file.name.endswith(_EXTENSION_SUFFIX):
            spec = importlib.util.spec_from_file_location(_HELPERS, str(file.locate()))
            if spec and spec.loader:
                sys.modules[_HELPERS] = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(sys.modules[_HELPERS])
