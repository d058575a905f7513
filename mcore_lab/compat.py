"""What differs between Megatron-Core versions, and what the installed one offers.

Nothing in here imports torch or Megatron-Core when it is itself imported.
"""

from __future__ import annotations

import ast
import functools
import importlib.metadata
import importlib.util
import textwrap
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

from packaging.version import Version

ACTIVATIONS = ("gelu", "silu", "relu", "quick_gelu", "squared_relu")
"""Names that stand for a function in `TransformerConfig.activation_func`."""

DTYPES = ("float32", "bfloat16", "float16", "float64")
"""Names that stand for a `torch.dtype`."""


class ConfigField(NamedTuple):
    """A field of one of Megatron-Core's configurations that a plain value can set."""

    annotation: Any
    """Its type in plain values: an enum's members and a dtype are given by name."""
    doc: str
    """Megatron-Core's own words on it."""


@functools.cache
def transformer_fields(multi_latent_attention: bool = False) -> dict[str, ConfigField]:
    """Return the settable fields of the installed `TransformerConfig`, by name.

    They are read from Megatron-Core's source: that takes milliseconds, its import seconds.
    Fields that hold functions or objects are left out, but for `activation_func`. With
    `multi_latent_attention`, those of `MLATransformerConfig` are added.

    Raises ModuleNotFoundError if Megatron-Core is not installed.
    """
    found = _fields_of("model_parallel_config.py", "ModelParallelConfig")
    found |= _fields_of("transformer/transformer_config.py", "TransformerConfig")
    if multi_latent_attention:
        found |= _fields_of("transformer/transformer_config.py", "MLATransformerConfig")
    return found


@functools.cache
def ddp_fields() -> dict[str, ConfigField]:
    """Return the settable fields of the installed `DistributedDataParallelConfig`, by name."""
    file = "distributed/distributed_data_parallel_config.py"
    return _fields_of(file, "DistributedDataParallelConfig")


@functools.cache
def optimizer_fields() -> dict[str, ConfigField]:
    """Return the settable fields of the installed `OptimizerConfig`, by name."""
    return _fields_of("optimizer/optimizer_config.py", "OptimizerConfig")


def _fields_of(file: str, name: str) -> dict[str, ConfigField]:
    core = megatron_core_folder()
    names = _Names(_enum_choices(core / "transformer" / "enums.py"))
    for node in ast.parse((core / file).read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            return _fields(node, names)
    raise AttributeError(f"{core / file} has no class {name}")


def megatron_core_folder() -> Path:
    """Return the folder of the installed `megatron.core`, without importing it."""
    spec = importlib.util.find_spec("megatron")
    for root in (spec.submodule_search_locations or ()) if spec else ():
        if (Path(root) / "core" / "transformer" / "transformer_config.py").is_file():
            return Path(root) / "core"
    raise ModuleNotFoundError("megatron-core is not installed", name="megatron.core")


@functools.cache
def megatron_core_is_before(version: str) -> bool:
    """Say whether the installed Megatron-Core is older than `version`; False if there is none."""
    try:
        return Version(importlib.metadata.version("megatron-core")) < Version(version)
    except importlib.metadata.PackageNotFoundError:
        return False


class _Object:
    """Stands for any type whose values cannot be written as text."""

    def __class_getitem__(cls, _: object) -> type[_Object]:
        return cls


class _Names(dict[str, Any]):
    """What the names in Megatron-Core's annotations mean in plain values."""

    def __init__(self, enums: dict[str, Any]) -> None:
        plain = {kind.__name__: kind for kind in (bool, int, float, str, list, tuple)}
        generic = {name: getattr(typing, name) for name in ("Literal", "Optional", "Union")}
        torch = SimpleNamespace(dtype=typing.Literal[DTYPES], Tensor=_Object)
        super().__init__(plain | generic | enums, List=list, Tuple=tuple, torch=torch)

    def __missing__(self, _: str) -> type[_Object]:
        return _Object


def _enum_choices(file: Path) -> dict[str, Any]:
    """Return `Literal[member names]` for each enum that the file defines."""
    choices = {}
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef):
            members = [item.targets[0] for item in node.body if isinstance(item, ast.Assign)]
            choices[node.name] = typing.Literal[
                tuple(member.id for member in members if isinstance(member, ast.Name))
            ]
    return choices


def _fields(node: ast.ClassDef, names: _Names) -> dict[str, ConfigField]:
    found = {}
    for item, after in zip(node.body, [*node.body[1:], None], strict=True):
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
            name = item.target.id
            # The annotations are Megatron-Core's own code, which a run imports as it is.
            written = eval(ast.unparse(item.annotation), {"__builtins__": {}}, names)
            plain = typing.Literal[ACTIVATIONS] if name == "activation_func" else _plain(written)
            if plain is not _Object and not name.startswith("_"):
                found[name] = ConfigField(plain, _doc(after))
    return found


def _plain(written: Any) -> Any:
    """Drop from a union what text cannot express; `_Object` if nothing is left."""
    if typing.get_origin(written) is not typing.Union:
        return written
    members = [plain for m in typing.get_args(written) if (plain := _plain(m)) is not _Object]
    return _Object if members == [type(None)] else typing.Union[tuple(members)]  # noqa: UP007


def _doc(node: ast.stmt | None) -> str:
    match node:
        case ast.Expr(value=ast.Constant(value=str(text))):
            return textwrap.dedent(text).strip()
    return ""


def null_tokenizer(vocab_size: int) -> Any:
    """Return Megatron-Core's null tokenizer: tokens 0 to `vocab_size`, the last ends a document.

    Its library is called `null` before 0.17, which adds the end-of-document token to `vocab_size`;
    from 0.17 on it is called `null-text` and counts it.
    """
    from megatron.core.tokenizers import MegatronTokenizer, megatron_tokenizer

    if "null" in getattr(megatron_tokenizer, "TOKENIZER_LIBRARIES", ()):
        library, size = "null", vocab_size
    else:
        library, size = "null-text", vocab_size + 1
    return MegatronTokenizer.from_pretrained(metadata_path={"library": library}, vocab_size=size)


def byte_level_tokenizer() -> Any:
    """Return Megatron-Core's byte-level tokenizer: a token a byte of UTF-8, 0 ends a document.

    No byte is padding: by its default 1 is, which datasets leave out of the loss.
    """
    from megatron.core.tokenizers import MegatronTokenizer

    return MegatronTokenizer.from_pretrained(
        metadata_path={"library": "byte-level"}, vocab_size=256, _pad_id=-1
    )


def slice_for_context_parallel_rank(batch: dict[str, Any]) -> dict[str, Any]:
    """Return this context-parallel rank's part of a batch: two chunks of `[b, s]`, `[b, s / cp]`.

    From 0.17 on `get_batch_on_this_cp_rank` has a further required argument, and where no group is
    given 0.19 takes the whole world for the context-parallel group.
    """
    import inspect

    from megatron.core import parallel_state
    from megatron.core.utils import get_batch_on_this_cp_rank

    arguments: dict[str, Any] = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        arguments["is_hybrid_cp"] = False
    # It replaces the values of the dictionary that it is given.
    sliced: dict[str, Any] = get_batch_on_this_cp_rank(dict(batch), **arguments)
    return sliced


def built_as(kind: type, spec: Any) -> Any:
    """Return a layer spec's `mlp` with `kind`, a subclass of `MLP`, in the place of `MLP`.

    It is a `ModuleSpec` in 0.16, and a partial of the class's `as_mlp_submodule` in later versions.
    """
    if isinstance(spec, functools.partial):
        return functools.partial(kind.as_mlp_submodule, *spec.args, **spec.keywords)  # type: ignore[attr-defined]
    return replace(spec, module=kind)


def router_coefficients(fields: Mapping[str, Any], micro_batch_size: int) -> dict[str, Any]:
    """Return the `TransformerConfig` coefficients that give the router's losses their whole weight.

    Before 0.19, under `calculate_per_token_loss`, their gradients are divided by the number of
    tensor- and context-parallel ranks (Megatron-LM #5047), and those of `seq_aux_loss` by the
    samples of a micro-batch too. What Megatron-Core logs of these losses is without coefficients.
    """
    is_right = Version(importlib.metadata.version("megatron-core")) >= Version("0.19")
    if is_right or not fields.get("calculate_per_token_loss"):
        return {}
    ranks = fields["tensor_model_parallel_size"] * fields["context_parallel_size"]

    def whole(kind: str, coefficient: float) -> float:
        return coefficient * ranks * (micro_batch_size if kind == "seq_aux_loss" else 1)

    found: dict[str, Any] = {}
    if z_loss := fields.get("moe_z_loss_coeff"):
        found["moe_z_loss_coeff"] = whole("z_loss", z_loss)
    kinds = fields.get("moe_router_load_balancing_type", "aux_loss")
    match kinds, fields.get("moe_aux_loss_coeff"):
        case str(kind), float(balance):
            found["moe_aux_loss_coeff"] = whole(kind, balance)
        case [*each], [*balances] if len(each) == len(balances):
            found["moe_aux_loss_coeff"] = list(map(whole, each, balances))
    return found


def take_auxiliary_losses() -> dict[str, list[float]]:
    """Return what the routers have reported since the last call, a number a layer, and forget it.

    Reduced over ranks as Megatron-Core does for its log, and summed over micro-batches. Every rank
    calls this. What not every rank has reported, where a stage has no experts, is left out: the
    reduction would wait for it. From 0.17 on a class keeps what was a dictionary of dictionaries.
    """
    import torch.distributed as dist
    from megatron.core.transformer.moe import moe_utils

    is_class = hasattr(moe_utils, "get_moe_metrics_tracker")
    reported: Any = (
        moe_utils.get_moe_metrics_tracker().metrics
        if is_class
        else moe_utils.get_moe_layer_wise_logging_tracker()
    )
    of_ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(of_ranks, set(reported))
    names = sorted(set.intersection(*of_ranks))
    if is_class:
        tracker = moe_utils.get_moe_metrics_tracker()
        tracker._sync_metrics(names)
        found = {name: tracker.metrics[name].values.tolist() for name in names}
        tracker.clear()
    else:
        moe_utils.reduce_aux_losses_tracker_across_ranks(names)
        found = {name: reported[name]["values"].tolist() for name in names}
        moe_utils.clear_aux_losses_tracker()
    return found


def own_async_save() -> dict[str, str]:
    """Return the argument of `dist_checkpointing.save` that has it plan with what it brings itself.

    0.19 plans an asynchronous save with NVIDIA's resiliency extension if it is not told otherwise.
    """
    import inspect

    from megatron.core import dist_checkpointing

    takes_it = "async_strategy" in inspect.signature(dist_checkpointing.save).parameters
    return {"async_strategy": "mcore"} if takes_it else {}


@contextmanager
def common_state_failures() -> Iterator[list[Exception]]:
    """Keep, for who gets the list to raise, what keeps rank 0 from writing `common.pt`.

    Megatron-Core 0.16 writes it between two collectives: raised there, the error would leave the
    other ranks waiting. 0.19 has no such file.
    """
    failures: list[Exception] = []
    try:
        from megatron.core.dist_checkpointing.strategies import base
        from megatron.core.dist_checkpointing.strategies.common import TorchCommonSaveStrategy
    except ImportError:
        yield failures
        return

    class Keeping(TorchCommonSaveStrategy):
        def save_common(self, *state_and_folder: Any) -> None:
            try:
                super().save_common(*state_and_folder)
            except Exception as error:
                failures.append(error)

    which = (base.StrategyAction.SAVE_COMMON, "torch", 1)
    usual = base.get_default_strategy(*which)
    base.register_default_strategy(*which, Keeping("torch", 1))
    try:
        yield failures
    finally:
        base.register_default_strategy(*which, usual)
