"""Benchmark how long it takes to find the base model of a file among those of the catalog, in CPU seconds.

    python benchmarks/bench_detection.py

Each measurement is a new process, in which nothing is cached: once with the index of the catalog, which opens the base
models that the names of the file point to, and once with all base models opened and compared.
"""

import json
import re
import subprocess
import sys
from statistics import median

from common import RESULTS

from krona_hub.bases import catalog
from krona_hub.bases.name_table import table

FILES = (  # base model, layers, dialect
    ("sd15", r"attn", "kohya"),
    ("sdxl", r"attentions", "kohya-ldm"),
    ("flux1-dev", r"blocks", "kohya-ldm"),
    ("flux1-dev", r"attn\.to_", "diffusers"),
    ("wan21-i2v-14b", r"attn", "original"),
    ("qwen-image", r"attn", "diffusers"),
    ("ltx-2.3", r"attn", "original"),
)
REPEATS = 5
PROBE = """
import json, resource, sys
from krona_hub.bases import catalog, detection
names = json.load(sys.stdin)
if sys.argv[1] == "all":
    detection._promising = lambda modules: [catalog.get(name) for name in catalog.names()]
before = resource.getrusage(resource.RUSAGE_SELF)
found = detection.candidates({name: tuple(shape) for name, shape in names.items()})
after = resource.getrusage(resource.RUSAGE_SELF)
opened = catalog.get.cache_info().currsize
print(json.dumps([after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, opened, found[0].base]))
"""


def modules_of(base: str, pattern: str, dialect: str) -> dict[str, tuple[int, ...]]:
    """Return the names and shapes of an adapter of the layers that match `pattern`."""
    from krona_hub.bases.detection import stored_matrix

    model = catalog.get(base)
    names = table(model)
    found = {}
    for layer, _ in model.layers(model.denoiser):
        if re.search(pattern, layer):
            name = names.spell(layer, dialect)
            found[name] = stored_matrix(model, names.find(name, model.denoiser) or ())
    return found


def measured(modules: dict[str, tuple[int, ...]], how: str) -> tuple[float, int, str]:
    """Return the median CPU seconds, the number of opened base models, and the first candidate."""
    runs = [
        json.loads(
            subprocess.run(
                [sys.executable, "-c", PROBE, how],
                input=json.dumps(modules),
                text=True,
                check=True,
                capture_output=True,
            ).stdout
        )
        for _ in range(REPEATS)
    ]
    return median(run[0] for run in runs), runs[0][1], runs[0][2]


def main() -> None:
    rows = []
    for base, pattern, dialect in FILES:
        modules = modules_of(base, pattern, dialect)
        indexed, opened, first = measured(modules, "index")
        everything, of, other = measured(modules, "all")
        assert first == other, (first, other)
        rows.append(
            {
                "base": base, "dialect": dialect, "modules": len(modules), "opened": opened, "of": of,
                "seconds": indexed, "seconds_all": everything, "ratio": everything / indexed,
            }
        )  # fmt: skip
        print(
            f"{base:14} {dialect:10} {len(modules):5} modules: {opened:3} of {of} base models opened, "
            f"{indexed:.3f} s instead of {everything:.3f} s (ratio {everything / indexed:.1f})"
        )
    (RESULTS / "detection.json").write_text(json.dumps(rows, indent=2) + "\n")


if __name__ == "__main__":
    main()
