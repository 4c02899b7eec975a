"""What was added to a checkpoint is what comes out of it."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from krona_hub import read
from krona_hub.errors import InexpressibleError, LossyError, NoDifferenceError, UsageError
from krona_hub.extraction import extract
from tests.extraction.made import SIZES, kron, lokr, lora, pair

DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def run(folder, **options):
    return extract(folder / "base.safetensors", folder / "tuned.safetensors", folder / "out.safetensors", **options)


def true_errors(folder, adapter, base, tuned):
    """Layer -> ‖ΔW − Δ‖ / ‖Δ‖ by dense arithmetic in float64."""
    errors = {}
    for name in SIZES:
        layer = f"unet.{name.removesuffix('.weight')}"
        delta = tuned[name].double() - base[name].double()
        errors[layer] = float((adapter[layer].dense().double() - delta).norm() / delta.norm())
    return errors


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("terms", [1, 3])
@pytest.mark.parametrize("share", [0.01, 0.1])
def test_as_many_terms_come_out_as_were_put_in(dtype, terms, share, tmp_path):
    pair(tmp_path, kron(4, 8, terms), dtype, share=share)
    report = run(tmp_path, shape="4x8")
    assert [x.terms for x in report.layers] == [terms] * len(SIZES)
    assert report.written
    assert report.checked.startswith("checked: 4/4")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_products_of_few_numbers_round_unevenly_and_are_still_one_term(dtype, tmp_path):
    """A ⊗ (u·v) has many numbers far below an ulp: what their rounding leaves stands above the edge of noise."""
    sizes = {"mid_block.attentions.0.proj_in.weight": (640, 960), "mid_block.resnets.0.conv1.weight": (64, 32, 3, 3)}
    for rank, share in ((1, 0.003), (2, 0.01)):
        pair(tmp_path, lokr(8, 8, rank), dtype, share=share, sizes=sizes)
        report = run(tmp_path, shape="8x8", overwrite=True, allow_loss=True)
        assert [x.terms for x in report.layers] == [1, 1]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reported_error_is_the_true_error(dtype, tmp_path):
    base, tuned, _ = pair(tmp_path, kron(4, 8, 3), dtype)
    report = run(tmp_path, shape="4x8", terms=2, dtype="fp16")
    true = true_errors(tmp_path, read(report.out), base, tuned)
    for row in report.layers:
        assert row.relative_error == pytest.approx(true[row.layer], rel=1e-4, abs=1e-6)
    norms = {x.layer: x.norm for x in report.layers}
    total = sum((true[n] * norms[n]) ** 2 for n in norms) ** 0.5 / sum(v**2 for v in norms.values()) ** 0.5
    assert report.relative_error == pytest.approx(total, rel=1e-4)


@pytest.mark.parametrize("to", ["krona", "lora", "lokr"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_a_faint_difference_is_measured_as_it_is_stored(to, dtype, tmp_path):
    base, tuned, _ = pair(tmp_path, kron(1, 1) if to == "lora" else kron(4, 8), torch.float32, share=1e-7)
    options = {"terms": 1} | ({} if to == "lora" else {"shape": "4x8"})
    report = run(tmp_path, to=to, dtype=dtype, allow_loss=True, **options)
    adapter = read(report.out, base=tmp_path / "base.safetensors", component="unet")
    true = true_errors(tmp_path, adapter, base, tuned)
    assert len(report.layers) == len(SIZES)
    for row in report.layers:
        assert row.relative_error == pytest.approx(true[row.layer], rel=1e-3, abs=1e-6)


def test_the_error_is_that_of_the_dense_svd(tmp_path):
    base, tuned, _ = pair(tmp_path, lora(40), torch.float32)
    report = run(tmp_path, shape="8x4", terms=3, allow_loss=True)
    for row in report.layers:
        name = row.layer.removeprefix("unet.") + ".weight"
        delta = (tuned[name].double() - base[name].double()).flatten(1)
        blocks = delta.reshape(8, delta.shape[0] // 8, 4, delta.shape[1] // 4).transpose(1, 2).reshape(32, -1)
        sigma = torch.linalg.svdvals(blocks)
        assert row.relative_error == pytest.approx(float(sigma[3:].norm() / sigma.norm()), rel=1e-4)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_merged_lora_comes_out_as_a_lora_of_its_rank(dtype, tmp_path):
    pair(tmp_path, lora(4), dtype)
    report = run(tmp_path)
    assert {x.form for x in report.layers} == {"LoRA r4"}
    assert report.beyond_rounding < 0.02


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_lora_merged_into_a_coarse_type_is_found_though_most_of_it_is_rounding(dtype, tmp_path):
    """At ‖ΔW‖/‖W‖ = 1e-3 a bfloat16 checkpoint loses most of ΔW; what the others see of it is whole."""
    sizes = {"mid_block.attentions.0.proj_in.weight": (640, 960), "mid_block.resnets.0.conv1.weight": (64, 32, 3, 3)}
    pair(tmp_path, lora(4), dtype, share=1.5e-3, sizes=sizes)
    report = run(tmp_path, targets="proj_in")
    assert [x.form for x in report.layers] == ["LoRA r4"]
    if dtype == torch.bfloat16:
        assert report.relative_error > 0.5  # of the difference of the stored numbers
        assert report.beyond_rounding < 0.3


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_kronecker_products_are_found_without_their_shape(dtype, tmp_path):
    pair(tmp_path, lokr(8, 4, 1), dtype)
    report = run(tmp_path)
    assert len(report.layers) == len(SIZES)
    for row in report.layers:
        out, in_ = row.weight_shape[0], row.dense_parameters // row.weight_shape[0]
        assert row.parameters < 4 * (out + in_)  # the rank of A is 4: no LoRA is smaller
    pair(tmp_path, kron(8, 4, 1), dtype)
    report = run(tmp_path, overwrite=True)
    for row in report.layers:
        assert row.parameters <= 1.1 * (8 * 4 + row.dense_parameters / (8 * 4))


def test_an_error_is_kept_with_the_fewest_terms_of_a_shape_and_the_smallest_form_of_all(tmp_path):
    base, tuned, _ = pair(tmp_path, kron(4, 8, 3))
    fixed = run(tmp_path, shape="4x8", max_error=0.6, allow_loss=True)
    true = true_errors(tmp_path, read(fixed.out), base, tuned)
    assert max(true.values()) <= 0.6
    fewer = run(tmp_path, shape="4x8", terms=fixed.layers[0].terms - 1 or 1, allow_loss=True, overwrite=True)
    assert fixed.layers[0].terms == 1 or fewer.layers[0].relative_error > 0.6
    free = run(tmp_path, max_error=0.2, overwrite=True)
    assert max(true_errors(tmp_path, read(free.out), base, tuned).values()) <= 0.2 + 1e-6
    assert free.parameters <= fixed.parameters * 3


def test_a_budget_is_kept_and_more_of_it_is_nearer(tmp_path):
    pair(tmp_path, kron(4, 8, 3))
    errors = []
    for budget in ("1%", "3%", "10%"):
        report = run(tmp_path, budget=budget, allow_loss=True, overwrite=True)
        assert report.parameters <= float(budget[:-1]) / 100 * report.dense_parameters
        errors.append(report.relative_error)
    assert errors == sorted(errors, reverse=True)
    fixed = run(tmp_path, shape="4x8", budget="10%", allow_loss=True, overwrite=True)
    assert fixed.parameters <= 0.1 * fixed.dense_parameters


@pytest.mark.parametrize(
    ("to", "rank"), [("lora", 4), ("lycoris-locon", 4), ("lycoris-lokr", 4), ("peft-lora", 4), ("diffusers-lora", 4)]
)
def test_other_formats_hold_the_same_lora(to, rank, tmp_path):
    base, tuned, _ = pair(tmp_path, lora(rank))
    out = tmp_path / ("folder" if to.startswith("peft") else "x.safetensors")
    report = extract(tmp_path / "base.safetensors", tmp_path / "tuned.safetensors", out, to=to)
    adapter = read(out, base=tmp_path / "base.safetensors", component="unet")
    for layer, error in true_errors(tmp_path, adapter, base, tuned).items():
        assert error == pytest.approx(next(x.relative_error for x in report.layers if x.layer == layer), rel=1e-2)


def test_a_lokr_file_gets_the_one_term_it_holds_and_says_what_it_leaves(tmp_path):
    pair(tmp_path, kron(4, 8, 2))
    report = run(tmp_path, to="lokr", shape="4x8", allow_loss=True)
    assert {x.terms for x in report.layers} == {1}
    assert all("2 terms exceed the noise; lycoris-lokr supports one" in x.note for x in report.layers)
    with pytest.raises(InexpressibleError, match="more terms than lycoris-lokr supports"):
        run(tmp_path, to="lokr", shape="4x8", max_error=0.1, overwrite=True)


def test_too_lossy_a_result_is_refused_with_what_would_do(tmp_path):
    pair(tmp_path, lora(40), torch.float32)
    with pytest.raises(
        LossyError, match=r"nothing was written.*--terms \d+ \(error below 50 % with this shape\)"
    ) as refusal:
        run(tmp_path, shape="8x4", terms=1)
    assert refusal.value.exit_code == 3
    assert not (tmp_path / "out.safetensors").exists()
    assert run(tmp_path, shape="8x4", terms=1, allow_loss=True).written


def test_a_dry_run_measures_the_same_and_writes_nothing(tmp_path):
    pair(tmp_path, lora(2))
    dry = run(tmp_path, dry_run=True)
    assert not dry.written
    assert not dry.out.exists()
    assert run(tmp_path).layers == dry.layers


def test_equal_input_gives_equal_bytes_whatever_the_threads(tmp_path):
    pair(tmp_path, kron(4, 8, 2))
    files = []
    for threads in (1, 3):
        report = run(tmp_path, threads=threads, overwrite=True)
        files.append(report.out.read_bytes())
    assert files[0] == files[1]


def test_progress_reaches_its_end(tmp_path):
    pair(tmp_path, lora(2))
    for options in ({"shape": "4x8"}, {}):
        seen: list[tuple[int, int]] = []
        progress = partial(lambda steps, *step: steps.append(step), seen)
        run(tmp_path, overwrite=True, allow_loss=True, progress=progress, **options)
        assert seen[-1][0] == seen[-1][1] == len(seen)


def test_equal_checkpoints_have_nothing_to_extract(tmp_path):
    pair(tmp_path, lora(2))
    base = tmp_path / "base.safetensors"
    with pytest.raises(NoDifferenceError, match="Nothing to extract: all 4 layers are equal"):
        extract(base, base, tmp_path / "x.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_cast_is_no_difference_in_either_direction(dtype, tmp_path):
    pair(tmp_path, lambda out, in_, g: torch.ones(out, in_), dtype, base_dtype=torch.float32, share=0.0)
    base, tuned = tmp_path / "base.safetensors", tmp_path / "tuned.safetensors"
    for first, second in ((base, tuned), (tuned, base)):
        with pytest.raises(NoDifferenceError, match="No difference above rounding: 4 layers"):
            extract(first, second, tmp_path / "x.safetensors", shape="4x8")
        with pytest.raises(NoDifferenceError, match="No difference above rounding"):
            extract(first, second, tmp_path / "x.safetensors")


def test_checkpoints_of_different_dtypes_give_what_was_added(tmp_path):
    pair(tmp_path, lora(3), torch.float16, base_dtype=torch.float32)
    assert {x.form for x in run(tmp_path).layers} == {"LoRA r3"}


def test_layers_that_did_not_change_are_left_out(tmp_path):
    base, tuned, _ = pair(tmp_path, lora(2))
    from safetensors.torch import save_file

    save_file(tuned | {"conv_in.weight": base["conv_in.weight"]}, tmp_path / "tuned.safetensors")
    report = run(tmp_path)
    assert report.unchanged == 1
    assert "unet.conv_in" not in read(report.out).layers


def test_the_file_remembers_what_was_done(tmp_path):
    pair(tmp_path, lora(2))
    report = run(tmp_path)
    provenance = read(report.out).provenance
    assert provenance.method == "extract, shape auto, down to the rounding noise"
    assert provenance.relative_error == pytest.approx(report.relative_error)
    assert load_file(report.out)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"terms": 2, "max_error": 0.1}, "exclude each other"),
        ({"terms": 0}, "Invalid value 0 for --terms"),
        ({"max_error": 1.5}, "Invalid value 1.5 for --max-error"),
        ({"shape": "8x"}, "Invalid shape '8x'"),
        ({"shape": "8x4", "to": "lora"}, "--shape does not apply to a LoRA target"),
        ({"shape_fallback": "nearest"}, "requires --shape"),
        ({"targets": "no_such"}, "selects no layer"),
        ({"component": "text_encoder"}, "not in both"),
        ({"dtype": "int8"}, "Unsupported dtype"),
    ],
)
def test_options_that_mean_nothing_are_refused(options, words, tmp_path):
    pair(tmp_path, lora(2))
    with pytest.raises(UsageError, match=words):
        run(tmp_path, **options)


def test_a_shape_that_does_not_divide_a_layer_is_told_or_replaced(tmp_path):
    pair(tmp_path, kron(4, 8))
    with pytest.raises(ValueError, match=r"unet\.\S+: 7x4 does not divide .*--shape-fallback nearest"):
        run(tmp_path, shape="7x4")
    report = run(tmp_path, shape="7x4", shape_fallback="nearest", allow_loss=True)
    assert all("7x4 does not divide the layer" in x.note for x in report.layers)
    assert len(run(tmp_path, targets="attn1", overwrite=True).layers) == 1
