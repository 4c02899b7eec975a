"""Write report.html of a run folder from the other files in it, so that it can be regenerated at any time."""

from __future__ import annotations

from pathlib import Path

from krona_hub.formats.reading.describe import describe
from krona_hub.rendering.html.markup import write_html
from krona_hub.rendering.html.training_report import Run, training_html
from krona_hub.training.configuration import ECHO, read_toml
from krona_hub.training.progress.metrics import read_metrics, sample_files
from krona_hub.training.training_record import LOCAL_SETTINGS

PAGE = "report.html"  # in the run folder


def write_report(run: Path, adapter: Path) -> Path:
    """Write the HTML report of a run. It contains no local paths, because reports are shared."""
    settings = read_toml(run / ECHO) if (run / ECHO).is_file() else {}
    prompts = settings.get("sample_prompts") or [settings.get("prompt", "")]
    shown = Run(
        name=run.resolve().name,
        rows=read_metrics(run),
        settings={name: _as_text(name, value) for name, value in settings.items() if name not in LOCAL_SETTINGS},
        adapter=describe(adapter) if adapter.exists() else None,
        samples=sample_files(run),
        prompts=[str(prompt) for prompt in prompts],
    )
    return write_html(run / PAGE, training_html(shown))


def _as_text(name: str, value: object) -> object:
    if name == "base":
        return Path(str(value)).name if Path(str(value)).exists() else value
    if isinstance(value, list):
        return ", ".join(map(str, value))
    if isinstance(value, dict):
        return ", ".join(f"{key} = {entry}" for key, entry in value.items())
    return str(value)
