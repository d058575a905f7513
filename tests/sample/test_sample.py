"""A checkpoint is sampled from on any layout: the tokens are those of one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from one_rank import layout_of
from small_runs import SMALL, changed, run

from mcore_lab import cli
from mcore_lab.checkpoint.folders import require_checkpoint
from mcore_lab.config import Recipe
from mcore_lab.errors import CheckpointError, ConfigError, LayoutError
from mcore_lab.layout import ParallelLayout
from mcore_lab.recipes.carried import recipe_in
from mcore_lab.sample.choice import Choice
from mcore_lab.sample.run import Sample, sample, to_sample

ALPHABET = "abcdefghijklm\n"
EXPERTS = {
    "add_bias_linear": False,
    "moe_router_topk": 2,
    "moe_router_load_balancing_type": "none",
    "moe_token_dispatcher_type": "alltoall",
}
LEARNT = changed(SMALL, training={"steps": 40, "lr": 2e-2})
MIXTURE = changed(
    SMALL,
    model={"num_moe_experts": 4, "transformer": SMALL.model.transformer | EXPERTS},
    training={"steps": 2, "lr": 1e-2},
)
PROMPTS = [list(b"abcd"), list(b"\nab"), [3]]
GREEDY, DRAWN = Choice(temperature=0), Choice(temperature=3, top_k=50, top_p=0.95, seed=7)
LONGER_THAN_THE_CONTEXT = 24


@pytest.fixture(scope="module")
def alphabet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt the order of letters, on one rank."""
    folder = tmp_path_factory.mktemp("alphabet")
    (folder / "letters.txt").write_text(ALPHABET * 200)
    data = {"path": str(folder / "letters.txt"), "split": "100,0,0", "cache_dir": str(folder)}
    run(changed(LEARNT, data=data, model={"vocab_size": None}), 1, folder / "run")
    return folder / "run"


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a mixture of experts on mock data."""
    folder = tmp_path_factory.mktemp("experts")
    run(MIXTURE, 1, folder)
    return folder


def sampled(folder: Path, layout: str, choice: Choice) -> list[Sample]:
    checkpoint = require_checkpoint(folder)
    nproc, sizes = layout_of(layout)
    recipe: Recipe = to_sample(recipe_in(checkpoint), checkpoint, ParallelLayout(**sizes), nproc)
    prompts = [[token % 64 for token in prompt] for prompt in PROMPTS]
    if recipe.data.path:
        prompts = PROMPTS
    return sample(
        checkpoint,
        recipe,
        nproc,
        prompts,
        max_new_tokens=LONGER_THAN_THE_CONTEXT,
        choice=choice,
        timeout=120,
    )


def test_it_goes_on_with_what_it_has_learnt(alphabet: Path) -> None:
    """Beyond its context, too, of which it then sees the end."""
    first = sampled(alphabet, "1 ranks:", GREEDY)[0]
    assert bytes(first.tokens).decode() == (ALPHABET * 3)[4 : 4 + LONGER_THAN_THE_CONTEXT]
    assert first.ended == "length"


@pytest.fixture(scope="module")
def one_rank(alphabet: Path, experts: Path) -> dict[str, list[Sample]]:
    return {
        "alphabet, most probable": sampled(alphabet, "1 ranks:", GREEDY),
        "alphabet, drawn": sampled(alphabet, "1 ranks:", DRAWN),
        "experts, most probable": sampled(experts, "1 ranks:", GREEDY),
        "experts, drawn": sampled(experts, "1 ranks:", DRAWN),
    }


@pytest.mark.parametrize(
    ("what", "layout"),
    [
        ("alphabet, most probable", "4 ranks: tp2 pp2"),
        ("alphabet, most probable", "2 ranks: pp2"),
        ("alphabet, drawn", "2 ranks: tp2 sp"),
        ("alphabet, drawn", "4 ranks: cp2 pp2 vpp2"),
        ("experts, most probable", "2 ranks: ep2"),
        ("experts, drawn", "4 ranks: tp2 sp ep2 etp2"),
        *[
            pytest.param(f"{run}, {how}", layout.format(tp), marks=pytest.mark.slow)
            # Experts over tensor-parallel ranks take sequence parallelism.
            for run, tp in (("alphabet", "tp2"), ("experts", "tp2 sp"))
            for how in ("most probable", "drawn")
            for layout in ("2 ranks: {}", "2 ranks: pp2", "4 ranks: {} pp2", "2 ranks:")
        ],
    ],
)
def test_a_layouts_tokens_are_those_of_one_rank(
    what: str, layout: str, alphabet: Path, experts: Path, one_rank: dict[str, list[Sample]]
) -> None:
    folder = alphabet if what.startswith("alphabet") else experts
    choice = DRAWN if what.endswith("drawn") else GREEDY
    assert sampled(folder, layout, choice) == one_rank[what]


def test_draws_differ_from_the_most_probable_and_between_seeds(
    one_rank: dict[str, list[Sample]],
) -> None:
    """Else the comparisons of draws would show no more than those without."""
    for of in ("alphabet", "experts"):
        assert one_rank[f"{of}, drawn"] != one_rank[f"{of}, most probable"]
    assert len({one.tokens for one in one_rank["experts, drawn"]}) == len(PROMPTS)


def test_multi_token_prediction_is_left_out(tmp_path: Path) -> None:
    fields = SMALL.model.transformer | {"mtp_num_layers": 1}
    model = {"transformer": fields, "position_embedding_type": "rope"}
    run(changed(SMALL, model=model, training={"steps": 1}), 1, tmp_path)
    assert sampled(tmp_path, "2 ranks: pp2", DRAWN) == sampled(tmp_path, "1 ranks:", DRAWN)


def test_the_command_prints_the_text_or_json(
    alphabet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [str(alphabet), "--prompt", "abc", "--prompt", "k", "--max-new-tokens", "4"]
    assert cli.main(["sample", *words, "--temperature", "0"]) == 0
    assert capsys.readouterr().out == "abcdefg\nklm\na\n"
    assert cli.main(["sample", *words, "--temperature", "0", "--tp", "2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["nproc"] == 2
    assert [one["text"] for one in found["samples"]] == ["defg", "lm\na"]
    assert found["samples"][0]["prompt"] == list(b"abc")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--prompt abcdefghijklmnopq", "a prompt of 17 tokens is longer than the 16 that the"),
        ("--tokens 1,256", "--tokens 1,256: 256 is no token of the run's data, which has 0 to 255"),
        ("--tokens one", "--tokens expects whole numbers with commas, like 1,2,3; got one"),
        ("", "no prompt: --prompt TEXT"),
        ("--prompt a --temperature -1", "--temperature must not be below 0; it is -1.0"),
        ("--prompt a --top-k 0", "--top-k must not be below 1; it is 0"),
        ("--prompt a --top-p 1.5", "--top-p must be above 0 and at most 1; it is 1.5"),
        ("--prompt a --seed -1", "--seed must be from 0 to 2**63 - 1; it is -1"),
        ("--prompt a --max-new-tokens 0", "--max-new-tokens must not be below 1; it is 0"),
        ("--prompt a --nproc 3 --tp 2", "tp * cp * pp"),
    ],
)
def test_what_cannot_be_sampled_is_told_in_a_line(
    words: str, message: str, alphabet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", str(alphabet), *words.split()]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == "" and "Traceback" not in printed.err


def test_a_run_on_mock_data_takes_all_tokens_of_its_model(
    experts: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["sample", str(experts), "--prompt", "abc"]) == 2
    told = "--prompt: the run's data is no text, but tokens from 0 to 127: --tokens 1,2,3"
    assert told in capsys.readouterr().err
    assert cli.main(["sample", str(experts), "--tokens", "127,9", "--max-new-tokens", "1"]) == 0
    assert capsys.readouterr().out.startswith("127,9,")


def test_a_model_that_foresees_nothing_is_refused(experts: Path) -> None:
    checkpoint = require_checkpoint(experts)
    recipe = changed(recipe_in(checkpoint), model={"causal_attention": False})
    with pytest.raises(ConfigError, match="without causal attention"):
        to_sample(recipe, checkpoint, ParallelLayout(), 1)
    recipe = changed(recipe_in(checkpoint), data={"memory_sequences": 10})
    with pytest.raises(ConfigError, match="each token of its data is its own label"):
        to_sample(recipe, checkpoint, ParallelLayout(), 1)
    with pytest.raises(LayoutError, match="num_attention_heads"):
        to_sample(MIXTURE, checkpoint, ParallelLayout(tensor_model_parallel_size=3), 3)


def test_a_damaged_checkpoint_is_not_loaded(alphabet: Path, tmp_path: Path) -> None:
    shutil.copytree(require_checkpoint(alphabet), tmp_path / "copy")
    (file,) = (tmp_path / "copy").glob("__0_0.distcp")
    stored = bytearray(file.read_bytes())
    stored[len(stored) // 2] ^= 1
    file.write_bytes(stored)
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp"):
        sampled(tmp_path / "copy", "2 ranks: tp2", GREEDY)
