"""Lines of name tables: joins, shared weights, several block numbers, and the two ways to swap halves."""

import pytest
import torch
from safetensors.torch import save_file

from krona_hub.bases import loading
from krona_hub.bases.module_spec import ModuleSpec, Placement, stored_height
from krona_hub.bases.name_rules import apply, parse
from krona_hub.bases.name_table import table
from tests.joined import BLOCKS, HALF, PROJ, QUERIES, checkpoint, joined_base


def applied(text, **shapes):
    return apply(parse(text), {path.replace("__", "."): ModuleSpec(shape) for path, shape in shapes.items()})


def test_a_joined_layer_is_filled_by_equal_shares_in_row_order():
    found = applied("b.{}.(up|gate|third)  t.{}.proj", t__0__proj=(12, 5), t__3__proj=(9, 5), t__4__proj=(10, 5))
    assert found == {
        "b.0.up": (Placement("t.0.proj", part=(0, 4)),),
        "b.0.gate": (Placement("t.0.proj", part=(4, 8)),),
        "b.0.third": (Placement("t.0.proj", part=(8, 12)),),
        "b.3.up": (Placement("t.3.proj", part=(0, 3)),),
        "b.3.gate": (Placement("t.3.proj", part=(3, 6)),),
        "b.3.third": (Placement("t.3.proj", part=(6, 9)),),
    }  # ten rows have no three equal shares


def test_a_shared_module_is_each_of_its_layers():
    found = applied("a.{}.wq  l.{}.(x.to_q&y.to_q)", l__2__x__to_q=(8, 5), l__2__y__to_q=(8, 5), l__3__x__to_q=(8, 5))
    one = Placement("l.2.x.to_q", shared_with=("l.2.y.to_q",))
    assert found == {"a.2.wq": (one, Placement("l.2.y.to_q", shared_with=("l.2.x.to_q",)))}  # block 3 lacks one
    assert one.plain and stored_height(found["a.2.wq"], [8, 8]) == 8


def test_the_numbers_of_a_name_are_the_same_in_the_same_order():
    shapes = {"d__0__1__attn__to_q": (8, 5), "d__1__0__attn__to_q": (8, 5), "d__1__attn__to_q": (8, 5)}
    found = applied("o.{}.{}.in_proj  d.{}.{}.attn.(to_q|to_k)", **shapes, d__1__0__attn__to_k=(4, 5))
    assert found == {"o.1.0.in_proj": (Placement("d.1.0.attn.to_q", (0, 8)), Placement("d.1.0.attn.to_k", (8, 12)))}
    assert set(applied("o.{}.{}.q  d.{}.{}.attn.to_q", **shapes)) == {"o.0.1.q", "o.1.0.q"}
    assert set(applied("o.{}.q  d.{}.attn.to_q", **shapes)) == {"o.1.q"}
    assert set(applied("o.{}.q  d.{}.1.attn.to_q", **shapes)) == {"o.0.q"}  # a fixed number is no block number
    assert set(applied("o.q  d.1.attn.to_q", **shapes)) == {"o.q"}


def test_in_proj_is_the_module_of_in_proj_weight():
    from krona_hub.bases.weight_files import StoredTensor, weights_by_module

    name = "o.1.0.attn.in_proj_weight"
    assert weights_by_module({name: StoredTensor("f", name, (12, 5))}).keys() == {"o.1.0.attn.in_proj"}


@pytest.mark.parametrize("shape", [(8, 4), (16, 6), (24, 4)])
def test_halves_are_always_swapped_and_the_chunks_of_a_modulation_only_if_there_are_two(shape):
    rows = "m  t.proj halves\nn  t.proj swap\no  t.proj"
    found = applied(rows, t__proj=shape)
    swapped = {name: places[0].swap_halves for name, places in found.items()}
    assert swapped == {"m": True, "n": shape[0] == 2 * shape[1], "o": False}


@pytest.mark.parametrize("line", ["a.(x|y)  b.(p|q)", "a  b swop", "a  b.(p|q) swap"])
def test_a_line_that_means_nothing_is_refused(line):
    with pytest.raises(ValueError, match="not a line"):
        parse(line)


# --- checkpoints -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_parameter_of_a_checkpoint_is_read_in_its_own_order(dtype, monkeypatch, tmp_path):
    joined_base(monkeypatch)
    stored, values = checkpoint(dtype)
    save_file({f"model.diffusion_model.{name}": t for name, t in stored.items()}, tmp_path / "base.safetensors")
    base, weights = (
        loading.load_base(tmp_path / "base.safetensors"),
        loading.base_weights(tmp_path / "base.safetensors"),
    )
    assert {layer for layer, _ in base.layers()} <= values.keys() and len(base.components["transformer"]) == 14
    for name, value in values.items():
        assert torch.equal(weights(name), value), name
        assert weights(name).dtype == dtype


def test_a_layer_with_rows_in_no_tensor_is_not_located(monkeypatch):
    base = joined_base(monkeypatch)
    stored, _ = checkpoint()
    del stored["stages.0.1.mlp.gate.weight"], stored["stages.0.1.mlp.up.bias"]
    from krona_hub.bases.weight_files import StoredTensor

    located = {name: StoredTensor(None, name, tuple(t.shape)) for name, t in stored.items()}
    assert {layer for layer, _ in base.layers()} - loading.landed(base, located).keys() == {PROJ}
    places = loading.landed_vectors(base, located)
    assert f"{PROJ}.bias" not in places and f"{PROJ.replace('0.1', '1.0')}.bias" in places
    assert all(places[f"transformer.{b}.attn2.to_q.bias"][0].placement.shared_with for b in BLOCKS)


def test_names_of_joined_and_shared_layers(monkeypatch):
    names = table(joined_base(monkeypatch))
    assert names.find("lora_unet_stages_0_1_mlp_gate") == (Placement(PROJ, part=(HALF, 2 * HALF)),)
    assert names.spell(PROJ, "original") == "diffusion_model.stages.0.1.mlp.up"  # the module of its first rows
    assert [p.layer for p in names.find("diffusion_model.stages.0.1.attention.wo")] == list(QUERIES)
    assert {names.spell(layer, "kohya-ldm") for layer in QUERIES} == {"lora_unet_stages_0_1_attention_wo"}
    shared = names.vector_places("diffusion_model.stages.0.1.norm_q.weight")
    assert [p.layer for p in shared] == [f"transformer.stages.0.1.attn{i}.norm_q" for i in (1, 2)]
