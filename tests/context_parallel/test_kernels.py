"""The kernel of the CPU and the one made of matrix products are each torch's own attention."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from cp_cases import TOLERANCE
from torch import Tensor

from mcore_lab.backends.context_parallel import blockwise
from mcore_lab.backends.context_parallel.blockwise import BackwardPass, ForwardPass
from mcore_lab.backends.context_parallel.kernels import DENSE, FLASH_ON_CPU, Kernel
from mcore_lab.backends.context_parallel.zigzag import Tile

TOKENS, GROUPS, HEADS = 24, 3, 2


def _inputs(dtype: torch.dtype, value_channels: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(3)
    shapes = (HEADS, 8), (8,), (value_channels,), (HEADS, value_channels)
    return [torch.randn(TOKENS, GROUPS, *s, generator=draw).to(dtype) for s in shapes]


def _by_torch(tensors: list[Tensor], causal: bool) -> tuple[Tensor, ...]:
    """Return output and gradients by `scaled_dot_product_attention`, in float64."""
    *inputs, grad = (x.double() for x in tensors)
    query, key, value = (x.requires_grad_() for x in inputs)
    keys, values = (x.transpose(0, 1).unsqueeze(1) for x in (key, value))
    output = F.scaled_dot_product_attention(
        query.permute(1, 2, 0, 3), keys, values, is_causal=causal, scale=0.3, enable_gqa=True
    ).permute(2, 0, 1, 3)
    return (output.detach(), *torch.autograd.grad(output, (query, key, value), grad))


@pytest.mark.parametrize("value_channels", [8, 5, 11])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kernel", [FLASH_ON_CPU, DENSE], ids=["flash", "dense"])
def test_a_kernel_is_torchs_attention(
    kernel: Kernel, dtype: torch.dtype, causal: bool, value_channels: int
) -> None:
    query, key, value, grad = _inputs(dtype, value_channels)
    output, lse = kernel.forward(query, key, value, causal, 0.3)
    output = output.to(dtype)
    grads = kernel.backward(grad, query, key, value, output, lse, causal, 0.3)
    expected = _by_torch([query, key, value, grad], causal)
    for got, wanted in zip((output, *grads), expected, strict=True):
        error = (got.double() - wanted).abs().max() / wanted.abs().max()
        assert error < TOLERANCE[dtype], error


SMALL = pytest.mark.parametrize(
    "kernel", [kernel._replace(largest_tile=5) for kernel in (FLASH_ON_CPU, DENSE)]
)


@SMALL
def test_keys_that_come_in_parts_add_up_to_all(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "kernel_for", lambda device: kernel)
    query, key, value, grad = _inputs(torch.float64, 8)
    half, whole = TOKENS // 2, slice(0, TOKENS)
    parts = [
        [Tile(whole, slice(0, half), False)],
        [Tile(slice(0, half), slice(half, TOKENS), False)],
        [Tile(slice(half, TOKENS), slice(half, TOKENS), False)],
    ]
    forward = ForwardPass(query, 8, 0.3)
    for tiles in parts:
        forward.see(key, value, tiles)
    backward = BackwardPass(query, forward.output, forward.lse, grad, 0.3)
    shares = [backward.see(key, value, tiles) for tiles in parts]
    of_key, of_value = (sum(share) for share in zip(*shares, strict=True))
    got = forward.output, backward.grad_query, of_key, of_value
    for tensor, wanted in zip(got, _by_torch([query, key, value, grad], False), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-12)


@SMALL
def test_a_causal_tile_cut_into_small_ones_is_still_causal(
    kernel: Kernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(blockwise, "kernel_for", lambda device: kernel)
    query, key, value, grad = _inputs(torch.float64, 8)
    tiles = [Tile(slice(0, TOKENS), slice(0, TOKENS), True)]
    forward = ForwardPass(query, 8, 0.3)
    forward.see(key, value, tiles)
    backward = BackwardPass(query, forward.output, forward.lse, grad, 0.3)
    of_key, of_value = backward.see(key, value, tiles)
    got = forward.output, backward.grad_query, of_key, of_value
    for tensor, wanted in zip(got, _by_torch([query, key, value, grad], True), strict=True):
        torch.testing.assert_close(tensor, wanted, rtol=1e-12, atol=1e-12)
