"""The bytes that every writer writes of every golden adapter: moving code must not change one of them.

`file_digests.json` was recorded before the packages were rearranged, with the same result for every instruction set
(ATEN_CPU_CAPABILITY default, avx2, avx512) and for one and two threads.
`python -m tests.formats.test_file_bytes OUT.json` records the digests of the code that runs it.
"""

import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path

import pytest

from krona_hub.errors import KronaError
from krona_hub.formats.known.registry import FORMATS
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from tests.shared import SHARED, shared

DIGESTS = Path(__file__).with_name("file_digests.json")
WRITABLE = [format.name for format in FORMATS if format.writes]
INDEX = SHARED / "golden" / "index.json"
SAMPLES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []
SEVERAL = {"cloneofsimo", "kohya_lora", "diffusers_lora", "lycoris_lokr_kohya"}  # formats that hold several components


def digests(path: Path) -> dict[str, str]:
    """Of every file below `path`, or of itself: the sha256 of the header and of the whole."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    found = {}
    for file in files:
        name = file.relative_to(path).as_posix() if file != path else "."
        content = file.read_bytes()
        found[name] = _sha256(content)
        if file.suffix != ".json":
            size = struct.unpack("<Q", content[:8])[0]
            found[f"{name} header"] = _sha256(content[8 : 8 + size])
    return found


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def written(sample, folder: Path) -> dict[str, dict[str, str] | str]:
    """Format -> digests of the files that it writes of a golden adapter, or the code of the refusal."""
    base = str(shared("golden", "base"))
    component = None if sample["format"] in SEVERAL else sample["component"]
    adapter = read(shared("golden") / sample["adapter"], base=base, component=component)
    outcome = {}
    for name in WRITABLE:
        path = folder / f"{sample['name']}-{name}"
        try:
            write(adapter, path, format=name, base=base)
            outcome[name] = digests(path)
        except KronaError as error:
            outcome[name] = error.code
    return outcome


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
def test_every_writer_writes_the_bytes_it_wrote_before(sample, tmp_path):
    recorded = json.loads(DIGESTS.read_text())
    now = written(sample, tmp_path)
    assert now.keys() == recorded["files"][sample["name"]].keys()
    for name, expected in recorded["files"][sample["name"]].items():
        assert now[name] == expected, name


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        files = {sample["name"]: written(sample, Path(folder)) for sample in SAMPLES}
    Path(sys.argv[1]).write_text(json.dumps({"files": files}, indent=1) + "\n")
