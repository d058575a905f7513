"""Recipes as TOML: there and back, laid over another, and what is said of a wrong file."""

from __future__ import annotations

import dataclasses
import tempfile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mcore_lab.compat import transformer_fields
from mcore_lab.config import Model, Recipe, parse_recipe, recipe_from_toml, recipe_to_toml
from mcore_lab.config.overlay import field_types, sections
from mcore_lab.config.tables import TABLES
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout

BASE = Recipe(name="tp2_gpt", layout=ParallelLayout(tensor_model_parallel_size=2))


def parse(*words: str) -> Recipe:
    return parse_recipe(BASE, words, "mcore-lab run tp2_gpt").recipe


def write(folder: Path, text: str, name: str = "recipe.toml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def test_a_file_is_laid_over_the_recipe_and_options_over_the_file(tmp_path: Path) -> None:
    first = write(tmp_path, "[training]\nlr = 1\nsteps = 5\n[layout]\ntp = 4\n", "first.toml")
    second = write(tmp_path, 'name = "tp2_gpt"\n[training]\nlr = 2.5\n', "second.toml")
    expected = dataclasses.replace(
        BASE.with_layout(tensor_model_parallel_size=4),
        training=dataclasses.replace(BASE.training, lr=2.5, steps=7),
    )
    files = ["--config", str(first), "--config", str(second)]
    assert parse("--training.steps", "7", *files) == expected
    assert parse("--config", str(first), str(second), "--training.steps=7") == expected
    assert parse(f"--config={first}", *files[2:], "--training.steps=7") == expected


def test_a_file_of_transformer_fields_is_read_as_they_are_typed(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "[model.transformer]\nnum_layers = 3\nwindow_size = [4, 0]\nlayernorm_epsilon = 1\n"
        'fp4_recipe = "None"\nmoe_layer_freq = [0, 1]\n',
    )
    assert recipe_from_toml(file, base=BASE).model == Model(
        num_layers=3,
        transformer={
            "window_size": (4, 0),
            "layernorm_epsilon": 1.0,
            "fp4_recipe": None,
            "moe_layer_freq": [0, 1],
        },
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[modle]\n", "modle is not a part of a recipe; did you mean model?"),
        ("[layout]\ntpp = 2\n", "layout.tpp is not a setting"),
        ("[data]\nseq_length = 2\n", "data.seq_length is not a setting; did you mean sequence_l"),
        ("[layout]\ntp = '2'\n", "layout.tp expects a whole number; got '2'"),
        ("[layout]\ntp = 2.0\n", "layout.tp expects a whole number; got 2.0"),
        ("[layout]\ntp = true\n", "layout.tp expects a whole number; got True"),
        ("[layout]\nsp = 1\n", "layout.sp expects True or False; got 1"),
        ("[training]\nprecision = 'bf8'\n", "training.precision expects one of fp32, bf16"),
        (
            "[layout]\ntp = 2\ntensor_model_parallel_size = 2\n",
            "layout.tensor_model_parallel_size is given twice",
        ),
        ("model = 3\n", "model expects a table; got 3"),
        ("[model.transformer]\nbogus = 3\n", "model.transformer.bogus is not a field"),
        ("[model.transformer]\nkv_channels = 'x'\n", "model.transformer.kv_channels expects"),
        ("[model]\ntransformer = 3\n", "model.transformer expects a table"),
        ("name = 3\n", "name expects text"),
        ("name = 'text_gpt'\n", "is of the recipe text_gpt, not of tp2_gpt"),
        ("[model\n", "is not TOML"),
    ],
)
def test_what_is_wrong_in_a_file_is_told_with_its_name(
    text: str, message: str, tmp_path: Path
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        recipe_from_toml(file, base=BASE)
    assert str(caught.value).startswith(str(file))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_text_is_told_with_its_name(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match=r"recipe\.toml is not TOML"):
        recipe_from_toml(file)


def test_a_file_on_its_own_has_to_say_what_recipe_it_is(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no `name`"):
        recipe_from_toml(write(tmp_path, "[training]\nsteps = 3\n"))


def test_a_recipe_is_written_as_a_person_would_write_it() -> None:
    recipe = Recipe(name="own", model=Model(transformer={"window_size": (4, 0), "fp8": None}))
    text = recipe_to_toml(recipe)
    assert text.startswith('name = "own"\n\n[model]\nnum_layers = 2\n')
    assert '\n[model.transformer]\nwindow_size = [4, 0]\nfp8 = "None"\n' in text
    assert "\nlr = 0.001\n" in text
    assert "ffn_hidden_size" not in text


def test_what_was_unset_stays_unset_over_a_recipe_that_sets_it(tmp_path: Path) -> None:
    base = dataclasses.replace(BASE, model=Model(ffn_hidden_size=128))
    assert recipe_from_toml(write(tmp_path, recipe_to_toml(BASE, base)), base) == BASE
    assert recipe_from_toml(write(tmp_path, recipe_to_toml(BASE)), base) != BASE


# "None" is how None is written where it may stand, so as a text it is not told apart from it.
TEXTS = st.text(st.characters(exclude_categories=["Cs"])).filter(lambda text: text != "None")


def values(annotation: Any) -> st.SearchStrategy[Any]:
    plain: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(-(2**63), 2**63 - 1),
        float: st.floats(allow_nan=False),
        str: TEXTS,
        type(None): st.none(),
        list: st.lists(st.lists(TEXTS)),
    }
    if annotation in plain:
        return plain[annotation]
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return st.sampled_from(arguments)
    if get_origin(annotation) is list:
        return st.lists(values(arguments[0]))
    if Ellipsis in arguments:
        return st.lists(values(arguments[0])).map(tuple)
    if get_origin(annotation) is tuple:
        return st.tuples(*map(values, arguments))
    return st.one_of(*map(values, arguments))


def tables(section: str, name: str) -> st.SearchStrategy[dict[str, Any]]:
    """Draw fields of a table; without latent attention, that of the transformer has fewer."""
    table = TABLES[f"{section}.{name}"]
    known = transformer_fields() if name == "transformer" else table.known()
    own = table.decided_by.keys() | field_types(sections()[section]).keys()
    optional = {key: values(known[key].annotation) for key in known if key not in own}
    return st.fixed_dictionaries({}, optional=optional)


def parts(section: str) -> st.SearchStrategy[Any]:
    types = field_types(sections()[section])
    fields = {
        name: tables(section, name) if f"{section}.{name}" in TABLES else values(types[name])
        for name in types
    }
    return st.builds(sections()[section], **fields)


@settings(max_examples=50, deadline=None)
@given(st.builds(Recipe, name=TEXTS, **{name: parts(name) for name in sections()}))
def test_any_recipe_comes_back_from_toml_as_it_was(recipe: Recipe) -> None:
    with tempfile.TemporaryDirectory() as folder:
        assert recipe_from_toml(write(Path(folder), recipe_to_toml(recipe))) == recipe
