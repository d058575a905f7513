"""Multi-latent attention and multi-token prediction train on every layout as on one rank.

Not compared is multi-token prediction over pipeline stages with learned positions or with tied
embeddings: Megatron-Core has the embedding on the last stage too then, trains its positions apart,
and cannot write or read a checkpoint of either.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_ranks import on_ranks
from one_rank import LOSS, OneRank
from small_runs import SMALL, changed, grad_norms, losses, run

from mcore_lab.config import Recipe

MLA = {
    "multi_latent_attention": True,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4,
    "v_head_dim": 12,
    # With it the attention scores are large enough from the start for their gradients to tell.
    "qk_layernorm": True,
}
MTP = {"mtp_num_layers": 1}
EXPERTS = {
    "add_bias_linear": False,
    "moe_ffn_hidden_size": 48,
    "moe_layer_freq": [0, 1],
    "moe_router_load_balancing_type": "seq_aux_loss",
    "moe_aux_loss_coeff": 0.1,
    "moe_shared_expert_intermediate_size": 32,
    "moe_grouped_gemm": True,
    "moe_token_dispatcher_type": "alltoall",
}


def _recipe(shape: dict[str, Any] | None = None, **transformer: Any) -> Recipe:
    model = {
        "num_layers": 2,
        "position_embedding_type": "rope",
        "transformer": SMALL.model.transformer | transformer,
    }
    return changed(SMALL, model=model | (shape or {}), training={"steps": 3})


@pytest.fixture(scope="module")
def mla(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(_recipe(**MLA), tmp_path_factory.mktemp("mla"))


@pytest.fixture(scope="module")
def mtp(tmp_path_factory: pytest.TempPathFactory) -> OneRank:
    return OneRank(_recipe(**MTP), tmp_path_factory.mktemp("mtp"))


def _mtp_losses(metrics: list[dict[str, Any]]) -> list[float]:
    return [line["mtp_loss"] for line in metrics]


@pytest.mark.parametrize("layout", ["2 ranks: tp2", "2 ranks: tp2 sp", "2 ranks: pp2"])
def test_latent_attention_trains_as_on_one_rank(mla: OneRank, tmp_path: Path, layout: str) -> None:
    assert losses(mla.metrics)[-1] < losses(mla.metrics)[0] - 0.1
    assert mla.agrees_with(mla.on(layout, tmp_path))


@pytest.mark.parametrize("rope_type", ["rope", "yarn"])
def test_queries_without_latents_train_as_on_one_rank(tmp_path: Path, rope_type: str) -> None:
    fields = MLA | {"q_lora_rank": None, "qk_layernorm": False, "rope_type": rope_type}
    one_rank = OneRank(_recipe(**fields), tmp_path)
    assert one_rank.agrees_with(one_rank.on("2 ranks: tp2", tmp_path))


@pytest.mark.parametrize("layout", ["2 ranks: tp2 sp", "2 ranks: pp2", "2 ranks:"])
def test_multi_token_prediction_trains_as_on_one_rank(
    mtp: OneRank, tmp_path: Path, layout: str
) -> None:
    metrics = mtp.on(layout, tmp_path)
    assert mtp.agrees_with(metrics)
    assert _mtp_losses(metrics) == pytest.approx(_mtp_losses(mtp.metrics), rel=LOSS)


def test_two_predictions_over_interleaved_stages_train_as_on_one_rank(tmp_path: Path) -> None:
    one_rank = OneRank(_recipe({"num_layers": 4}, mtp_num_layers=2), tmp_path)
    assert one_rank.agrees_with(one_rank.on("2 ranks: pp2 vpp2", tmp_path))


def test_predictions_with_tied_embeddings_train_as_on_one_rank(tmp_path: Path) -> None:
    one_rank = OneRank(_recipe({"share_embeddings_and_output_weights": True}, **MTP), tmp_path)
    assert one_rank.agrees_with(one_rank.on("2 ranks: tp2 sp", tmp_path))


def test_latent_attention_experts_and_multi_token_prediction_together(tmp_path: Path) -> None:
    one_rank = OneRank(_recipe({"num_moe_experts": 4}, **MLA, **MTP, **EXPERTS), tmp_path)
    assert one_rank.agrees_with(one_rank.on("4 ranks: tp2 sp pp2 ep2 etp1", tmp_path))


def test_the_loss_of_multi_token_prediction_is_reported_and_falls(mtp: OneRank) -> None:
    first, *_, last = _mtp_losses(mtp.metrics)
    # Both start at the same chance of 128 tokens; Adam has then seen the nearer token's more.
    assert first == pytest.approx(losses(mtp.metrics)[0], rel=0.05)
    assert last < first - 0.05


def test_every_token_of_multi_token_prediction_weighs_the_same_in_any_micro_batch(
    mtp: OneRank, tmp_path: Path
) -> None:
    for size in (1, 4):
        metrics = run(changed(mtp.recipe, data={"micro_batch_size": size}), 1, tmp_path / str(size))
        assert mtp.agrees_with(metrics)
        assert _mtp_losses(metrics) == pytest.approx(_mtp_losses(mtp.metrics), rel=LOSS)


def test_its_gradient_weighs_as_much_as_its_scaling_factor_says(
    mtp: OneRank, tmp_path: Path
) -> None:
    """The gradient is linear in the factor: so is its norm, once it outweighs all else.

    Before 0.17 Megatron-Core divides it by the tokens of the main loss, one more a sequence.
    """
    steps = {"steps": 1}
    norms = [
        grad_norms(run(changed(mtp.recipe, model=fields, training=steps), 1, tmp_path / str(i)))[0]
        for i, factor in enumerate((1e3, 2e3))
        for fields in [
            {"transformer": mtp.recipe.model.transformer | {"mtp_loss_scaling_factor": factor}}
        ]
    ]
    assert norms[1] - norms[0] == pytest.approx(norms[0], rel=1e-2)
    # 1000 times the gradient of a mean of losses, that of one of which is of the order of 1.
    assert 1e2 < norms[0] < 1e4


@on_ranks(1)
def test_masked_tokens_have_no_part_in_it() -> None:
    from megatron.core import parallel_state, tensor_parallel
    from megatron.core.models.gpt.gpt_model import GPTModel

    from mcore_lab.backends import choose_backend, decoder_block_spec, mtp_block_spec
    from mcore_lab.model import gpt_arguments, transformer_config
    from mcore_lab.training.forward import forward_step, mean_mtp_loss

    torch.distributed.init_process_group("nccl")
    parallel_state.initialize_model_parallel()
    tensor_parallel.model_parallel_cuda_manual_seed(1)
    recipe = _recipe(**MTP)
    config, backend = transformer_config(recipe), choose_backend("torch", "cpu")
    model = GPTModel(
        config,
        decoder_block_spec(config, backend),
        **gpt_arguments(recipe, 64),
        mtp_block_spec=mtp_block_spec(config, backend),
    )
    tokens = torch.randint(64, (2, 16), generator=torch.Generator().manual_seed(3))
    mask = torch.ones(2, 16)
    mask[:, 5:9] = 0
    found = []
    for change in (0, 7):
        labels = (tokens + change * (mask == 0)) % 64
        batch = {"tokens": tokens, "position_ids": torch.arange(16).expand(2, 16)}
        batch |= {"labels": labels.long(), "loss_mask": mask}
        forward_step(iter([batch]), model)
        found.append(mean_mtp_loss(config, num_microbatches=1))
    assert found[0] == found[1]
    forward_step(iter([batch | {"loss_mask": torch.ones(2, 16)}]), model)
    assert mean_mtp_loss(config, num_microbatches=1) != pytest.approx(found[0], rel=1e-5)


def test_a_model_without_it_reports_none(mla: OneRank) -> None:
    assert _mtp_losses(mla.metrics) == [None] * 3
