"""What each rank holds, held against what Megatron-Core builds and slices."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import initialize, rank_of_world

from mcore_lab.cli import main
from mcore_lab.compat import slice_for_context_parallel_rank
from mcore_lab.config import Data, Model
from mcore_lab.layout import ParallelLayout, RankShare, rank_shares

NO_DROPOUT = Model(transformer={"attention_dropout": 0.0})


def shares(layout: ParallelLayout, model: Model, world_size: int, **data: Any) -> list[RankShare]:
    data = {"micro_batch_size": 1, "global_batch_size": 16, **data}
    assert layout.check(model, Data(**data), world_size) == []
    return rank_shares(layout, model, Data(**data), world_size)


PIPELINES = {
    "one stage": (1, 1, 4, {}),
    "even": (4, 1, 8, {}),
    "interleaved": (2, 3, 12, {}),
    "uneven first": (4, 1, 11, {"num_layers_in_first_pipeline_stage": 2}),
    "uneven last": (4, 1, 11, {"num_layers_in_last_pipeline_stage": 2}),
    "uneven ends": (
        4,
        1,
        9,
        {"num_layers_in_first_pipeline_stage": 1, "num_layers_in_last_pipeline_stage": 2},
    ),
    "uneven ends of two": (
        2,
        1,
        5,
        {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 3},
    ),
    "interleaved uneven ends": (
        4,
        2,
        14,
        {"num_layers_in_first_pipeline_stage": 2, "num_layers_in_last_pipeline_stage": 4},
    ),
    "embedding and loss counted": (
        2,
        2,
        6,
        {
            "account_for_embedding_in_pipeline_split": True,
            "account_for_loss_in_pipeline_split": True,
        },
    ),
    "written out": (2, 2, 5, {"pipeline_model_parallel_layout": "Et|tt|t|tL"}),
}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_layers_of_each_rank_are_those_that_megatron_builds(name: str):
    from megatron.core.transformer.enums import LayerType
    from megatron.core.transformer.transformer_block import get_num_layers_to_build
    from megatron.core.transformer.transformer_config import TransformerConfig
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    pp, vpp, num_layers, fields = PIPELINES[name]
    layout = ParallelLayout(pipeline_model_parallel_size=pp).resized(vpp=vpp)
    model = Model(num_layers=num_layers, hidden_size=32, transformer=fields)
    for share in shares(layout, model, pp):
        with rank_of_world(share.rank, pp):
            initialize(layout)
            config = TransformerConfig(
                num_layers=num_layers,
                hidden_size=32,
                num_attention_heads=4,
                pipeline_dtype=torch.float32,
                **layout.transformer_fields(),
                **fields,
            )
            for chunk, (first, end) in enumerate(share.layers):
                stage = chunk if vpp > 1 else None
                written = config.pipeline_model_parallel_layout
                if written:
                    built = written.get_layer_id_list(LayerType.decoder, vp_stage=stage)
                else:
                    offset = get_transformer_layer_offset(config, vp_stage=stage)
                    count = get_num_layers_to_build(config, vp_stage=stage)
                    built = list(range(offset, offset + count))
                assert list(range(first, end)) == built


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("cp", [1, 2, 4])
def test_the_tokens_of_each_rank_are_those_that_megatron_slices(cp: int, tp: int):
    layout = ParallelLayout(context_parallel_size=cp, tensor_model_parallel_size=tp)
    for share in shares(layout, NO_DROPOUT, cp * tp, sequence_length=32):
        with rank_of_world(share.rank, cp * tp):
            initialize(layout)
            sliced = slice_for_context_parallel_rank({"tokens": torch.arange(32).view(1, 32)})
        held = [token for first, end in share.sequence for token in range(first, end)]
        assert sliced["tokens"].flatten().tolist() == held


@pytest.mark.parametrize("length", [13, 15, 16])
def test_the_tokens_of_each_rank_leave_padding_out(length: int):
    layout = ParallelLayout(context_parallel_size=4)
    held = [
        token
        for share in shares(layout, NO_DROPOUT, 4, sequence_length=length)
        for first, end in share.sequence
        for token in range(first, end)
    ]
    assert sorted(held) == list(range(length))


def test_each_expert_is_held_by_one_rank_of_each_expert_group():
    layout = ParallelLayout(
        tensor_model_parallel_size=2,
        expert_model_parallel_size=2,
        expert_tensor_parallel_size=1,
        sequence_parallel=True,
    )
    model = Model(num_moe_experts=6, transformer={"add_bias_linear": False})
    held = {share.rank: share.experts for share in shares(layout, model, 4)}
    for group in layout.groups("ep", 4):
        assert sorted(held[rank] or () for rank in group) == [(0, 3), (3, 6)]


def test_a_dense_model_has_no_experts_to_show():
    assert shares(ParallelLayout(), Model(), 1)[0].experts is None


def test_ranks_as_json_has_each_rank_and_each_group(capsys: pytest.CaptureFixture[str]):
    assert main(["ranks", "tp2_gpt", "--nproc", "4", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [rank["coordinates"]["tp"] for rank in printed["ranks"]] == [0, 1, 0, 1]
    assert printed["ranks"][3]["layers"] == [[0, 10]]
    assert printed["groups"]["tp"] == [[0, 1], [2, 3]]
    assert printed["groups"]["dp"] == [[0, 2], [1, 3]]


def test_the_picture_has_a_box_for_each_rank(tmp_path: Path):
    picture = tmp_path / "ranks.svg"
    assert main(["ranks", "tp2_gpt", "--nproc", "4", "--pp", "2", "--svg", str(picture)]) == 0
    texts = [node.text for node in ET.parse(picture).iter() if node.tag.endswith("text")]
    assert [f"rank {n}" in texts for n in range(4)] == [True] * 4
    assert "layers 5-9" in texts


def test_a_picture_that_cannot_be_written_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["ranks", "tp2_gpt", "--svg", str(tmp_path / "no" / "ranks.svg")]) == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_layout_that_does_not_fit_has_no_map(capsys: pytest.CaptureFixture[str]):
    assert main(["ranks", "tp2_gpt", "--nproc", "3"]) == 2
    assert "world size must be a multiple of" in capsys.readouterr().err
