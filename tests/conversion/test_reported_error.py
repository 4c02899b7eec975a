"""The error that a conversion reports is that of the file: of the numbers that are read back from it.

The truth is the definition, dense and in float64, from two independent reads. Sources have scalar factors, ranks above
the size of a factor, a scale or none, three dtypes, and numbers from 1e-4, where float16 underflows, to 1e2.
"""

from dataclasses import replace
from itertools import product

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.assets.shipped import folder_of
from krona_hub.bases.loading import base_weights
from krona_hub.conversion import convert
from krona_hub.errors import InexpressibleError, LossyError, NonFiniteError
from krona_hub.formats.known.registry import FORMATS, storage_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.writing.writer import write
from krona_hub.kron.norms import relative_difference
from krona_hub.kron.terms import KronTerms
from tests.conversion.true_error import agrees, true_errors
from tests.shared import ROOT, shared

LAYERS = {  # names in the file of a linear layer and of a convolution -> weight shape, both rectangular
    "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k": (32, 24),
    "lora_unet_down_blocks_1_resnets_0_conv1": (64, 32, 3, 3),
}
WRITABLE = [known.name for known in FORMATS if known.writes]
DTYPES = (None, "float16", "bfloat16", "float32")
SOURCES = (torch.bfloat16, torch.float16, torch.float32)
SIZES = (1e-4, 1e-2, 1.0, 1e2)  # typical number in a factor


def lokr(a1, rank, left_rank=None):
    """Parts of a LoKr module with A of size a1 x a1; a rank of None is a dense factor."""

    def parts(shape, random):
        (out, in_), kernel = shape[:2], shape[2:]
        inner = in_ // a1 * (9 if kernel else 1)
        left = {"lokr_w1": random(a1, a1)} if left_rank is None else {}
        if left_rank is not None:
            left = {"lokr_w1_a": random(a1, left_rank), "lokr_w1_b": random(left_rank, a1)}
        if rank is None:
            return left | {"lokr_w2": random(out // a1, in_ // a1, *kernel)}
        return left | {"lokr_w2_a": random(out // a1, rank), "lokr_w2_b": random(rank, inner)}

    return parts


def lora(rank):
    def parts(shape, random):
        ones = [1] * (len(shape) - 2)
        return {"lora_up.weight": random(shape[0], rank, *ones), "lora_down.weight": random(rank, *shape[1:])}

    return parts


KINDS = {  # parts, rank
    "scalar A": (lokr(1, 3), 3),
    "scalar A, dense B": (lokr(1, None), 1),
    "low rank": (lokr(4, 3), 3),
    "rank above the size": (lokr(4, 20), 20),
    "both low rank": (lokr(4, 3, 1), 3),
    "both above the size": (lokr(4, 20, 20), 20),
    "dense": (lokr(4, None), 1),
    "LoRA": (lora(5), 5),
    "LoRA above the size": (lora(40), 40),
}


def source_file(path, kind, dtype, size, alpha):
    generator = torch.Generator().manual_seed(3)
    parts, rank = KINDS[kind]
    tensors = {}
    for name, shape in LAYERS.items():
        made = parts(shape, lambda *s: (torch.randn(*s, generator=generator) * size).to(dtype))
        tensors |= {f"{name}.{part}": tensor for part, tensor in made.items()}
        tensors[f"{name}.alpha"] = torch.tensor(float(rank if alpha == "rank" else 0.75 * rank + 0.5))
    save_file(tensors, path, {"ss_network_module": "lycoris.kohya"})
    return path


def method_for(to, kind):
    """Options where the kinds differ: an equal LoRA, or one term however lossy. Otherwise the factors are kept."""
    if storage_of(to).kind == "kronecker" and kind.startswith("LoRA"):
        return {"shape": "4x4"}
    return {} if storage_of(to).kind == "low-rank" and kind.startswith("LoRA") else {"exact": True}


def cases(seed):
    """Every kind once, with source dtypes, sizes and scales in turn."""
    for i, kind in enumerate(KINDS, start=seed):
        yield kind, SOURCES[i % 3], SIZES[i // 3 % 4], ("rank", "other")[i // 5 % 2]


def check(case, to, dtype, folder):
    """Convert, and compare the report with two reads; return whether the target can hold the result."""
    (kind, stored, size, alpha), base = case, shared("golden", "base")
    label = f"{kind}, {stored}, {size:g}, alpha {alpha}"
    source = source_file(folder / "source.safetensors", kind, stored, size, alpha)
    out = folder / ("out" if storage_of(to).folder else "out.safetensors")
    options = {"to": to, "dtype": dtype, "base": base, "overwrite": True, "allow_loss": True} | method_for(to, kind)
    try:
        report = convert(source, out, **options)
    except NonFiniteError:
        assert dtype == "float16" and size == max(SIZES), label  # the largest product overflows, however balanced
        return False
    except InexpressibleError:
        return False
    errors, total = true_errors(read(source, base=base), read(out, base=base))
    for row in report.layers:
        assert agrees(row.relative_error, errors[row.layer]), f"{label}: {row.relative_error}, {errors[row.layer]}"
    assert agrees(report.relative_error, total), label
    if dtype in (None, "float32") and "shape" not in options:
        assert total < 1e-6, f"{label}: {total}"
    return True


TARGETS = [pair for pair in product(WRITABLE, DTYPES) if pair[0] != "diffusekrona"]


@pytest.mark.parametrize(("to", "dtype"), TARGETS)
def test_the_reported_error_is_that_of_the_file(to, dtype, tmp_path):
    written = [check(case, to, dtype, tmp_path) for case in cases(TARGETS.index((to, dtype)))]
    assert sum(written) >= 5


def test_a_dry_run_reports_the_errors_of_the_file(tmp_path):
    source = source_file(tmp_path / "source.safetensors", "rank above the size", torch.bfloat16, 1e-4, "other")
    for to, dtype in (("lycoris-lokr", "float16"), ("peft-lokr", "bfloat16"), ("krona", "float16")):
        options = {"to": to, "dtype": dtype, "base": shared("golden", "base")}
        trial = convert(source, tmp_path / "out", dry_run=True, **options)
        report = convert(source, tmp_path / to, **options)
        assert not trial.written and trial.relative_error > 1e-5
        assert [x.relative_error for x in trial.layers] == [x.relative_error for x in report.layers]


def test_a_half_precision_product_is_kept_exactly_in_float32_without_a_dtype(tmp_path):
    source = source_file(tmp_path / "source.safetensors", "scalar A", torch.bfloat16, 1.0, "rank")
    report = convert(source, tmp_path / "out.safetensors", to="kohya-lora", base=shared("golden", "base"), exact=True)
    assert report.relative_error < 1e-6
    stored = load_file(tmp_path / "out.safetensors")
    assert {t.dtype for name, t in stored.items() if name.endswith("lora_up.weight")} == {torch.float32}
    assert {float(t) for name, t in stored.items() if name.endswith("alpha")} == {3.0}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1.0, 1e-6])
def test_the_error_of_a_fused_term_is_that_of_the_file(dtype, size, tmp_path):
    """q, k and v are multiples of one another and become one term in the names of kohya, rounded once."""
    generator, heights = torch.Generator().manual_seed(4), {"q": 24, "k": 8, "v": 8}
    right = torch.randn(1, 96, 96, generator=generator) * size
    layers = {}
    for (name, a1), factor in zip(heights.items(), (1.0, -0.3, 5.0), strict=True):
        terms = KronTerms(torch.randn(1, a1, 24, generator=generator), right * factor)
        layers[f"transformer.layers.0.attn.to_{name}"] = LayerDelta((terms,), (a1 * 96, 24 * 96))
    write(Adapter(layers), tmp_path / "source.safetensors")
    out = tmp_path / "out.safetensors"
    report = convert(tmp_path / "source.safetensors", out, tool="comfyui", base="lumina2", dtype=dtype)
    found = read(out, base="lumina2")
    for row in report.layers:
        true = relative_difference(found[row.layer].sums, layers[row.layer].sums)
        assert agrees(row.relative_error, true), f"{row.relative_error}, {true}"
        assert true < 1e-2  # float16 would lose a right factor of 1e-6 without a balance
    assert len([name for name in load_file(out) if name.endswith("lokr_w1")]) == 1


# --- DoRA ------------------------------------------------------------------------------------------------------------

DORAS = ("peft_lora_dora_r3_a5", "lyc_loha_dora_in_dim3_a2_conv2_a1.safetensors")


def dora_file(path, size):
    """A PEFT DoRA of the shipped base whose magnitudes are those of the weights times 1 + size, at random."""
    adapter, weights = read(ROOT / "tests" / "samples" / DORAS[0], base="tiny-scenes"), base_weights("tiny-scenes")
    generator, layers = torch.Generator().manual_seed(5), {}
    for layer, delta in adapter.items():
        norms = weights(layer).double().flatten(1).norm(dim=1)
        drift = size * torch.randn(len(norms), generator=generator, dtype=torch.float64)
        layers[layer] = replace(delta, sums=(delta.sums[0].scaled(size),), magnitude=(norms * (1 + drift)).float())
    write(adapter.with_layers(layers), path, base="tiny-scenes")
    return path


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("size", [1.0, 0.1])
def test_the_error_of_a_rounded_magnitude_is_that_of_the_delta(size, dtype, tmp_path):
    """A magnitude rounded by a part of the weight is off by a much larger part of its small change."""
    source, out = dora_file(tmp_path / "source.safetensors", size), tmp_path / "out.safetensors"
    report = convert(source, out, to="lycoris-locon", base="tiny-scenes", dtype=dtype)
    weights = base_weights("tiny-scenes")
    errors, total = true_errors(read(source, base="tiny-scenes"), read(out, base="tiny-scenes"), weights)
    assert all(agrees(row.relative_error, errors[row.layer]) for row in report.layers)
    assert agrees(report.relative_error, total) and total > 1e-5
    assert not any("depends on base weights" in note for note in report.notes)


def test_vectors_that_rounding_destroys_are_refused_with_the_way_out(tmp_path):
    source, out = tmp_path / "source.safetensors", tmp_path / "out.safetensors"
    write(Adapter({}, vectors={"unet.conv_norm_out.weight": torch.full((4,), 1e-9)}), source)
    with pytest.raises(LossyError, match="Rounding to float16") as caught:
        convert(source, out, dtype="float16")
    assert not out.exists() and caught.value.report.relative_error > 0.5 and "float32" in caught.value.fix
    assert convert(source, out, dtype="float32").relative_error < 1e-6


def test_the_error_of_a_dora_without_base_weights_is_that_of_its_numbers(tmp_path):
    source, out = dora_file(tmp_path / "source.safetensors", 0.1), tmp_path / "out.safetensors"
    base = catalog_only(tmp_path)
    report = convert(source, out, to="lycoris-locon", base=base, dtype="bfloat16")
    assert any("depends on base weights (--base)" in note for note in report.notes)
    before, after = read(source, base=base), read(out, base=base)
    for row in report.layers:
        numbers = [(before[row.layer].magnitude, after[row.layer].magnitude)]
        numbers += [tuple(a[row.layer].low_rank_delta() for a in (before, after))]
        assert agrees(row.relative_error, max(float((new.double() - old).norm() / old.norm()) for old, new in numbers))


def catalog_only(folder):
    """The shipped base without its weights."""
    for config in folder_of("tiny-scenes").rglob("config.json"):
        (folder / config.parent.name).mkdir(exist_ok=True)
        (folder / config.parent.name / "config.json").write_bytes(config.read_bytes())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("to", "dtype"), TARGETS)
def test_the_reported_error_is_that_of_the_file_for_all_sources(to, dtype, tmp_path):
    everything = product(KINDS, SOURCES, SIZES)
    written = [check((*case, ("rank", "other")[i % 2]), to, dtype, tmp_path) for i, case in enumerate(everything)]
    assert sum(written) >= 60
