"""Tables in a recipe: fields of Megatron-Core's configurations, of the installed version's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields

from mcore_lab.compat import ConfigField, ddp_fields, optimizer_fields, transformer_fields
from mcore_lab.errors import ConfigError
from mcore_lab.layout import ParallelLayout

DECIDED_BY = {f.name: f"layout.{f.name}" for f in fields(ParallelLayout)} | dict.fromkeys(
    ("bf16", "fp16", "params_dtype"), "training.precision"
)


@dataclass(frozen=True, kw_only=True)
class Table:
    """A field of a recipe's part that holds fields of one of Megatron-Core's configurations."""

    configuration: str
    """Its class's name."""
    fields: Callable[[], dict[str, ConfigField]]
    """Which fields the installed one has."""
    decided_by: Mapping[str, str]
    """What decides those that are not set here, spelt with dots."""

    def known(self) -> dict[str, ConfigField]:
        """Return every field that can be set, or raise a ConfigError without Megatron-Core."""
        try:
            return self.fields()
        except ModuleNotFoundError as error:
            raise ConfigError(f"{error}: pip install 'megatron-core>=0.16.1,<0.20'") from None


TABLES = {
    "model.transformer": Table(
        configuration="TransformerConfig",
        fields=lambda: transformer_fields(multi_latent_attention=True),
        decided_by=DECIDED_BY,
    ),
    "training.ddp": Table(
        configuration="DistributedDataParallelConfig", fields=ddp_fields, decided_by=DECIDED_BY
    ),
    "training.optimizer": Table(
        configuration="OptimizerConfig",
        fields=optimizer_fields,
        decided_by=DECIDED_BY | {"overlap_param_gather": "training.ddp.overlap_param_gather"},
    ),
}
"""Which fields of a recipe's parts are tables, by their dotted names."""
