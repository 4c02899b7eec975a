"""Parameter counts: every integer of the table of adapter sizes, the published figures, and the laws behind them."""

import csv
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from krona_hub.accounting import costs
from krona_hub.accounting.counting import account
from krona_hub.bases import catalog, target_sets
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.errors import KronaError, UsageError
from krona_hub.kron.shapes import choices
from tests.shared import shared

METHODS = {  # column of the table -> the row of an accounting
    "krona_64x8": "KronA 64x8",
    "krona_by_width": "KronA by width",
    "lokr_8_full": "LoKr factor 8 full",
    "lokr_16_full": "LoKr factor 16 full",
    "lokr_-1_rank_4": "LoKr factor -1 rank 4",
    "lora_4": "LoRA rank 4",
    "lora_16": "LoRA rank 16",
    "lora_32": "LoRA rank 32",
}
with Path(__file__).with_name("adapter_sizes.csv").open() as file:
    TABLE = list(csv.DictReader(file))


def sizes(base, component, chosen, **wishes):
    options = {"shapes": ["64x8"], "factors": [8, 16, -1], "ranks": [4, 16, 32]} | wishes
    found = account(base, component=component, targets=chosen, **options)
    return found.modules, {row.method: row for row in found.rows}


@pytest.mark.parametrize("row", TABLE, ids=lambda row: f"{row['base']}-{row['component']}-{row['targets']}")
def test_every_cell_of_the_table_of_adapter_sizes(row):
    """Its KronA cells are without wide kernels, and 64x8 without what it does not divide: `left_out` layers."""
    modules, whole = sizes(row["base"], row["component"], row["targets"])
    flat_modules, flat = sizes(row["base"], row["component"], row["targets"], kernels=False)
    assert modules == int(row["modules"])
    assert modules - flat_modules + len(flat["KronA 64x8"].undivided) == int(row["left_out"])
    for column, method in METHODS.items():
        found = flat if column.startswith("krona") else whole
        assert found[method].parameters == int(row[column]), column


def test_the_table_here_is_the_published_one():
    """Every line of the table beside the project, whole: no row and no cell is left out."""
    lines = [
        [cell.strip() for cell in line.strip().strip("|").split("|")]
        for line in shared("bases", "README.md").read_text().splitlines()
    ]
    published = [cells for cells in lines if len(cells) == 11 and cells[2].isdigit()]
    assert len(published) == len(TABLE)
    for cells, row in zip(published, TABLE, strict=True):
        krona, _, dagger = cells[3].replace(",", "").partition("†")
        numbers = [int(cells[2]), int(dagger or 0), int(krona), *(int(c.replace(",", "")) for c in cells[4:])]
        assert [int(value) for value in list(row.values())[3:]] == numbers


def test_the_figures_of_the_diffusekrona_paper():
    _, sdxl = sizes("sdxl", "unet", "attn", shapes=["64x4", "64x8", "64x16"])
    assert sdxl["LoRA rank 4"].parameters == 5_806_080
    assert [sdxl[f"KronA 64x{a2}"].parameters for a2 in (4, 8, 16)] == [3_874_560, 2_152_320, 1_506_240]
    _, sd15 = sizes("sd15", ["unet", "text_encoder"], "attn", shapes=["64x4"])
    assert sd15["KronA 64x4"].parameters == 520_928
    assert sd15["LoRA rank 4"].parameters == 1_092_096
    assert sd15 == sizes("sd15", "all", "attn", shapes=["64x4"])[1]


@pytest.mark.parametrize(("base", "parameters"), [("sdxl", 5_400_656), ("sd15", 1_816_176)])
def test_a_split_runs_over_channels_times_kernel(base, parameters):
    _, whole = sizes(base, "unet", "attn+ff+conv")
    assert whole["KronA 64x8"].parameters == parameters
    assert whole["KronA 64x8"].undivided == ()
    _, flat = sizes(base, "unet", "attn+ff+conv", kernels=False)
    assert flat["KronA 64x8"].modules < whole["KronA 64x8"].modules


def test_layers_that_a_shape_does_not_divide_are_named_and_not_counted():
    _, found = sizes("krea2", "transformer", "recommended")
    assert found["KronA 64x8"].undivided == ("transformer.text_fusion.projector",)
    assert found["KronA 64x8"].modules == 231
    assert found["LoRA rank 4"].undivided == ()


def test_a_global_64x8_outgrows_a_rank_4_lora_on_wide_transformers_only():
    _, wide = sizes("flux2-dev", "transformer", "attn")
    assert wide["KronA 64x8"].lora_rank > 4 > wide["KronA by width"].lora_rank
    _, narrow = sizes("sdxl", "unet", "attn")
    assert narrow["KronA 64x8"].lora_rank < 4


def test_the_lora_of_the_same_cost_has_the_same_cost():
    _, found = sizes("sdxl", "unet", "attn")
    assert found["LoRA rank 16"].lora_rank == 16
    assert found["KronA 64x8"].lora_rank == pytest.approx(4 * 2_152_320 / 5_806_080)


def test_terms_multiply_and_totals_are_known():
    one, three = (account("sd15", terms=k, shapes=["64x4"], factors=[], ranks=[4]) for k in (1, 3))
    assert [r.parameters for r in three.rows[:2]] == [3 * r.parameters for r in one.rows[:2]]
    assert one.parts[0].total_parameters == 859_520_964
    assert (one.parts[0].config_status, one.parts[0].total_status) == ("F", "H")


@pytest.mark.parametrize("name", catalog.names())
def test_every_component_has_the_three_common_sets(name):
    base = catalog.get(name)
    for component in base.components:
        attn, ff, everything = (target_sets.choose(base, component, t) for t in ("attn", "attn+ff", "all"))
        assert set(attn) < set(ff) <= set(everything), component


def test_a_regular_expression_is_a_target_too():
    modules, _ = sizes("sdxl", "unet", r"mid_block.*attn1\.to_k$")
    assert modules == 10


@pytest.mark.parametrize(
    "options",
    [
        {"targets": "("},
        {"targets": "no such layer"},
        {"shapes": ["64"]},
        {"ranks": [0]},
        {"factors": [0]},
        {"terms": 0},
        {"component": "transformer"},
        {"component": "unet,text"},
    ],
)
def test_a_wish_without_sense_is_an_error_of_usage(options):
    with pytest.raises(UsageError) as error:
        account("sd15", **options)
    assert error.value.fix


def test_a_folder_is_counted_like_a_name():
    found = account(shared("golden", "base").as_posix(), component="all", shapes=["8x4"])
    assert {p.component for p in found.parts} == {"unet", "text_encoder"}
    assert found.parts[0].total_parameters is None


sides = st.integers(1, 96)


@settings(deadline=None, max_examples=40)
@given(sides, sides, st.sampled_from([(), (1, 1), (3, 3)]))
def test_by_width_is_the_least_of_all_splits(out, in_, kernel):
    module = ModuleSpec((out, in_, *kernel))
    best = next(m.cost(module) for m in costs.adapter_kinds([], [], []))
    assert best == min(s.parameters for s in choices(*module.matrix))


@pytest.mark.parametrize("rank", [None, 2, 5, 1000])
@pytest.mark.parametrize("factor", [-1, 4, 8, 7])
@pytest.mark.parametrize("layer", [torch.nn.Linear(96, 40, bias=False), torch.nn.Conv2d(24, 20, 3, bias=False)])
def test_lokr_counts_are_those_of_lycoris_modules(layer, factor, rank):
    from lycoris.modules.lokr import LokrModule

    built = LokrModule("x", layer, 1.0, rank or 100_000, 1, factor=factor, full_matrix=rank is None)
    ours = costs.lokr_parameters(ModuleSpec(tuple(layer.weight.shape)), factor, rank)
    assert ours == sum(p.numel() for n, p in built.named_parameters() if "scalar" not in n and "org_module" not in n)


def test_accounting_never_imports_torch():
    import subprocess

    code = "import sys; from krona_hub.accounting import account; account('sdxl'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_errors_are_krona_errors():
    with pytest.raises(KronaError):
        account("no-such-base")
