"""Module names and shapes of a model class, instantiated without weights on torch's meta device.

Only this module needs diffusers and transformers; all others read names and shapes from files. Imports torch lazily.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

from krona_hub.bases.component import Component
from krona_hub.bases.module_spec import ModuleSpec, other_parameters
from krona_hub.errors import UnknownBaseError


def modules_of(library: str, class_name: str, config: Mapping[str, Any]) -> Component:
    """Path -> ModuleSpec of every Linear and Conv of `class_name` in `library` (`diffusers` or `transformers`).

    Paths have no `text_model.`. Raises UnknownBaseError if the class is not installed or rejects the configuration.
    """
    import torch

    weighted = (torch.nn.Linear, torch.nn.Conv1d, torch.nn.Conv2d, torch.nn.Conv3d)
    model = build(library, class_name, config)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, weighted)}
    modules = {
        name.removeprefix("text_model."): ModuleSpec(
            tuple(m.weight.shape), m.bias is not None, getattr(m, "groups", 1)
        )
        for name, m in layers.items()
    }  # fmt: skip
    owners = {f"{name}." for name, m in model.named_modules() if isinstance(m, (*weighted, torch.nn.Embedding))}
    shapes = {
        name.removeprefix("text_model."): tuple(p.shape)
        for name, p in model.named_parameters(remove_duplicate=False)
        if name[: name.rfind(".") + 1] not in owners
    }
    return Component(modules, partial(other_parameters, shapes))


def build(library: str, class_name: str, config: Mapping[str, Any]) -> Any:
    """Instantiate the model on the meta device: parameters have shapes but no storage."""
    import importlib

    import torch

    try:
        cls = getattr(importlib.import_module(library), class_name)
        with torch.device("meta"):
            return _instance(library, cls, config)
    except (ImportError, AttributeError, TypeError, ValueError) as error:
        raise UnknownBaseError(
            f"{class_name} cannot be built from its configuration: {error}.",
            fix="Specify a folder or file with safetensors weights, or install the required version of diffusers.",
        ) from error


def _instance(library: str, cls: Any, config: Mapping[str, Any]) -> Any:
    if library == "diffusers":
        return cls.from_config(dict(config))
    return cls(cls.config_class(**{k: v for k, v in config.items() if k != "model_type"}))
