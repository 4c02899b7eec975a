"""Every golden adapter in every format: written exactly and read back, or refused with a code."""

import json
from collections import Counter

import pytest

from krona_hub.errors import KronaError
from krona_hub.formats.known.registry import FORMATS
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from tests.shared import SHARED, shared

OWN = {  # format of the sample -> the formats that must hold it whatever else
    "lycoris_lokr": {"lycoris-lokr"}, "lycoris_lokr_kohya": {"lycoris-lokr"}, "lycoris_locon": {"lycoris-locon"},
    "peft_lokr": {"peft-lokr", "lycoris-lokr"}, "peft_lora": {"peft-lora"}, "kohya_lora": {"kohya-lora"},
    "diffusers_lora": {"diffusers-lora", "kohya-lora", "peft-lora", "lycoris-lokr"},
    "diffusers_lokr": {"diffusers-lokr", "lycoris-lokr"}, "diffusekrona": {"diffusekrona"},
    "cloneofsimo": {"diffusers-lora", "kohya-lora", "peft-lora", "lycoris-lokr"},
}  # fmt: skip
WRITABLE = [format.name for format in FORMATS if format.writes]
INDEX = SHARED / "golden" / "index.json"
SAMPLES = json.loads(INDEX.read_text())["samples"] if INDEX.exists() else []


def outcome(adapter, path, format_name, base) -> str:
    """`exact`, or the code of the refusal; anything but a KronaError is a failure."""
    try:
        report = write(adapter, path, format=format_name, base=base)
    except KronaError as error:
        assert error.fix, f"{error} offers nothing"
        return error.code
    assert report.worst_difference < 1e-6 and report.layers == len(adapter)
    return "exact"


@pytest.mark.parametrize("sample", SAMPLES, ids=lambda s: s["name"])
def test_a_golden_adapter_is_written_exactly_or_refused(sample, tmp_path):
    folder, base = shared("golden"), str(shared("golden", "base"))
    several = {"cloneofsimo", "kohya_lora", "diffusers_lora", "lycoris_lokr_kohya"}
    component = None if sample["format"] in several else sample["component"]
    adapter = read(folder / sample["adapter"], base=base, component=component)
    row = {f: outcome(adapter, tmp_path / f, f, base) for f in WRITABLE}
    print(sample["name"], *(f"{name}:{result}" for name, result in row.items()))
    assert row["krona"] == "exact"
    for format_name in OWN[sample["format"]]:
        assert row[format_name] == "exact", f"{format_name} should hold a sample of {sample['format']}"
    assert set(Counter(row.values())) <= {"exact", "KH141"}, row
