"""Write krona_hub/bases/catalogue/*.json from published configurations.

    python scripts/build_catalogue.py [FOLDER OF CONFIGURATIONS]

The folder holds one JSON per component (class, configuration, source); without an argument it is `bases` in the
folder that KRONA_SHARED names, or in `shared` beside the project. Each model is built on torch's meta device, so no
weights are needed.
"""

import json
import os
import re
import sys
from pathlib import Path

from krona_hub.bases.meta import build, modules_of
from krona_hub.bases.patterns import encode

ROOT = Path(__file__).parent.parent
SHARED = Path(os.environ.get("KRONA_SHARED", ROOT.parent / "shared"))
OUT = ROOT / "krona_hub/bases/catalogue"
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
}
TOTAL_STATUS = {  # where the total is not W: the same number beside the named model in a public source
    **dict.fromkeys(("sd21-base.unet", "sd21.unet", "sdxl-refiner.unet", "pixart-sigma-xl.transformer"), "A"),
    **dict.fromkeys(("flux2-dev.transformer", "flux2-klein-4b.transformer", "flux2-klein-9b.transformer"), "A"),
    **dict.fromkeys(("clip-l-proj.text", "openclip-h.text", "umt5-xxl.text", "qwen3-8b.text"), "A"),
    **dict.fromkeys(("sd35-medium.transformer", "sd35-large.transformer", "sana-1600m.transformer"), "N"),
    **dict.fromkeys(("chroma.transformer", "auraflow.transformer", "llama31-8b.text", "pile-t5-xl.text"), "N"),
}


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else SHARED / "bases"
    OUT.mkdir(exist_ok=True)
    for path in sorted(folder.glob("*.json")):
        entry = catalogue_entry(json.loads(path.read_text("utf-8")))
        OUT.joinpath(f"{entry['component']}.json").write_text(compact(entry), "utf-8")


def catalogue_entry(source: dict) -> dict:
    """One file of the catalogue; the total of the published configuration must be that of the built model."""
    kind = source["library"], source["class"], source["config"]
    total = sum(p.numel() for p in build(*kind).parameters())
    if total != source["total_parameters"]:
        raise SystemExit(f"{source['base']}: built {total} parameters, expected {source['total_parameters']}")
    return {
        "component": source["base"],
        "library": source["library"],
        "class": source["class"],
        "total_parameters": total,
        "persistent_buffers": source["persistent_buffers"],
        "config_status": CONFIG_STATUS[source["config_status"]],
        "total_status": TOTAL_STATUS.get(source["base"], "W"),
        "source": public_words(source["source"]),
        "config": source["config"],
        "modules": encode(modules_of(*kind)),
    }


def public_words(source: str) -> str:
    """The source without numbers that only its collector can look up."""
    words = re.sub(r"\(?\bids? [\d., and]+\d\.*\)?", "", source.replace("file index", "public code"))
    return re.sub(r"\s+", " ", words).replace(" ,", ",").replace(" ;", ";").removesuffix(" against ").strip(" ;,.")


def compact(entry: dict) -> str:
    """One line per field and per pattern; nested values of the configuration on one line."""
    lines = []
    for key, value in entry.items():
        if key == "modules":
            rows = ",\n".join(f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in value.items())
            lines.append(f' "modules": {{\n{rows}\n }}')
        else:
            lines.append(f" {json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    return "{\n" + ",\n".join(lines) + "\n}\n"


if __name__ == "__main__":
    main()
