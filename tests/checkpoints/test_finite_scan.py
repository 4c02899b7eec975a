"""The torch-free readers against torch: scalars, and the detection of NaN and infinity."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.checkpoints import finite_scan
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import load, read_scalars
from krona_hub.checkpoints.writer import DTYPE_NAMES, write_tensors
from krona_hub.errors import DtypeError, IncompleteError, NotFoundError, ShapeError

FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
EIGHT_BITS = [torch.float8_e4m3fn, torch.float8_e5m2]
odd_numbers = st.sampled_from([0.0, -0.0, 1.5, -2.0, 6e4, -6e4, 1e-45, float("inf"), -float("inf"), float("nan")])


@settings(deadline=None, max_examples=100)
@given(values=st.lists(odd_numbers, max_size=40), dtype=st.sampled_from(FLOATS), before=st.integers(0, 3))
def test_the_scan_counts_what_torch_counts(tmp_path_factory, values, dtype, before):
    tensor = torch.tensor(values, dtype=torch.float64).to(dtype)
    path = tmp_path_factory.getbasetemp() / "scan.safetensors"
    write_tensors(path, {"t": tensor, "b": torch.ones(before, dtype=torch.float64)}, overwrite=True)
    count = int((~torch.isfinite(tensor)).sum())
    assert finite_scan.scan(read_header(path)) == ({"t": count} if count else {})


@pytest.mark.parametrize("dtype", [*FLOATS, *EIGHT_BITS])
def test_every_pattern_of_bits_is_judged_as_torch_judges_it(tmp_path, dtype):
    """All 2^8 or 2^16 patterns; of wider types, the upper 16 bits."""
    width = torch.empty((), dtype=dtype).element_size()
    upper = torch.arange(2 ** min(8 * width, 16), dtype=torch.int64) << max(8 * width - 16, 0)
    bits = upper.to({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[width])
    tensor = bits.view(dtype)
    write_tensors(tmp_path / "x", {"t": tensor})
    assert finite_scan.scan(read_header(tmp_path / "x"))["t"] == int((~torch.isfinite(tensor.double())).sum())


def test_a_single_nan_is_found_in_any_chunk_and_at_any_offset(tmp_path, monkeypatch):
    monkeypatch.setattr(finite_scan, "PIECE", 14)  # bytes: seven values
    for index in range(30):
        tensor = torch.ones(30).bfloat16()
        tensor[index] = float("nan")
        write_tensors(tmp_path / "x", {"a": torch.ones(1, dtype=torch.uint8), "t": tensor}, overwrite=True)
        assert finite_scan.scan(read_header(tmp_path / "x")) == {"t": 1}


def test_unaligned_data_is_scanned_too(tmp_path):
    from tests.attacks.forge import entry, forged, put

    data = b"\0" + np.array([1.0, np.inf], "<f4").tobytes()
    header = {"odd": entry(0, 1, [1], "U8"), "t": entry(1, 9)}
    assert finite_scan.scan(read_header(put(tmp_path, forged(header, data)))) == {"t": 1}


def test_files_without_numbers_are_finite(tmp_path):
    for name, tensors in {"none": {}, "empty": {"t": torch.ones(0)}, "integers": {"t": torch.full((4,), -1)}}.items():
        write_tensors(tmp_path / name, tensors)
        assert finite_scan.scan(read_header(tmp_path / name)) == {}


def test_a_file_that_vanished_is_told(tmp_path):
    write_tensors(tmp_path / "x", {"t": torch.ones(1)})
    header = read_header(tmp_path / "x")
    (tmp_path / "x").unlink()
    for attempt in (finite_scan.scan, load, lambda h: read_scalars(h, ["t"])):
        with pytest.raises(NotFoundError):
            attempt(header)


PLAIN = [name for name in DTYPE_NAMES if not name.startswith(("float8", "complex"))]


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in PLAIN])
def test_single_numbers_are_read_as_torch_reads_them(tmp_path, dtype):
    wanted = {"zero_d": torch.tensor(1.0).to(dtype), "one_d": torch.tensor([1e-2 * 150]).to(dtype)}
    write_tensors(tmp_path / "x", wanted | {"before": torch.ones(3).half()})
    found = read_scalars(read_header(tmp_path / "x"), wanted)
    assert found == {name: float(tensor) for name, tensor in wanted.items()}


def test_what_is_no_single_number_is_refused(tmp_path):
    write_tensors(
        tmp_path / "x", {"two": torch.ones(2), "none": torch.ones(0), "f8": torch.ones(1).to(torch.float8_e4m3fnuz)}
    )
    header = read_header(tmp_path / "x")
    for name, error in {"two": ShapeError, "none": ShapeError, "f8": DtypeError, "absent": IncompleteError}.items():
        with pytest.raises(error) as caught:
            read_scalars(header, [name])
        assert caught.value.fix
    with pytest.raises(IncompleteError):
        load(header, ["absent"])


def test_only_the_named_tensors_are_loaded(tmp_path):
    write_tensors(tmp_path / "x", {"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)})
    assert list(load(read_header(tmp_path / "x"), ["c", "a"])) == ["a", "c"]


def test_headers_single_numbers_and_the_scan_need_no_torch(tmp_path):
    write_tensors(tmp_path / "x", {"alpha": torch.tensor(4.0)})
    code = (
        "import sys; from krona_hub.checkpoints import finite_scan, header, reader;"
        "from krona_hub.schema import validate, migrate, tensor_layout; h = header.read_header(sys.argv[1]);"
        "print(reader.read_scalars(h, ['alpha']), finite_scan.scan(h), header.structural_findings(sys.argv[1]),"
        "{'torch', 'safetensors', 'jsonschema'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path / "x")], capture_output=True, text=True, check=True)
    assert done.stdout == "{'alpha': 4.0} {} () set()\n"
