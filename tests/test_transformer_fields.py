"""What is read from the source of Megatron-Core's configurations, held against the classes."""

from __future__ import annotations

import dataclasses
import enum
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import torch

from mcore_lab import compat, cpu
from mcore_lab.config.values import from_toml, from_words


def transformer_class() -> Any:
    cpu.preload()
    from megatron.core.transformer.transformer_config import MLATransformerConfig

    return MLATransformerConfig


def test_every_field_of_the_installed_transformer_config_is_offered_but_for_objects() -> None:
    config = transformer_class()
    offered = compat.transformer_fields(multi_latent_attention=True)
    hints = get_type_hints(config)
    left_out = {field.name for field in dataclasses.fields(config)} - offered.keys()
    assert offered.keys() <= hints.keys()
    assert {"init_method", "timers", "_cpu_offloading_context"} <= left_out
    for name in left_out:
        assert any(
            kind in str(hints[name]) for kind in ("Callable", "ContextManager", "RecipeConfig")
        )


def other_classes() -> list[tuple[Any, dict[str, compat.ConfigField]]]:
    cpu.preload()
    from megatron.core.distributed import DistributedDataParallelConfig
    from megatron.core.optimizer import OptimizerConfig

    return [
        (DistributedDataParallelConfig, compat.ddp_fields()),
        (OptimizerConfig, compat.optimizer_fields()),
    ]


def test_every_field_of_the_gradient_buffers_and_the_optimizer_is_offered_but_for_objects() -> None:
    for config, offered in other_classes():
        left_out = {field.name for field in dataclasses.fields(config)} - offered.keys()
        assert left_out <= {"timers"}
        hints = get_type_hints(config)
        assert offered.keys() <= hints.keys()
        read = {name: field.annotation for name, field in offered.items()}
        assert read == {name: as_plain_values(hints[name]) for name in read}
        assert all(field.doc for field in offered.values())


def as_plain_values(real: Any) -> Any:
    """Say what an imported class's type is in values that can be written; object if in none."""
    if isinstance(real, enum.EnumMeta):
        return Literal[tuple(real.__members__)]
    if real is torch.dtype:
        return Literal[compat.DTYPES]
    if get_origin(real) in (Union, UnionType):
        members = [plain for m in get_args(real) if (plain := as_plain_values(m)) is not object]
        return Union[tuple(members)]  # noqa: UP007
    if get_origin(real) in (list, tuple):
        return get_origin(real)[*map(as_plain_values, get_args(real))]
    plain = (
        real in (bool, int, float, str, list, type(None), Ellipsis) or get_origin(real) is Literal
    )
    return real if plain else object


def test_the_types_that_are_read_from_source_are_those_of_the_imported_class() -> None:
    hints = get_type_hints(transformer_class())
    offered = compat.transformer_fields(multi_latent_attention=True)
    read = {name: field.annotation for name, field in offered.items() if name in hints}
    assert read.pop("activation_func") == Literal[compat.ACTIVATIONS]
    assert read == {name: as_plain_values(hints[name]) for name in read}


def test_every_plain_default_of_transformer_config_can_be_given_as_it_is() -> None:
    offered = compat.transformer_fields(multi_latent_attention=True)
    tried = 0
    for field in dataclasses.fields(transformer_class()):
        if field.name in offered and isinstance(field.default, bool | int | float | str):
            annotation = offered[field.name].annotation
            default = field.default.name if isinstance(field.default, enum.Enum) else field.default
            assert from_toml(annotation, default) == default
            assert from_words(annotation, [str(default)]) == default
            tried += 1
    assert tried > 150
