"""Checkpoints of Megatron-Core's Transformer Engine specs: keys, shards, other ranks, experts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from te_gpt import EP2, TP2, Model, sequential_name

from mcore_lab.runtime import launch


def weights(model: Model) -> dict[str, torch.Tensor]:
    """Return this rank's initial weights, which are those of the whole on any layout."""
    with model.ranks() as gpt:
        return _weights(gpt)


def save(model: Model, folder: Path, apart: bool = False) -> dict[str, torch.Tensor]:
    """Save; with `apart` each expert, and each half of its gate, has a name of its own."""
    from megatron.core import dist_checkpointing

    with model.ranks() as gpt:
        dist_checkpointing.save(gpt.sharded_state_dict(metadata=_metadata(apart)), str(folder))
        return _weights(gpt)


def load(model: Model, folder: Path, apart: bool = False) -> dict[str, torch.Tensor]:
    """Load into a GPT of other weights; any name that only one side has is an error."""
    from megatron.core import dist_checkpointing

    with model.ranks():
        gpt = model.build(seed=12)
        sharded = gpt.sharded_state_dict(metadata=_metadata(apart))
        gpt.load_state_dict(dist_checkpointing.load(sharded, str(folder), strict="raise_all"))
        return _weights(gpt)


def _weights(gpt: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in gpt.named_parameters()}


def _metadata(apart: bool = False) -> dict[str, Any]:
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return {"dp_cp_group": group, "singleton_local_shards": apart}


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [("dense", TP2), ("latent", TP2), ("grouped", TP2), ("grouped", EP2)],
    ids=["dense tp2", "latent tp2", "grouped tp2", "grouped ep2"],
)
def test_a_checkpoint_of_two_ranks_loads_on_one(
    kind: str, sizes: dict[str, Any], tmp_path: Path
) -> None:
    launch(save, 2, Model(kind=kind, sizes=sizes), tmp_path, timeout=60)
    [loaded] = launch(load, 1, Model(kind=kind), tmp_path, timeout=60)
    [expected] = launch(weights, 1, Model(kind=kind), timeout=60)
    assert loaded.keys() == expected.keys()
    for name, tensor in loaded.items():
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.parametrize("apart", [False, True], ids=["one tensor", "apart"])
def test_grouped_experts_read_the_checkpoint_of_sequential_ones(
    apart: bool, tmp_path: Path
) -> None:
    [saved] = launch(save, 1, Model(kind="experts"), tmp_path, apart, timeout=60)
    loaded = launch(load, 2, Model(kind="grouped", sizes=EP2), tmp_path, apart, timeout=60)
    for rank, of_rank in enumerate(loaded):
        for name, tensor in of_rank.items():
            assert torch.equal(tensor, saved[sequential_name(name, first=2 * rank)]), name


@on_ranks(1)
def test_checkpoints_have_extra_states_where_transformer_engine_has_them() -> None:
    with Model(kind="grouped").ranks() as gpt:
        state = gpt.decoder.layers[1].sharded_state_dict(metadata=_metadata())
        assert sorted(name for name in state if "_extra_state" in name) == sorted(
            [
                "self_attention.linear_proj._extra_state",
                "self_attention.linear_qkv._extra_state",
                "pre_mlp_layernorm._extra_state",
                "mlp.shared_experts.linear_fc1._extra_state",
                "mlp.shared_experts.linear_fc2._extra_state",
                *(
                    f"mlp.experts.{fc}._extra_state{e or ''}"
                    for fc in ("linear_fc1", "linear_fc2")
                    for e in range(4)
                ),
            ]
        )
        assert "final_layernorm._extra_state" in gpt.decoder.state_dict()


@on_ranks(2)
def test_a_fused_norm_is_a_replica_on_every_tensor_parallel_rank() -> None:
    with Model(sizes=TP2).ranks() as gpt:
        rank = torch.distributed.get_rank()
        fc1 = gpt.decoder.layers[0].mlp.linear_fc1
        state = fc1.sharded_state_dict(metadata=_metadata())
        norm, weight = state["layer_norm_weight"], state["weight"]
        assert norm.global_shape == (32,) and norm.replica_id == (0, rank, 0)
        assert weight.global_shape == (128, 32) and weight.replica_id == (0, 0, 0)
        assert fc1.layer_norm_weight.sequence_parallel and not hasattr(
            fc1.weight, "sequence_parallel"
        )
