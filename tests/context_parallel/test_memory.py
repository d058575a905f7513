"""What a rank holds: of other ranks' keys and values, of scores, and of a long sequence in all."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import pytest
import torch
from cp_cases import Case, context_parallel_ranks
from cp_module import packed_params
from on_ranks import on_ranks
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from mcore_lab.backends.context_parallel import blockwise, context_parallel_attention
from mcore_lab.runtime import launch

COMM_TYPES = ["p2p", "all_gather", "a2a", "a2a+p2p"]
HEADS, CHANNELS = 4, 64


class Received(TorchDispatchMode):
    """Counts the tensors that came from other ranks and are still alive: messages."""

    def __init__(self) -> None:
        super().__init__()
        self._received: list[StorageWeakRef] = []
        self.most = 0
        self.times = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func is torch.ops.c10d.recv_.default:
            self._received += [StorageWeakRef(tensor.untyped_storage()) for tensor in args[0]]
            self.times += 1
        self.most = max(self.most, sum(not ref.expired() for ref in self._received))
        return func(*args, **(kwargs or {}))


@on_ranks(4)
def test_the_ring_never_holds_more_than_two_blocks_of_other_ranks() -> None:
    with context_parallel_ranks(4) as groups:
        inputs = [
            torch.randn(8, 2, 4, 8, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        ]
        with Received() as forward:
            output = context_parallel_attention(*inputs, groups=groups)
        # Three blocks came, a message each, two of them there at a time: one on its way while the
        # one before was computed with.
        assert forward.times == 3
        assert forward.most == 2
        with Received() as backward:
            output.sum().backward()
        # The gradients of a block travel beside the next, and those of the last alone.
        assert backward.times == 3 + 2
        assert backward.most == 2


@on_ranks(2)
def test_long_blocks_travel_a_few_query_groups_at_a_time() -> None:
    with context_parallel_ranks(2) as groups:
        blockwise._BYTES_AT_A_TIME = 2 * (8 * 16 * 4)  # K and V of one query group.
        inputs = [torch.randn(8, 3, 4, 16) for _ in range(3)]
        with Received() as forward:
            context_parallel_attention(*inputs, groups=groups)
        assert forward.times == 3 * 4
        assert forward.most == 1


def peak_of_layer(tokens: int, cp: int, comm_type: str) -> int:
    """Return by how many bytes a rank's memory grows at most in one step of an attention layer.

    One rank has its sequence as a packed one of one document, which is attended to block by block
    as well: all scores at once would be 4 GiB a head for 32,768 tokens.
    """
    torch.set_num_threads(1)
    hierarchy = [2, cp // 2] if comm_type == "a2a+p2p" else None
    with context_parallel_ranks(cp, hierarchy=hierarchy):
        layer = _self_attention(cp, comm_type)

        def step(tokens: int) -> None:
            packed = packed_params(Case(stored=(tokens,))) if cp == 1 else None
            hidden = torch.randn(tokens // cp, 1, HEADS * CHANNELS, requires_grad=True)
            output, _ = layer(hidden, None, packed_seq_params=packed)
            output.sum().backward()

        _return_what_is_freed()
        # The first step loads code and makes connections, which stay.
        step(64)
        Path("/proc/self/clear_refs").write_text("5")
        before = _status("VmRSS")
        step(tokens)
        return _status("VmHWM") - before


def _self_attention(cp: int, comm_type: str) -> torch.nn.Module:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from mcore_lab.backends.context_parallel import TorchDotProductAttention

    config = TransformerConfig(
        num_layers=1,
        hidden_size=HEADS * CHANNELS,
        num_attention_heads=HEADS,
        context_parallel_size=cp,
        attention_dropout=0.0,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
    )
    modules = SelfAttentionSubmodules(
        linear_qkv=ColumnParallelLinear,
        core_attention=TorchDotProductAttention,
        linear_proj=RowParallelLinear,
    )
    return SelfAttention(
        config, modules, 1, attn_mask_type=AttnMaskType.causal, cp_comm_type=comm_type
    )


def _return_what_is_freed() -> None:
    """Have glibc give a tensor's pages back when it is freed, so that a peak is what was in use.

    Else it takes the size of the largest that was freed for what it may keep.
    """
    mmap_threshold = -3
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 2**18)
    # What the process that forked this one had freed would be taken first, and not be seen.
    libc.malloc_trim(0)


def _status(name: str) -> int:
    """Return a number of bytes that Linux tells of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    [line] = [line for line in lines if line.startswith(f"{name}:")]
    return int(line.split()[1]) * 1024


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather"])
def test_memory_grows_with_the_sequence_and_not_with_its_square(comm_type: str) -> None:
    short, long = (
        max(launch(peak_of_layer, 2, tokens, 2, comm_type, timeout=120)) for tokens in (2048, 8192)
    )
    assert long < 5 * short
    assert long < 4096 * 8192 * 4, "there was room for all of a rank's scores, if of one head"


@pytest.mark.slow
def test_four_ranks_hold_two_fifths_of_one_ranks_memory_at_32768_tokens() -> None:
    [of_one] = launch(peak_of_layer, 1, 32768, 1, "p2p", timeout=400)
    for comm_type in COMM_TYPES:
        of_four = max(launch(peak_of_layer, 4, 32768, 4, comm_type, timeout=400))
        assert of_four < 0.4 * of_one, f"{comm_type}: {of_four / of_one:.3f}"
