"""The core attention of layers: Megatron-Core's own on one rank, and what it refuses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from cp_cases import Case, assert_close, context_parallel_ranks
from cp_module import AttnMaskType, core_attention, packed_params
from fake_ranks import parallel_state, rank_of_world
from on_ranks import on_ranks

from mcore_lab.backends.context_parallel import TorchDotProductAttention, zigzag_places
from mcore_lab.errors import LayoutError


def _built(case: Case, cp: int, comm_type: str | None = None, **fields: Any) -> None:
    """Build the attention as a rank of `cp` that talks to no one."""
    hierarchy = fields.pop("hierarchy", None)
    with rank_of_world(0, cp):
        parallel_state.initialize_model_parallel(
            context_parallel_size=cp,
            hierarchical_context_parallel_sizes=hierarchy,
            create_gloo_process_groups=False,
        )
        core_attention(case, cp, comm_type, **fields)


@on_ranks(1)
def test_without_context_parallelism_it_is_megatron_cores_own_bit_for_bit() -> None:
    from megatron.core import tensor_parallel
    from megatron.core.transformer.dot_product_attention import DotProductAttention

    with context_parallel_ranks(1):
        case = Case(heads=8, groups=2, batch=2)
        ours = core_attention(case, 1, attention_dropout=0.1)
        theirs = DotProductAttention(ours.config, 3, AttnMaskType.causal, "self")
        assert ours.state_dict().keys() == theirs.state_dict().keys()
        results = []
        for attention in (ours, theirs):
            tensor_parallel.model_parallel_cuda_manual_seed(5)
            inputs = [x.requires_grad_() for x in case.inputs()[:3]]
            output = attention(*inputs, None, attn_mask_type=AttnMaskType.causal)
            results.append((output, *torch.autograd.grad(output.square().sum(), inputs)))
        assert all(a.equal(b) for a, b in zip(*results, strict=True))


@on_ranks(1)
def test_one_rank_takes_values_of_another_width() -> None:
    with context_parallel_ranks(1):
        case = Case(channels=12, value_channels=8)
        output = core_attention(case, 1)(*case.inputs()[:3], None)
        assert_close("output", output, case.expected()[0].flatten(2))


@pytest.mark.parametrize("comm_type", [None, "p2p", "all_gather", "a2a", "a2a+p2p"])
@on_ranks(4)
def test_four_ranks_take_values_of_another_width_and_the_mask_of_megatrons_datasets(
    comm_type: str | None,
) -> None:
    case = Case(stored=(64,), batch=2, heads=8, channels=12, value_channels=8)
    with context_parallel_ranks(4, hierarchy=[2, 2]):
        places = zigzag_places(case.stored, dist.get_rank(), 4)
        mask = torch.ones(64, 64).tril()[None, None] < 0.5
        inputs = [x[places] for x in case.inputs()[:3]]
        attention = core_attention(case, 4, comm_type, apply_query_key_layer_scaling=True)
        output = attention(*inputs, mask[:, :, places], attn_mask_type=AttnMaskType.causal)
        assert_close("output", output, case.expected()[0][places].flatten(2))


@on_ranks(2)
def test_a_mask_that_hides_more_than_the_future_is_refused() -> None:
    case = Case()
    with context_parallel_ranks(2):
        attention = core_attention(case, 2)
        places = zigzag_places(case.stored, dist.get_rank(), 2)
        inputs = [x[places] for x in case.inputs()[:3]]
        mask = torch.ones(32, 32).tril()[None, None, places] < 0.5
        mask[..., 0] = True
        for wrong in (mask, mask[..., :16], torch.ones(1, 1, 32, 32, dtype=torch.bool).triu(1)):
            with pytest.raises(LayoutError, match="not the causal one, of 16 queries and 32 keys"):
                attention(*inputs, wrong)
        with pytest.raises(LayoutError, match="more than none"):
            attention(*inputs, mask, attn_mask_type=AttnMaskType.padding)
        with pytest.raises(LayoutError, match="not arbitrary"):
            attention(*inputs, None, attn_mask_type=AttnMaskType.arbitrary)
        with pytest.raises(LayoutError, match="attention_bias=None"):
            attention(*inputs, None, attention_bias=torch.zeros(1))
        with pytest.raises(LayoutError, match="16 queries and 8 keys"):
            attention(inputs[0], inputs[1][:8], inputs[2][:8], None)
        with pytest.raises(LayoutError, match=r"lengths \[30\] do not allow"):
            attention(*(x[:15] for x in inputs), None)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"attention_dropout": 0.1}, "context parallelism .* attention_dropout=0.0"),
        ({"window_size": (4, 0)}, "window_size=None"),
        ({"log_max_attention_logit": True}, "log_max_attention_logit=False"),
        ({"attention_dropout": 0.1, "window_size": (4, 0)}, "dropout=0.0, window_size=None"),
        ({"comm_type": "ring"}, "'ring' is none of p2p, all_gather, a2a, a2a"),
        ({"comm_type": "allgather"}, "did you mean all_gather"),
        ({"comm_type": "a2a+p2p"}, "needs 2 process groups and got 0"),
        ({"comm_type": "a2a+p2p", "hierarchy": [2, 2, 1]}, "needs 2 process groups and got 3"),
        ({"comm_type": "a2a", "heads": 6, "groups": 6}, r"6 attention heads .* \[1, 2, 3, 6\]"),
        ({"comm_type": "a2a", "heads": 12, "groups": 3}, r"3 query groups .* \[1, 3, 6, 12\]"),
    ],
)
def test_what_four_ranks_cannot_do_is_refused_when_the_layer_is_built(
    fields: dict[str, Any], words: str
) -> None:
    heads, groups = fields.pop("heads", 4), fields.pop("groups", 4)
    with pytest.raises(LayoutError, match=words):
        _built(Case(heads=heads, groups=groups), 4, **fields)


@on_ranks(2)
def test_a_softmax_with_an_offset_is_refused() -> None:
    with (
        context_parallel_ranks(2),
        pytest.raises(LayoutError, match=r"parallelism .* softmax_type='vanilla'"),
    ):
        core_attention(Case(), 2, softmax_type="off-by-one")


@pytest.mark.parametrize("comm_type", ["p2p", "all_gather", "a2a", "a2a+p2p"])
def test_what_four_ranks_can_do_is_built(comm_type: str) -> None:
    _built(Case(heads=12, groups=2), 4, comm_type, hierarchy=[2, 2])


@on_ranks(1)
def test_packed_sequences_on_one_rank_refuse_dropout_in_training_only() -> None:
    case = Case(stored=(3, 5))
    with context_parallel_ranks(1):
        attention = core_attention(case, 1, attention_dropout=0.1)
        inputs = [x.squeeze(1) for x in case.inputs()[:3]]
        with pytest.raises(LayoutError, match=r"packed sequences .* attention_dropout=0\.0"):
            attention(*inputs, None, packed_seq_params=packed_params(case))
        output = attention.eval()(*inputs, None, packed_seq_params=packed_params(case))
        assert_close("output", output, case.expected()[0].flatten(1))
        with pytest.raises(LayoutError, match="attention_mask=None"):
            attention(*inputs, torch.zeros(1), packed_seq_params=packed_params(case))


def test_it_takes_every_argument_that_either_of_megatron_cores_attentions_takes() -> None:
    import ast
    import inspect

    from mcore_lab.compat import megatron_core_folder

    def arguments(function: ast.FunctionDef) -> list[str]:
        return [argument.arg for argument in function.args.args]

    def methods(file: str, name: str) -> dict[str, list[str]]:
        tree = ast.parse((megatron_core_folder() / file).read_text(encoding="utf-8"))
        [found] = [n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and n.name == name]
        return {f.name: arguments(f) for f in found.body if isinstance(f, ast.FunctionDef)}

    for file, name in (
        ("transformer/dot_product_attention.py", "DotProductAttention"),
        ("extensions/transformer_engine.py", "TEDotProductAttention"),
    ):
        theirs = methods(file, name)
        for method in ("__init__", "forward"):
            ours = inspect.signature(getattr(TorchDotProductAttention, method)).parameters
            assert set(theirs[method]) <= set(ours), (name, method)
