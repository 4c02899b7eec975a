"""The target of a write: a format, and the application that loads the file. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from krona_hub.adapters.adapter import Adapter
from krona_hub.errors import InexpressibleError, UsageError
from krona_hub.formats.compatibility.applications import Application, application_named, file_format
from krona_hub.formats.forms.normal_forms import lora_of
from krona_hub.formats.known.native import KRONA
from krona_hub.formats.known.registry import storage_of


@dataclass(frozen=True)
class Aim:
    """The target of a write: format, dialect of module names, and the application that loads the file."""

    format: str
    dialect: str  # of the module names, unless they depend on the application and the base model
    tool: Application | None
    split_qkv: bool

    @property
    def is_folder(self) -> bool:
        return storage_of(self.format).folder


def aim_at(adapter: Adapter, format_name: str, tool_name: str | None, split_qkv: bool) -> Aim:
    """Choose format and dialect from a format name, or from an application and the kind of the adapter.

    Raises UsageError for unknown or contradictory names, InexpressibleError for a LoKr and an application that loads
    LoRA only.
    """
    storage = storage_of(format_name)
    if tool_name is None:
        return Aim(format_name, storage.dialect, None, split_qkv)
    tool = application_named(tool_name)
    target = _target(adapter, tool)
    if format_name == tool.lokr:  # a LoRA is a LoKr with A of 1x1, if that is asked for
        target = format_name
    if format_name not in (KRONA.name, target):
        raise UsageError(
            f"{tool.title} loads {target}, not {format_name}.",
            fix="Specify the format or the application, not both.",
        )
    return Aim(target, tool.dialect, tool, split_qkv)


def _target(adapter: Adapter, tool: Application) -> str:
    """The format that is written for the application and this kind of adapter; the kind never changes."""
    other = next((name for name, delta in adapter.layers.items() if lora_of(delta) is None), None)
    has_dora = any(delta.magnitude is not None for delta in adapter.layers.values())
    target = file_format(tool, is_lora=other is None, has_dora=has_dora)
    if target is None:
        raise InexpressibleError(
            f"{tool.title} loads LoRA only, and {other} is a Kronecker sum.",
            fix=f"Add --to lora, with --exact (exact at full rank) or --rank or --max-error (approximate): "
            f"--for {tool.name} --to lora.",
        )
    return target


def kinds_of(adapter: Adapter) -> frozenset[str]:
    """`lora` or `lokr`, as far as the adapter has layers of these kinds."""
    return frozenset("lokr" if lora_of(delta) is None else "lora" for delta in adapter.layers.values())
