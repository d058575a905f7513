"""How matrices are said to be cut, held against the parameters that Megatron-Core builds."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import pytest
import torch
from fake_ranks import initialize, rank_of_world

from mcore_lab import cpu
from mcore_lab.cli import main
from mcore_lab.cli.arguments import usual_world, vocabulary
from mcore_lab.config import Data, Model, Recipe
from mcore_lab.layout import ParallelLayout
from mcore_lab.layout.matrices import MatrixCut, matrix_cuts
from mcore_lab.recipes import load_recipe, recipe_names, shown_layer
from mcore_lab.report.matrices_svg import matrices_svg
from mcore_lab.runtime import launch

GATED = {"gated_linear_unit": True, "activation_func": "silu", "add_bias_linear": False}
TRAINED = [name for name in recipe_names() if not shown_layer(name)]


def with_fields(name: str, layout: dict[str, Any], model: dict[str, Any], **fields: Any) -> Recipe:
    recipe = load_recipe(name).with_layout(**layout)
    transformer = recipe.model.transformer | fields
    return replace(recipe, model=replace(recipe.model, **model, transformer=transformer))


RECIPES: dict[str, Recipe] = {name: load_recipe(name) for name in TRAINED} | {
    "gated": with_fields("tp2_pp2_gpt", {}, {}, **GATED),
    "grouped queries of other channels": with_fields(
        "tp2_gpt",
        {},
        {"num_query_groups": 2, "num_attention_heads": 8, "ffn_hidden_size": 96},
        kv_channels=24,
    ),
    "more ranks than query groups": with_fields(
        "tp2_gpt",
        {"tensor_model_parallel_size": 4},
        {"num_query_groups": 2, "vocab_size": 128},
    ),
    "norms of queries and keys": with_fields("tp2_gpt", {}, {}, qk_layernorm=True),
    "norms of latents": with_fields("mla_gpt", {}, {}, qk_layernorm=True),
    "latent attention without a latent of queries": with_fields(
        "mla_gpt", {}, {}, q_lora_rank=None
    ),
    "gated experts, one by one, and shared ones": with_fields(
        "etp2_ep2_moe",
        {},
        {},
        **GATED,
        moe_grouped_gemm=False,
        moe_ffn_hidden_size=48,
        moe_shared_expert_intermediate_size=64,
    ),
    "experts in every second layer": with_fields("ep2_moe", {}, {}, moe_layer_freq=2),
}


class Built(NamedTuple):
    """A parameter of one rank, by the name that is drawn; an expert's as one of its own."""

    rank: int
    name: str
    shape: tuple[int, ...]
    partition_dim: int | None
    """None where Megatron-Core says that it is not cut."""


@pytest.fixture(scope="module")
def built() -> dict[str, list[Built]]:
    """What Megatron-Core builds on each rank of each recipe, in one process after the other."""

    def build() -> dict[str, list[Built]]:
        cpu.enable()
        return {name: list(parameters(recipe)) for name, recipe in RECIPES.items()}

    return launch(build, 1, timeout=120)[0]


@pytest.mark.parametrize("name", RECIPES)
def test_each_rank_s_parameters_have_the_shapes_that_are_drawn(
    name: str, built: dict[str, list[Built]]
) -> None:
    recipe, layout = RECIPES[name], RECIPES[name].layout
    assert layout.check(recipe.model, recipe.data, usual_world(recipe)) == []
    longest = layout.padded(recipe.data.sequence_length)
    cuts = {cut.name: cut for cut in matrix_cuts(layout, recipe.model, vocabulary(recipe), longest)}
    for one in built[name]:
        if one.name not in cuts:
            assert one.name.startswith("mtp.") or one.name.endswith("bias"), one
            continue
        cut = cuts[one.name]
        assert one.shape == cut.local_shape, one
        if one.partition_dim is not None and cut.axis is not None:
            assert one.partition_dim == cut.axis, one
    tied = {"output_layer.weight"} if recipe.model.share_embeddings_and_output_weights else set()
    # On a stage of its own the output layer has a copy of the embedding.
    not_built = tied if layout.pp == 1 else set()
    assert cuts.keys() - {one.name for one in built[name]} == not_built


def parameters(recipe: Recipe) -> Iterator[Built]:
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    from mcore_lab.backends import choose_backend
    from mcore_lab.model import gpt_chunk, pipeline_stages, transformer_config

    world_size = usual_world(recipe)
    for rank in range(world_size):
        with rank_of_world(rank, world_size):
            initialize(recipe.layout)
            torch.manual_seed(1)
            model_parallel_cuda_manual_seed(1)
            config = transformer_config(recipe)
            backend = choose_backend("torch", "cpu")
            for stage in pipeline_stages(recipe.layout):
                chunk = gpt_chunk(recipe, config, stage, backend, vocabulary(recipe))
                for name, parameter in chunk.named_parameters():
                    yield drawn(rank, name, parameter)


def drawn(rank: int, name: str, parameter: Any) -> Built:
    name = re.sub(r"^(embedding|decoder)\.", "", name)
    name = re.sub(r"^layers\.\d+\.", "", name)
    name = re.sub(r"experts\.local_experts\.\d+\.", "experts.", name)
    shape = tuple(parameter.shape)
    is_cut = getattr(parameter, "tensor_model_parallel", False)
    # The experts of a grouped layer are one tensor.
    grouped = len(shape) == 3
    axis = parameter.partition_dim - grouped if is_cut else None
    return Built(rank, name, shape[1:] if grouped else shape, axis)


# Which rows and columns.


def cut_of(name: str, layout: ParallelLayout, model: Model) -> MatrixCut:
    return next(cut for cut in matrix_cuts(layout, model, 64, 16) if cut.name.startswith(name))


def test_rows_and_columns_go_to_ranks_in_order() -> None:
    layout = ParallelLayout(tensor_model_parallel_size=4)
    model = Model(hidden_size=16, num_attention_heads=4, ffn_hidden_size=32)
    up, down = (cut_of(f"mlp.linear_fc{n}", layout, model) for n in (1, 2))
    assert (up.shape, up.axis, up.held(1)) == ((32, 16), 0, ((8, 16),))
    assert (down.shape, down.axis, down.held(3)) == ((16, 32), 1, ((24, 32),))


def test_of_a_gated_unit_each_rank_has_the_same_rows_of_both_halves() -> None:
    model = Model(hidden_size=16, ffn_hidden_size=32, transformer=GATED)
    cut = cut_of("mlp.linear_fc1", ParallelLayout(tensor_model_parallel_size=2), model)
    assert cut.held(0) == ((0, 16), (32, 48)) and cut.held(1) == ((16, 32), (48, 64))


def test_latents_are_whole_with_transformer_engine_alone() -> None:
    layout, model = load_recipe("mla_gpt").layout, load_recipe("mla_gpt").model
    for backend, axis in {"te": None, "torch": 0}.items():
        cuts = matrix_cuts(layout, model, 64, 16, backend)
        assert [cut.axis for cut in cuts if "down_proj" in cut.name] == [axis, axis]


def test_experts_are_cut_by_their_own_tensor_size() -> None:
    layout = ParallelLayout(
        tensor_model_parallel_size=2, expert_tensor_parallel_size=1, sequence_parallel=True
    )
    cut = cut_of("mlp.experts.linear_fc1", layout, Model(num_moe_experts=4))
    assert (cut.by, cut.axis, cut.experts) == ("etp", None, 4)


# The picture.


def texts(svg: str) -> list[str]:
    return [node.text or "" for node in ET.fromstring(svg).iter() if node.tag.endswith("text")]


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=list(RECIPES))
def test_the_picture_names_each_matrix_and_stays_within_its_frame(recipe: Recipe) -> None:
    layout, world_size = recipe.layout, usual_world(recipe)
    cuts = matrix_cuts(layout, recipe.model, vocabulary(recipe), recipe.data.sequence_length)
    svg = matrices_svg(recipe.name, layout, cuts, world_size)
    told = " ".join(texts(svg))
    assert all(cut.name.removesuffix(".weight") in told for cut in cuts)
    root = ET.fromstring(svg)
    width, height = (float(root.attrib[side]) for side in ("width", "height"))
    for group in (node for node in root if node.tag.endswith("g")):
        x, y = map(float, group.attrib["transform"][len("translate(") : -1].split())
        for shape in (node for node in group if node.tag.endswith("rect")):
            at = {side: float(shape.attrib[side]) for side in ("x", "y", "width", "height")}
            assert at["x"] + at["width"] <= 296 and x + 296 <= width
            assert at["y"] + at["height"] <= 224 and y + 224 <= height


def test_ranks_draws_the_matrices(tmp_path: Any) -> None:
    file = tmp_path / "matrices.svg"
    assert main(["ranks", "etp2_ep2_moe", "--matrices", str(file)]) == 0
    told = texts(file.read_text())
    assert {
        "mlp.experts.linear_fc1",
        "ep 1: experts 2-3",
        "tp 0: rows 0-63;  tp 1: rows 64-127",
    } <= {*told}


@pytest.mark.parametrize("data", [Data(), Data(mock_vocab_size=200), Data(path="words.txt")])
def test_the_rows_of_an_embedding_that_no_model_sets_are_those_that_are_built(data: Data) -> None:
    from mcore_lab.compat import byte_level_tokenizer, null_tokenizer
    from mcore_lab.model import model_vocab_size

    recipe = Recipe(name="tp2_gpt", data=data, layout=ParallelLayout(tensor_model_parallel_size=3))
    tokenizer = byte_level_tokenizer() if data.path else null_tokenizer(data.mock_vocab_size)
    assert vocabulary(recipe) == model_vocab_size(recipe, tokenizer.vocab_size)
