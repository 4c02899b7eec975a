"""The bytes that every writer writes of every golden adapter: moving code must not change one of them.

`file_digests.json` was recorded before the packages were rearranged, with the same result for every instruction set
(ATEN_CPU_CAPABILITY default, avx2, avx512) and for one and two threads. Since then both tensors of a product have the
wider of their dtypes, with the same values: 20 files of four half-precision adapters were recorded again.
`python -m tests.formats.test_file_bytes OUT.json` records the digests of the code that runs it.
"""

import hashlib
import json
import struct
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

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


HALVES = [sample for sample in SAMPLES if sample["name"] in (
    "lyc_fp16_dim2_a1", "peft_lokr_bf16_r2_a1", "peft_lora_patterns_bf16_r3_a3", "peft_lora_patterns_fp16_r4_a4"
)]  # fmt: skip
PRODUCTS = (
    ("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"), ("lora_up.weight", "lora_down.weight"),
    ("lora_B.weight", "lora_A.weight"),
)  # fmt: skip


@pytest.mark.parametrize("sample", HALVES, ids=lambda s: s["name"])
def test_both_tensors_of_a_product_have_one_dtype_and_others_stay_small(sample, tmp_path):
    """A factor that holds a folded scale is in float32, and AUTOMATIC1111 multiplies without a cast."""
    written(sample, tmp_path)
    pairs = 0
    for path in (p for p in tmp_path.rglob("*") if p.is_file() and p.suffix != ".json" and "-krona" not in p.name):
        dtypes = {key: tensor.dtype for key, tensor in load_file(path).items()}
        for one, other in PRODUCTS:
            own = {key: key.removesuffix(one) + other for key in dtypes if key.endswith(f".{one}")}
            assert all(dtypes[key] == dtypes[beside] for key, beside in own.items()), path.name
            pairs += len(own)
        assert {torch.float16, torch.bfloat16} & {*dtypes.values()} or "diffusekrona" in path.name, path.name
    assert pairs


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        files = {sample["name"]: written(sample, Path(folder)) for sample in SAMPLES}
    Path(sys.argv[1]).write_text(json.dumps({"files": files}, indent=1) + "\n")
