"""Read settings from presets, TOML files and flags, check them, and write them as TOML.

This module does not import torch.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from difflib import get_close_matches
from importlib.util import find_spec
from math import isfinite
from pathlib import Path
from typing import Any

from krona_hub.errors import NotFoundError, UsageError
from krona_hub.kron.shapes import parse_shape
from krona_hub.training.settings import KINDS, SettingKind, TrainingSettings

PATHS = ("base", "data", "validation_data", "prior_data", "init", "output")  # relative to the TOML file
ECHO = "config.toml"  # the settings of a run, in its folder
NUMBERS = (int, float)
PRODIGY_LEAST = 0.1  # minimum learning rate: Prodigy uses it as a factor of its own estimate


PAPER: Mapping[str, Any] = {  # Marjit et al., DiffuseKronA (2024): 64×4 on q, k, v and out of both attentions
    "shape": "64x4", "terms": 1, "rows": "shuffled", "targets": r"attn[12]\.to_(q|k|v|out\.0)$",
    "learning_rate": 1e-3, "batch_size": 1, "accumulation": 4, "schedule": "constant", "warmup": 0,
    "optimizer": "adamw-8bit", "min_snr": 0.0, "prior_weight": 0.0,
}  # fmt: skip
TINY_SCENES: Mapping[str, Any] = {  # teach the shipped base model its toy in minutes on a CPU
    "base": "tiny-scenes", "data": "zorbi", "trigger_word": "zorbi", "targets": "attn+ff", "text_encoders": "attn",
    "steps": 500, "batch_size": 5, "learning_rate": 5e-3, "schedule": "cosine", "min_snr": 0.0,
}  # fmt: skip
PRESETS: Mapping[str, Mapping[str, Any]] = {
    "default": {},
    "tiny-scenes": TINY_SCENES,
    "paper-sd": {**PAPER, "steps": 500, "resolution": 512},
    "paper-sdxl": {**PAPER, "steps": 1000, "resolution": 1024},
}
FALLBACKS: Mapping[str, str] = {"adamw-8bit": "adamw"}  # replacement in presets if its package is not installed


def settings_of(
    given: Mapping[str, Any], *, file: str | Path | None = None, preset: str | None = None
) -> TrainingSettings:
    """Return checked settings: `given` override the TOML file, which overrides the preset.

    Raises UsageError for an unknown setting or preset, and for a value of the wrong type or out of range.

    >>> settings_of({"steps": 20}, preset="paper-sd").steps, settings_of({}, preset="paper-sd").shape
    (20, '64x4')
    """
    written = read_toml(Path(file)) if file else {}
    name = preset or written.pop("preset", None) or "default"
    written.pop("preset", None)
    return checked({**preset_values(name), **written, **given})


def preset_values(name: str) -> dict[str, Any]:
    """Return the settings of a preset, with a fallback for an optimizer whose package is not installed."""
    if name not in PRESETS:
        raise UsageError(f"Unknown preset {name!r}.", fix=_nearest(name, PRESETS))
    values = dict(PRESETS[name])
    if values.get("optimizer") in FALLBACKS and find_spec("bitsandbytes") is None:
        values["optimizer"] = FALLBACKS[values["optimizer"]]
    return values


def read_toml(path: Path) -> dict[str, Any]:
    """Return the values of a TOML file. Relative paths in it are relative to the file."""
    if not path.is_file():
        raise NotFoundError(f"No such file: {str(path)!r}.", fix="Check the path.")
    try:
        values = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path} is not valid TOML: {error}.", fix="Write lines such as: steps = 500") from error
    for name in PATHS:
        if isinstance(values.get(name), str):
            values[name] = _relative_to(path.parent, values[name])
    if isinstance(output := values.get("output"), str) and output:  # the run folder may not exist yet
        values["output"] = str(path.parent / Path(output).expanduser())
    return values


def _relative_to(folder: Path, text: str) -> str:
    """Resolve a path relative to `folder`. Keep a Hub id or a catalog name, which does not exist there."""
    candidate = folder / text
    return str(candidate) if text and candidate.exists() and not Path(text).is_absolute() else text


def with_absolute_paths(settings: TrainingSettings) -> TrainingSettings:
    """Make existing paths absolute, so that a run can be resumed from any working directory."""
    found = {name: value for name in PATHS if (value := getattr(settings, name)) and Path(value).expanduser().exists()}
    absolute: dict[str, Any] = {name: str(Path(value).expanduser().resolve()) for name, value in found.items()}
    return replace(settings, **absolute)


def checked(values: Mapping[str, Any]) -> TrainingSettings:
    """Build settings from plain values. Raises UsageError for an unknown, mistyped or out-of-range value."""
    unknown = [name for name in values if name not in KINDS]
    if unknown:
        raise UsageError(f"Unknown setting {unknown[0]!r}.", fix=_nearest(unknown[0], KINDS))
    settings = TrainingSettings(**{name: _value(KINDS[name], value) for name, value in values.items()})
    _check_together(settings)
    return settings


def _nearest(name: str, known: Mapping[str, Any] | Sequence[str]) -> str:
    near = get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(known)}."


def _value(kind: SettingKind, value: Any) -> Any:
    if value is None and kind.optional:
        return None
    if kind.type is tuple:
        return _strings(kind, value)
    if kind.type is Mapping:
        return _shapes(kind, value)
    if kind.type is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value)
    if type(value) is not kind.type:
        raise _type_error(kind, value, _type_name(kind.type))
    if kind.choices and value not in kind.choices:
        near = get_close_matches(str(value), kind.choices, n=1)
        fix = f"Did you mean {near[0]!r}?" if near else f"Choose one of {', '.join(kind.choices)}."
        raise UsageError(f"Invalid value {value!r} for {kind.name}.", fix=fix)
    return _in_range(kind, value) if isinstance(value, NUMBERS) else value


def _type_error(kind: SettingKind, value: Any, expected: str) -> UsageError:
    fix = f"Use {expected}. {kind.name}: {kind.metadata['help']}"
    return UsageError(f"{kind.name} = {value!r} is not {expected}.", fix=fix)


def _type_name(kind: type) -> str:
    names = {int: "an integer", float: "a number", bool: "true or false", str: "a string"}
    return names.get(kind, f"a {kind.__name__}")


def _in_range(kind: SettingKind, value: Any) -> Any:
    least, most = kind.metadata["least"], kind.metadata["most"]
    if not isfinite(value) or (least is not None and value < least) or (most is not None and value > most):
        bounds = [f"{word} {bound}" for word, bound in (("at least", least), ("at most", most)) if bound is not None]
        allowed = f"a value of {' and '.join(bounds)}" if bounds else "a finite number"
        raise UsageError(f"{kind.name} = {value} is out of range.", fix=f"Use {allowed}.")
    return value


def _strings(kind: SettingKind, value: Any) -> tuple[str, ...]:
    parts = value.split(",") if isinstance(value, str) and kind.has_commas else value
    parts = [parts] if isinstance(parts, str) else parts
    if not isinstance(parts, list | tuple) or not all(isinstance(part, str) for part in parts):
        raise _type_error(kind, value, "a list of strings")
    return tuple(part.strip() for part in parts if part.strip())


def _shapes(kind: SettingKind, value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping) or not all(isinstance(v, str) for v in value.values()):
        raise UsageError(
            f"{kind.name} is not a table of strings.", fix='Write "attn2.to_[kv]" = "32x8" under [shapes].'
        )
    for pattern, shape in value.items():
        try:
            re.compile(pattern)
        except re.error as error:
            raise UsageError(
                f"Invalid regular expression {pattern!r}: {error}.", fix="Escape special characters with a backslash."
            ) from error
        if shape != "auto":
            parse_shape(shape)
    return dict(value)


def _check_together(settings: TrainingSettings) -> None:
    """Check settings that depend on each other."""
    if settings.shape != "auto":
        parse_shape(settings.shape)
    if "{caption}" not in settings.caption_template:
        raise UsageError(
            "caption_template does not contain {caption}.", fix='Write, for example, "a photo, {caption}".'
        )
    if settings.budget is not None and settings.shape != "auto":
        raise UsageError("--budget requires --shape auto.", fix="Remove --shape or --budget.")
    if settings.prior_prompt and not (settings.prior_data or settings.prior_pictures):
        raise UsageError(
            "--prior-prompt requires regularization images.",
            fix="Add --prior-pictures N to generate them, or --prior-data FOLDER.",
        )
    if settings.prior_pictures and not settings.prior_prompt:
        raise UsageError(
            "--prior-pictures requires --prior-prompt.", fix='Add, for example, --prior-prompt "a photo of a toy".'
        )
    if settings.optimizer == "schedule-free" and settings.schedule != "constant":
        raise UsageError(
            f"The schedule-free optimizer does not support --schedule {settings.schedule}.", fix="Remove --schedule."
        )
    if settings.optimizer == "prodigy" and settings.learning_rate < PRODIGY_LEAST:
        raise UsageError(
            f"Prodigy estimates the learning rate itself; --learning-rate {settings.learning_rate:g} would reduce it.",
            fix="Use --learning-rate 1.",
        )


def to_toml(settings: TrainingSettings) -> str:
    """Return the settings as TOML that `read_toml` reads back unchanged; settings that are None are left out.

    >>> tomllib.loads(to_toml(checked({"shapes": {"to_[kv]$": "32x8"}})))["shapes"]
    {'to_[kv]$': '32x8'}
    """
    return as_toml({name: value for name, value in settings.named.items() if value is not None})


def as_toml(values: Mapping[str, Any]) -> str:
    """Return plain values and tables as TOML, with the tables last."""
    lines = [f"{name} = {_toml(value)}" for name, value in values.items() if not isinstance(value, Mapping)]
    for name, table in values.items():
        if isinstance(table, Mapping) and table:
            lines += ["", f"[{name}]", *(f"{_toml(k)} = {_toml(v)}" for k, v in table.items())]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):
        return _quoted(value)
    return f"[{', '.join(map(_toml, value))}]" if isinstance(value, tuple | list) else repr(value)


def _quoted(text: str) -> str:
    escaped = text.replace("\\", "\\\\").replace('"', '\\"')
    return '"' + re.sub(r"[\x00-\x1f\x7f]", lambda m: f"\\u{ord(m[0]):04x}", escaped) + '"'
