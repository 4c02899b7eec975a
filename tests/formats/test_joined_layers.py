"""Files whose modules are rows of one layer, or each of several layers: read, described, written back, refused."""

import pytest
import torch

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_table import table
from krona_hub.errors import ConflictError, InexpressibleError, UnsupportedError
from krona_hub.formats.compatibility.naming import ComponentNamings, Names
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.placed_layers import joined, layer_of
from krona_hub.formats.reading.reader import read
from krona_hub.formats.reading.values import base_value
from krona_hub.formats.writing.beside_layers import lycoris_tensors
from krona_hub.formats.writing.module_names import FileNames, homes
from krona_hub.formats.writing.write_plan import gathered
from krona_hub.formats.writing.writer import write
from krona_hub.kron.terms import KronTerms, LowRank, as_lora
from krona_hub.verification import check_fit
from tests.formats.files_on_disk import save
from tests.joined import GATE, HALF, IN, MODULES, PROJ, QUERIES, UP, joined_base, known_to_comfyui, numbers

WO = "diffusion_model.stages.0.1.attention.wo"
SHAPES = {f"transformer.stages.0.1.{name}": shape for name, shape in MODULES.items()}


@pytest.fixture
def base(monkeypatch):
    known_to_comfyui(monkeypatch)
    return joined_base(monkeypatch)


def lora(name, out, in_, rank=3, dtype=torch.float32, seed=1):
    """The tensors of a LoRA with alpha = 2 ≠ rank, and its dense delta by hand."""
    up, down = numbers(seed, out, rank).to(dtype), numbers(seed + 50, rank, in_).to(dtype)
    parts = {f"{name}.lora_up.weight": up, f"{name}.lora_down.weight": down, f"{name}.alpha": torch.tensor(2.0)}
    return parts, 2 / rank * (up.double() @ down.double())


def lokr(name, out, in_, a1, a2, rank=2, seed=3):
    """The tensors of a LoKr whose right factor is a product of `rank`, or dense without; and its dense delta."""
    w1, b1, b2 = numbers(seed, a1, a2), out // a1, in_ // a2
    if not rank:
        w2 = numbers(seed + 1, b1, b2)
        return {f"{name}.lokr_w1": w1, f"{name}.lokr_w2": w2}, torch.kron(w1.double(), w2.double())
    up, down = numbers(seed + 1, b1, rank), numbers(seed + 2, rank, b2)
    parts = {f"{name}.lokr_w1": w1, f"{name}.lokr_w2_a": up, f"{name}.lokr_w2_b": down}
    w2 = 1.5 / rank * (up.double() @ down.double())
    return parts | {f"{name}.alpha": torch.tensor(1.5)}, torch.kron(w1.double(), w2)


def loha(name, out, in_, rank=2, seed=5):
    """The tensors of a LoHa with alpha = 3 ≠ rank, and its dense delta by hand."""
    pairs = [(numbers(seed + i, out, rank), numbers(seed + 9 + i, rank, in_)) for i in range(2)]
    parts = {f"{name}.hada_w{i}_{s}": t for i, pair in enumerate(pairs, 1) for s, t in zip("ab", pair, strict=True)}
    one, two = (a.double() @ b.double() for a, b in pairs)
    return parts | {f"{name}.alpha": torch.tensor(3.0)}, 3 / rank * one * two


def dense(delta):
    return delta.map(torch.Tensor.double).dense()


MAKERS = {
    "lora": lambda name, seed: lora(name, HALF, IN, seed=seed),
    "lora in bf16": lambda name, seed: lora(name, HALF, IN, 5, torch.bfloat16, seed),
    "lokr": lambda name, seed: lokr(name, HALF, IN, 4, 2, None, seed),
    "lokr of low rank": lambda name, seed: lokr(name, HALF, IN, 2, 5, 2, seed),
    "lokr of one block": lambda name, seed: lokr(name, HALF, IN, 1, 2, None, seed),
    "loha": lambda name, seed: loha(name, HALF, IN, seed=seed),
    "dense": lambda name, seed: ({f"{name}.diff": numbers(seed, HALF, IN)}, numbers(seed, HALF, IN).double()),
}


def written(adapter, base, folder):
    """The adapter in the authors' names, which ComfyUI reads."""
    write(adapter, folder / "out.safetensors", tool="comfyui", base=base)
    return folder / "out.safetensors"


# --- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("gate", MAKERS)
@pytest.mark.parametrize("up", MAKERS)
def test_the_blocks_are_stacked_whatever_each_is(up, gate, base, tmp_path):
    one, first = MAKERS[up](UP, 1)
    two, second = MAKERS[gate](GATE, 7)
    adapter = read(save(tmp_path, one | two), base=base)
    assert list(adapter.layers) == [PROJ]
    torch.testing.assert_close(dense(adapter[PROJ]), torch.cat([first, second]), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", MAKERS)
def test_rows_that_the_file_does_not_adapt_are_zero_and_the_structure_is_kept(kind, base, tmp_path):
    tensors, delta = MAKERS[kind](GATE, 2)
    found = read(save(tmp_path, tensors), base=base)[PROJ]
    torch.testing.assert_close(dense(found), torch.cat([torch.zeros(HALF, IN), delta]), rtol=1e-6, atol=1e-7)
    assert found.parameters <= 2 * sum(t.numel() for t in tensors.values()) + 1


def test_a_convolution_is_joined_in_the_shape_of_its_weight():
    parts = [(Placement("x", part=rows), LayerDelta((as_lora(numbers(i, 4, 2), numbers(9 + i, 2, 27)),), (4, 3, 3, 3)))
             for i, rows in enumerate([(4, 8), (0, 4)])]  # fmt: skip
    whole = joined(parts, (8, 3, 3, 3))
    torch.testing.assert_close(whole.dense(), torch.cat([parts[1][1].dense(), parts[0][1].dense()]))


def test_a_dora_is_stacked_if_all_rows_have_a_magnitude(base, tmp_path):
    one, first = lora(UP, HALF, IN)
    two, second = lora(GATE, HALF, IN, 2, seed=4)
    sizes = {UP: 1 + numbers(5, HALF, 1).abs(), GATE: 1 + numbers(6, HALF, 1).abs()}
    scales = {f"{name}.dora_scale": size for name, size in sizes.items()}
    found = read(save(tmp_path, one | two | scales), base=base)[PROJ]
    weight = numbers(8, 2 * HALF, IN).double()
    directed = weight + torch.cat([first, second])
    wanted = directed / directed.norm(dim=1, keepdim=True) * torch.cat([*sizes.values()]) - weight
    torch.testing.assert_close(found.map(torch.Tensor.double).dense(weight), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "scales",
    [{GATE: (HALF, 1)}, {UP: (1, IN), GATE: (1, IN)}, {UP: (HALF, 1), GATE: (1, IN)}, {UP: (1, IN)}],
    ids=["of some rows", "per input", "of two kinds", "of some rows per input"],
)
def test_other_doras_of_its_rows_are_refused(scales, base, tmp_path):
    tensors = lora(UP, HALF, IN)[0] | lora(GATE, HALF, IN)[0]
    tensors |= {f"{name}.dora_scale": torch.ones(shape) for name, shape in scales.items()}
    path = save(tmp_path, tensors)
    with pytest.raises(UnsupportedError, match=r"a part of transformer\.stages\.0\.1\.ff\.proj") as caught:
        read(path, base=base)
    assert caught.value.code == "KH128"
    assert describe(path, base=base).unmatched.keys() == {UP, GATE}


def test_a_dora_of_only_one_module_is_refused(base, tmp_path):
    tensors = lora(UP, HALF, IN)[0] | {f"{UP}.dora_scale": torch.ones(HALF, 1)}
    with pytest.raises(UnsupportedError, match="a magnitude for each row"):
        read(save(tmp_path, tensors), base=base)


@pytest.mark.parametrize("other", ["lora_unet_stages_0_1_mlp_up", PROJ])
def test_the_same_rows_twice_are_a_conflict(other, base, tmp_path):
    height = HALF if "up" in other else 2 * HALF
    tensors = lora(UP, HALF, IN)[0] | lora(GATE, HALF, IN)[0] | lora(other, height, IN, 1)[0]
    with pytest.raises(ConflictError):
        read(save(tmp_path, tensors), base=base)


def test_a_shape_that_is_not_that_of_the_rows_does_not_match(base, tmp_path):
    with pytest.raises(Exception, match="24x10, but the layer of joined is 12x10"):
        read(save(tmp_path, lora(UP, 2 * HALF, IN)[0]), base=base)


def test_every_module_is_described_with_its_layer(base, tmp_path):
    tensors = lora(UP, HALF, IN)[0] | lora(GATE, HALF, IN)[0] | lora(WO, 8, IN)[0] | {f"{UP}.diff_b": numbers(1, HALF)}
    path = save(tmp_path, tensors)
    about = describe(path, base=base)
    assert {m.name: (m.layers, m.weight_shape, m.part) for m in about.modules} == {
        UP: ((PROJ,), (HALF, IN), (0, HALF)),
        GATE: ((PROJ,), (HALF, IN), (HALF, 2 * HALF)),
        WO: (QUERIES, (8, IN), None),
    }
    assert about.matched.startswith("3 of 3 modules and 1 of 1 vector") and not about.unmatched


def test_a_whole_weight_is_compared_with_its_rows_of_the_base():
    whole = numbers(1, 2 * HALF, IN)
    rows = base_value(PROJ, numbers(2, HALF, IN), {PROJ: whole}.get, (HALF, 2 * HALF))
    assert torch.equal(rows, whole[HALF:])


# --- biases ----------------------------------------------------------------------------------------------------------


def test_biases_are_joined_and_split(base, tmp_path):
    up, gate = numbers(1, HALF), numbers(2, HALF)
    both = lora(UP, HALF, IN)[0] | lora(GATE, HALF, IN)[0]
    only = read(save(tmp_path, both | {f"{GATE}.diff_b": gate}), base=base)
    assert torch.equal(only.vectors[f"{PROJ}.bias"], torch.cat([torch.zeros(HALF), gate]))
    adapter = read(save(tmp_path, both | {f"{GATE}.diff_b": gate, f"{UP}.diff_b": up}), base=base)
    assert torch.equal(adapter.vectors[f"{PROJ}.bias"], torch.cat([up, gate]))
    again = read(written(adapter, base, tmp_path), base=base)
    assert torch.equal(again.vectors[f"{PROJ}.bias"], torch.cat([up, gate]))
    with pytest.raises(ConflictError):
        two = {f"{UP}.diff_b": up, "lora_unet_stages_0_1_mlp_up.diff_b": up + 1}
        read(save(tmp_path, both | two), base=base)


# --- writing ---------------------------------------------------------------------------------------------------------


def some_loras():
    found = enumerate(SHAPES.items())
    return {name: as_lora(numbers(i, out, 3), numbers(30 + i, 3, in_)) for i, (name, (out, in_)) in found}


def some_lokrs():
    found = enumerate(SHAPES.items())
    return {
        name: KronTerms(numbers(i, 1, 2, 2), LowRank(numbers(9, 1, out // 2, 2), numbers(i, 1, 2, in_ // 2)))
        for i, (name, (out, in_)) in found
    }


SUMS = {"lora": some_loras, "lokr": some_lokrs}


def in_naming(text, base):
    """The names of a file for an application that finds the layers in this naming only."""
    found = Names(base, {"denoiser": ComponentNamings([text], {})})
    return FileNames("kohya-ldm", table(base), found=found, title="ComfyUI")


@pytest.mark.parametrize("names", ["original", "kohya-ldm", "diffusion_model. authors", "lora_unet_ authors"])
@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_a_layer_is_split_into_its_modules_and_joined_again(kind, names, base):
    sums = SUMS[kind]()
    layers = {name: LayerDelta((sums[name],), SHAPES[name]) for name in (PROJ, "transformer.stages.0.1.ff.out")}
    places = in_naming(names, base).homes(layers) if " " in names else homes(layers, names, table(base))
    stored = gathered(layers, places)
    assert len(stored) == 3 and sorted(d.weight_shape for d in stored.values()) == [(IN, HALF), (HALF, IN), (HALF, IN)]
    for layer, delta in layers.items():
        parts = [(h.placement, layer_of(stored[h.module], h.placement, delta.weight_shape)) for h in places[layer]]
        again = joined(parts, delta.weight_shape)
        torch.testing.assert_close(again.dense(), delta.dense(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", [kind for kind in MAKERS if kind not in ("dense", "loha")])
@pytest.mark.parametrize("both", [True, False])
def test_a_file_survives_the_round_trip(kind, both, base, tmp_path):
    tensors, first = MAKERS[kind](UP, 1)
    more, second = MAKERS[kind](GATE, 7) if both else ({}, torch.zeros(HALF, IN))
    adapter = read(save(tmp_path, tensors | more), base=base)
    path = written(adapter, base, tmp_path)
    names = {m.name for m in describe(path, base=base).modules}
    assert len(names) == 1 + both and all("mlp" in name for name in names)  # nothing is written for rows of zeros
    again = dense(read(path, base=base)[PROJ])
    torch.testing.assert_close(again, torch.cat([first, second]), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_an_adapter_with_diffusers_names_survives_the_trip_through_the_authors_names(kind, base, tmp_path):
    names = (PROJ, "transformer.stages.0.1.glu.proj", *QUERIES)
    sums = SUMS[kind]()
    sums[QUERIES[1]] = sums[QUERIES[0]]
    adapter = Adapter({name: LayerDelta((sums[name],), SHAPES[name]) for name in names}, base.model)
    path = written(adapter, base, tmp_path)
    again = read(path, base=base)
    assert again.layers.keys() == adapter.layers.keys()
    for name, delta in adapter.layers.items():
        torch.testing.assert_close(again[name].dense(), delta.dense(), rtol=1e-6, atol=1e-6)


def test_a_dora_is_split_by_its_rows_and_per_input_refused(base):
    delta = LayerDelta((as_lora(numbers(1, 24, 3), numbers(2, 3, IN)),), (24, IN), 1 + numbers(3, 24).abs())
    places = homes([PROJ], "original", table(base))
    stored, weight = gathered({PROJ: delta}, places), numbers(5, 24, IN)
    for name, rows in ((UP, slice(0, HALF)), (GATE, slice(HALF, 24))):
        torch.testing.assert_close(stored[name].dense(weight[rows]), delta.dense(weight)[rows], rtol=1e-5, atol=1e-6)
    again = joined([(h.placement, stored[h.module]) for h in places[PROJ]], (24, IN))
    torch.testing.assert_close(again.dense(weight), delta.dense(weight), rtol=1e-5, atol=1e-6)
    per_input = LayerDelta(delta.sums, (24, IN), torch.ones(IN), "in")
    with pytest.raises(UnsupportedError, match="cannot be split by rows"):
        gathered({PROJ: per_input}, places)


# --- shared weights --------------------------------------------------------------------------------------------------


def test_a_module_of_two_layers_gives_both_its_delta_and_is_written_once(base, tmp_path):
    tensors, delta = lora(WO, 8, IN)
    adapter = read(save(tmp_path, tensors | {f"{WO}.diff_b": numbers(1, 8)}), base=base)
    assert adapter.layers.keys() == {*QUERIES} and adapter.vectors.keys() == {f"{q}.bias" for q in QUERIES}
    for layer in QUERIES:
        torch.testing.assert_close(dense(adapter[layer]), delta, rtol=1e-6, atol=1e-7)
    path = written(adapter, base, tmp_path)
    assert len(describe(path, base=base).modules) == 1
    again = read(path, base=base)
    assert torch.equal(again.vectors[f"{QUERIES[1]}.bias"], numbers(1, 8))
    torch.testing.assert_close(dense(again[QUERIES[1]]), delta, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("change", ["one layer", "another delta", "another bias"])
def test_layers_that_share_a_weight_are_written_only_if_they_agree(change, base, tmp_path):
    delta = LayerDelta((as_lora(numbers(1, 8, 3), numbers(2, 3, IN)),), (8, IN))
    layers = dict.fromkeys(QUERIES, delta)
    vectors = dict.fromkeys([f"{q}.bias" for q in QUERIES], numbers(4, 8))
    if change == "one layer":
        del layers[QUERIES[0]]
        vectors = {}
    elif change == "another delta":
        layers[QUERIES[1]] = delta.map(lambda t: t * 1.001)
    else:
        vectors[f"{QUERIES[1]}.bias"] = numbers(5, 8)
    with pytest.raises(InexpressibleError) as caught:
        written(Adapter(layers, base.model, vectors=vectors), base, tmp_path)
    assert all(layer in str(caught.value) for layer in QUERIES)


def test_shared_norms_are_written_once_and_only_if_they_agree(base, tmp_path):
    tensors = lora(UP, HALF, IN)[0] | {"lora_unet_stages_0_1_norm_q.w_norm": numbers(1, 4)}
    adapter = read(save(tmp_path, tensors), base=base)
    norms = [f"transformer.stages.0.1.attn{i}.norm_q.weight" for i in (1, 2)]
    assert all(torch.equal(adapter.vectors[name], numbers(1, 4)) for name in norms)
    names = FileNames("kohya-ldm", table(base))
    assert [*lycoris_tensors(adapter.vectors, names, base)] == ["lora_unet_stages_0_1_norm_q.w_norm"]
    in_comfyui = in_naming("diffusion_model. authors", base)
    assert [*lycoris_tensors(adapter.vectors, in_comfyui, base)] == ["diffusion_model.stages.0.1.norm_q.w_norm"]
    for vectors in ({norms[0]: numbers(1, 4)}, {norms[0]: numbers(1, 4), norms[1]: numbers(2, 4)}):
        for known in (names, in_comfyui):
            with pytest.raises(InexpressibleError, match=r"attn1\.norm_q and"):
                lycoris_tensors(vectors, known, base)


def test_the_fit_of_rows_is_checked_as_that_of_layers(base, tmp_path, monkeypatch):
    tensors = (
        lora(UP, HALF, IN)[0] | lora(WO, 8, IN)[0] | {f"{UP}.diff_b": numbers(1, HALF), f"{WO}.diff_b": numbers(1, 8)}
    )
    path = save(tmp_path, tensors)
    monkeypatch.setattr(check_fit, "load_base", lambda _: base)
    monkeypatch.setattr(check_fit, "describe", lambda path, **options: describe(path, base=base))
    check = check_fit.fits(path, "joined")
    assert not check.problems and (check.matched, check.matched_vectors) == (check.total, check.total_vectors) == (2, 2)
