"""Write krona_hub/bases/components/*.json and krona_hub/bases/index.json from published configurations.

    python scripts/build_catalog.py [FOLDER OF CONFIGURATIONS]
    python scripts/build_catalog.py --index

The folder contains one JSON file per component (class, configuration, source), those of models that diffusers has no
class for in `authors-only`, and what is known of their totals in `checks/status.json`. It defaults to `bases` in the
folder that KRONA_SHARED names, or in `shared` beside the project. Each model is built on torch's meta device, so no
weights are needed. The base model that ships in the package is added from `tiny_scenes/models.py`. With `--index`, only
the index is written: it is needed after a change of families.json or of a table of names.
"""

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

from krona_hub.bases import catalog_index
from krona_hub.bases.meta_device import build, modules_of
from krona_hub.bases.name_patterns import encode, expand

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
SHARED = Path(os.environ.get("KRONA_SHARED", ROOT.parent / "shared"))
OUT = ROOT / "krona_hub/bases/components"
CONFIG_STATUS = {
    "stored config.json": "F",
    "stored copy of config.json": "F",
    "conversion script": "C",
    "public code, two sources": "P2",
    "public code, one source": "P1",
    "public code": "P1",
    "recalled, total verified": "R",
    "recalled, not verified": "R",
    "class defaults": "D",
    "of this package": "O",
}
TOTAL_STATUS = {  # of components without a status of their own: exceptions from W, a source states the same number
    **dict.fromkeys(("tiny-scenes.unet", "tiny-scenes.text"), "O"),
    **dict.fromkeys(("sd21-base.unet", "sd21.unet", "sdxl-refiner.unet", "pixart-sigma-xl.transformer"), "A"),
    **dict.fromkeys(("flux2-dev.transformer", "flux2-klein-4b.transformer", "flux2-klein-9b.transformer"), "A"),
    **dict.fromkeys(("clip-l-proj.text", "openclip-h.text", "umt5-xxl.text", "qwen3-8b.text"), "A"),
    **dict.fromkeys(("sd35-medium.transformer", "sd35-large.transformer", "sana-1600m.transformer"), "N"),
    **dict.fromkeys(("chroma.transformer", "auraflow.transformer", "llama31-8b.text", "pile-t5-xl.text"), "N"),
}


def main() -> None:
    if sys.argv[1:] != ["--index"]:
        write_components(Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED / "bases")
    catalog_index.PATH.write_text(catalog_index.as_text(catalog_index.build()), "utf-8")


def write_components(folder: Path) -> None:
    OUT.mkdir(exist_ok=True)
    statuses = total_statuses(folder / "checks" / "status.json")
    published = [read(path) for path in sorted(folder.glob("*.json"))]
    listed = [listed_entry(read(path)) for path in sorted(folder.glob("authors-only/*.json"))]
    built = [catalog_entry(source, statuses) for source in [*published, *shipped()]]
    for entry in [*built, *listed]:
        OUT.joinpath(f"{entry['component']}.json").write_text(compact(entry), "utf-8")


def read(path: Path) -> dict:
    return json.loads(path.read_text("utf-8"))


def total_statuses(path: Path) -> dict[str, str]:
    """Return component -> status of its total; H where the key hash of a released file proves names and shapes."""
    known = read(path)
    proven = dict.fromkeys(known["old_now_proven"], "H")
    return TOTAL_STATUS | proven | {name: facts["total_status"] for name, facts in known["new"].items()}


def listed_entry(source: dict) -> dict:
    """Return the content of a catalog file for a model without a class: its module list in its authors' names."""
    return {
        "component": source["base"],
        "library": "",
        "class": "",
        "total_parameters": source["total_parameters"],
        "persistent_buffers": 0,
        "config_status": "L",
        "total_status": source["total_status"].partition(" ")[0],
        "source": source["source"],
        "config": {},
        "modules": encode(expand(source["modules"])),
    }


def shipped() -> list[dict]:
    """Return the denoiser and the text encoder of tiny-scenes in the form of published configurations."""
    from scripts.tiny_scenes import models

    return [
        _own("tiny-scenes.text", "transformers", models.text_encoder()),
        _own("tiny-scenes.unet", "diffusers", models.unet()),
    ]


def _own(name: str, library: str, model: Any) -> dict:
    config = {key: value for key, value in _saved_config(model).items() if _is_relevant(key, value)}
    return {
        "base": name,
        "library": library,
        "class": type(model).__name__,
        "config": config,
        "config_status": "of this package",
        "source": "assets/tiny-scenes of this package",
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "persistent_buffers": 0,
    }


def _is_relevant(key: str, value: Any) -> bool:
    return value is not None and not key.startswith("_") and key != "transformers_version"


def _saved_config(model: Any) -> dict:
    """Return the complete configuration of a diffusers model, or the non-default values of a transformers model."""
    return model.config.to_diff_dict() if hasattr(model.config, "to_diff_dict") else dict(model.config)


def catalog_entry(source: dict, statuses: dict[str, str]) -> dict:
    """Return the content of one catalog file, after comparing the parameter count with that of the built model."""
    kind = source["library"], source["class"], source["config"]
    modules = modules_of(*kind)
    norms, bare = map(encode, modules.others())
    total = sum(p.numel() for p in build(*kind).parameters())
    if total != source["total_parameters"]:
        raise SystemExit(
            f"{source['base']}: The built model has {total} parameters instead of {source['total_parameters']}."
        )
    return {
        "component": source["base"],
        "library": source["library"],
        "class": source["class"],
        "total_parameters": total,
        "persistent_buffers": source["persistent_buffers"],
        "config_status": CONFIG_STATUS[source["config_status"]],
        "total_status": statuses.get(source["base"], "W"),
        "source": public_words(source["source"]),
        "config": source["config"],
        "modules": encode(modules),
        **({"norms": norms} if norms else {}),
        **({"parameters": bare} if bare else {}),
    }


def public_words(source: str) -> str:
    """Remove numbers that only the collector of the source can look up."""
    words = re.sub(r"\(?\bids? [\d., and]+\d\.*\)?", "", source.replace("file index", "public code"))
    return re.sub(r"\s+", " ", words).replace(" ,", ",").replace(" ;", ";").removesuffix(" against ").strip(" ;,.")


def compact(entry: dict) -> str:
    """Format an entry with one line per field and per pattern, and nested configuration values on one line."""
    lines = []
    for key, value in entry.items():
        if key in ("modules", "norms", "parameters"):
            rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f" {json.dumps(key)}: {{\n{rows}\n }}")
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
