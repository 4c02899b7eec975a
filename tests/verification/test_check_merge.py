"""verify(MERGED, base=BASE, adapters=…): exactly that is in the checkpoint, or what else is, and at which strength."""

import math
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from krona_hub.adapters.adapter import Adapter, LayerDelta, dora_weight
from krona_hub.bases.loading import weight_files
from krona_hub.errors import BaseMismatchError, NotFoundError
from krona_hub.formats.reading.reader import read
from krona_hub.kron.terms import as_lora
from krona_hub.kron.to_lora import dense_sum
from krona_hub.verification import verify
from tests.shared import shared

LOKR, LORA = shared("golden", "lyc_f8_dim1_a2.safetensors"), shared("golden", "kohya_lora_dim4_a1_conv2_a1.safetensors")
DORA = shared("golden", "lyc_dora_out_dim2_a1.safetensors")
TYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"


def base_of(folder, dtype="fp16"):
    """The tiny base as a folder, its weights cast."""
    shutil.copytree(shared("golden", "base"), folder)
    for file in (UNET, TEXT):
        (folder / file).chmod(0o644)
        save_file({n: t.to(TYPES[dtype]) for n, t in load_file(folder / file).items()}, folder / file)
    return folder


def stochastic(true, dtype):
    """Each number up or down to a neighbour on the grid, up as often as it is near that one."""
    down = true.to(dtype)
    down = torch.where(down.double() > true, torch.nextafter(down, torch.tensor(-math.inf, dtype=dtype)), down)
    up = torch.nextafter(down, torch.tensor(math.inf, dtype=dtype))
    share = (true - down.double()) / (up.double() - down.double())
    return torch.where(torch.rand(true.shape, generator=torch.Generator().manual_seed(1)) < share, up, down)


def exact(delta, start):
    """W′ − W in float64."""
    directions = dense_sum(delta.sums).reshape(start.shape)
    if delta.magnitude is None:
        return directions
    return dora_weight(start + directions, delta.magnitude.double(), delta.magnitude_axis) - start


def merged_of(base, out, adapters, *, dtype=None, rounding=torch.Tensor.to, skip=()):
    """round(base + Σ w·ΔW) in float64, written by hand, and the (file, tensor) of every touched tensor."""
    shutil.copytree(base, out)
    touched = []
    tensors = {file: load_file(base / file) for file in (UNET, TEXT)}
    sums = {}
    for source, weight in adapters:
        for layer, delta in read(source, base=shared("golden", "base")).layers.items():
            (place,) = weight_files(base)[layer]
            key = place.path.relative_to(base).as_posix(), place.tensor
            start = tensors[key[0]][key[1]].double()
            sums[key] = sums.get(key, start) + weight * exact(delta, start)
    for (file, name), true in sums.items():
        if name not in skip:
            tensors[file][name] = rounding(true, TYPES[dtype] if dtype else tensors[file][name].dtype)
            touched.append((file, name))
    for file, own in tensors.items():
        save_file(own, out / file)
    return touched


def edit(path, name, change):
    tensors = load_file(path)
    tensors[name] = change(tensors[name].clone())
    save_file(tensors, path)


def flipped(bit):
    def change(tensor):
        bits = tensor.view({2: torch.int16, 4: torch.int32}[tensor.element_size()])
        bits.view(-1)[7] ^= 1 << bit
        return tensor

    return change


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(
    "adapters",
    [((LOKR, 1.0),), ((LORA, -0.6),), ((LOKR, 0.7), (LORA, 1.2)), ((DORA, 0.5),), ((DORA, 1.0), (LORA, 0.1))],
    ids=["lokr", "lora", "both", "dora", "dora and lora"],
)
def test_the_rounded_sum_is_the_same_in_every_type(dtype, adapters, tmp_path):
    base = base_of(tmp_path / "base", dtype)
    touched = merged_of(base, tmp_path / "merged", adapters)
    report = verify(tmp_path / "merged", base=base, adapters=adapters)
    assert report.same and report.exit_code == 0 and report.states == {"same": len(report.tensors)}
    assert sorted((t.file, t.tensor) for t in report.tensors if t.touched) == sorted(touched)
    assert all(not t.unequal for t in report.tensors if not t.touched)


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_stochastic_rounding_is_within_one_unit_and_the_same(dtype, tmp_path):
    base = base_of(tmp_path / "base", dtype)
    merged_of(base, tmp_path / "merged", [(LOKR, 0.8)], rounding=stochastic)
    report = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 0.8)])
    assert report.same and max(t.worst_units for t in report.tensors) == 1


def test_wider_touched_tensors_are_compared_in_their_own_type(tmp_path):
    base = base_of(tmp_path / "base", "bf16")
    merged_of(base, tmp_path / "merged", [(LORA, 0.5)], dtype="fp32")
    assert verify(tmp_path / "merged", base=base, adapters=[(LORA, 0.5)]).same


def test_a_whole_checkpoint_in_another_type_has_the_base_rounded(tmp_path):
    base = base_of(tmp_path / "base", "fp32")
    merged_of(base, tmp_path / "merged", [(LORA, 0.5)])
    for file in (UNET, TEXT):
        path = tmp_path / "merged" / file
        save_file({n: t.half() for n, t in load_file(path).items()}, path)
    assert verify(tmp_path / "merged", base=base, adapters=[(LORA, 0.5)]).same


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("strength", [0.7, -1.0, 2.0])
def test_another_strength_is_found_and_said(dtype, strength, tmp_path):
    base = base_of(tmp_path / "base", dtype)
    merged_of(base, tmp_path / "merged", [(LORA, strength)])
    report = verify(tmp_path / "merged", base=base, adapters=[(LORA, 1.0)])
    assert report.exit_code == 6
    assert {t.state for t in report.tensors if t.touched} == {"other strength"}
    assert report.strengths == (pytest.approx(strength, rel=2e-3),)


def test_of_two_adapters_the_one_with_another_strength_is_found(tmp_path):
    base = base_of(tmp_path / "base")
    merged_of(base, tmp_path / "merged", [(LORA, 0.7), (LOKR, 1.0)])
    report = verify(tmp_path / "merged", base=base, adapters=[(LORA, 1.0), (LOKR, 1.0)])
    for t in report.different:
        one, two = t.strengths
        assert t.state == "other strength" and one == pytest.approx(0.7, abs=0.01)
        assert math.isnan(two) or two == pytest.approx(1.0, abs=0.01)


@pytest.mark.parametrize(("dtype", "size"), [("fp16", 3e-4), ("bf16", 2e-3)])
@pytest.mark.parametrize("strength", [0.0, 0.7])
def test_a_delta_below_the_rounding_is_not_called_merged_where_it_is_not(dtype, size, strength, tmp_path):
    """Most numbers move by one unit at most here, whatever the strength."""
    base, name = base_of(tmp_path / "base", dtype), "down_blocks.0.attentions.0.proj_in.weight"
    edit(base / UNET, name, lambda t: (t.sign() * (0.06 + t.abs().clamp_max(0.06))).clone())
    weights = load_file(base / UNET)
    adapter = small_lora("unet." + name.removesuffix(".weight"), weights[name], size)
    for folder, weight in (("right", 1.0), ("wrong", strength)):
        merged = weights[name].double() + weight * exact(*adapter.layers.values(), weights[name].double())
        shutil.copytree(base, tmp_path / folder)
        save_file({**weights, name: merged.to(weights[name].dtype)}, tmp_path / folder / UNET)
    assert verify(tmp_path / "right", base=base, adapters=[(adapter, 1.0)]).same
    report = verify(tmp_path / "wrong", base=base, adapters=[(adapter, 1.0)])
    (wrong,) = report.different
    assert wrong.worst_units <= 3 and wrong.state == ("not merged" if strength == 0 else "other strength")
    assert report.strengths == (pytest.approx(strength, abs=0.1),)


def small_lora(layer, weight, size):
    """A LoRA whose delta is `size` times as large as the weight."""
    random = torch.Generator().manual_seed(5)
    up, down = torch.randn(len(weight), 4, generator=random), torch.randn(4, weight[0].numel(), generator=random)
    lora = as_lora(up, down)
    scale = size * float(weight.double().norm()) / float(lora.dense().norm())
    return Adapter({layer: LayerDelta((lora.scaled(scale),), tuple(weight.shape))})


@pytest.mark.parametrize("dtype", TYPES)
def test_a_tensor_that_was_not_merged_is_found(dtype, tmp_path):
    base = base_of(tmp_path / "base", dtype)
    touched = merged_of(base, tmp_path / "all", [(LORA, 1.0)])
    merged_of(base, tmp_path / "merged", [(LORA, 1.0)], skip=[touched[3][1]])
    report = verify(tmp_path / "merged", base=base, adapters=[(LORA, 1.0)])
    assert [(t.tensor, t.state, t.strengths) for t in report.different] == [(touched[3][1], "not merged", (0.0,))]
    everywhere = verify(base, base=base, adapters=[(LORA, 1.0)])
    assert {t.state for t in everywhere.tensors if t.touched} == {"not merged"} and everywhere.strengths == (0.0,)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("bit", [1, 4, "sign"])
def test_one_flipped_bit_of_one_number_is_found(dtype, bit, tmp_path):
    base = base_of(tmp_path / "base", dtype)
    (file, name), *_ = merged_of(base, tmp_path / "merged", [(LOKR, 1.0)])
    last = 8 * TYPES[dtype].itemsize - 1
    edit(tmp_path / "merged" / file, name, flipped(last - 16 * (last > 16) if bit == "sign" else bit))
    (found,) = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 1.0)]).different
    assert (found.tensor, found.unequal, found.state) == (name, 1, "differs") and found.worst_units >= 2


def test_the_last_bit_is_one_unit_and_only_exact_refuses_it(tmp_path):
    base = base_of(tmp_path / "base")
    (file, name), *_ = merged_of(base, tmp_path / "merged", [(LOKR, 1.0)])
    edit(tmp_path / "merged" / file, name, flipped(0))
    assert verify(tmp_path / "merged", base=base, adapters=[(LOKR, 1.0)]).same
    (found,) = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 1.0)], exact=True).different
    assert (found.tensor, found.unequal, found.worst_units) == (name, 1, 1)


@pytest.mark.parametrize("bit", [0, 9])
def test_one_flipped_bit_of_an_untouched_tensor_is_found(bit, tmp_path):
    base = base_of(tmp_path / "base")
    merged_of(base, tmp_path / "merged", [(LOKR, 1.0)])
    edit(tmp_path / "merged" / UNET, "conv_in.bias" if bit else "conv_norm_out.weight", flipped(bit))
    (found,) = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 1.0)]).different
    assert (found.state, found.touched, found.unequal) == ("touched", False, 1)


def test_tensors_that_are_gone_new_or_of_another_shape_are_told_apart(tmp_path):
    base = base_of(tmp_path / "base")
    merged_of(base, tmp_path / "merged", [(LOKR, 1.0)])
    path = tmp_path / "merged" / UNET
    tensors = load_file(path)
    tensors["new"], tensors["conv_in.bias"] = torch.ones(3), torch.ones(1)
    del tensors["conv_out.bias"]
    save_file(tensors, path)
    found = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 1.0)]).different
    assert {t.tensor: t.state for t in found} == {
        "conv_in.bias": "other shape", "conv_out.bias": "missing", "new": "added",
    }  # fmt: skip


def test_nan_where_a_number_should_be_is_infinitely_far(tmp_path):
    base = base_of(tmp_path / "base")
    (file, name), *_ = merged_of(base, tmp_path / "merged", [(LOKR, 1.0)])

    def spoil(tensor):
        tensor.view(-1)[0] = math.nan
        return tensor

    edit(tmp_path / "merged" / file, name, spoil)
    (found,) = verify(tmp_path / "merged", base=base, adapters=[(LOKR, 1.0)]).different
    assert found.worst_units == math.inf and found.state == "differs"


def test_a_file_and_a_folder_compare_where_tensors_are_called_alike(tmp_path):
    base = base_of(tmp_path / "base")
    merged_of(base, tmp_path / "merged", [(LOKR, 1.0)])
    shutil.copy(tmp_path / "merged" / UNET, tmp_path / "unet.safetensors")
    report = verify(tmp_path / "unet.safetensors", base=base / "unet", adapters=[(LOKR, 1.0)])
    assert report.same and report.tensors[0].file == "diffusion_pytorch_model.safetensors"
    tensors = load_file(tmp_path / "merged" / UNET)
    (tmp_path / "shards").mkdir()
    for i in range(2):
        part = {n: tensors[n] for n in sorted(tensors)[i::2]}
        save_file(part, tmp_path / f"shards/part-{i}.safetensors")
    assert verify(tmp_path / "shards", base=base / "unet", adapters=[(LOKR, 1.0)]).same


def test_checkpoints_without_a_tensor_in_common_are_an_error(tmp_path):
    save_file({"x": torch.ones(2)}, tmp_path / "x.safetensors")
    base = shared("golden", "base")
    with pytest.raises(BaseMismatchError, match="no tensors in common"):
        verify(tmp_path / "x.safetensors", base=base, adapters=[(LOKR, 1.0)])
    with pytest.raises(NotFoundError, match="no safetensors files"):
        (tmp_path / "empty").mkdir()
        verify(tmp_path / "empty", base=base, adapters=[(LOKR, 1.0)])


def test_weight_zero_means_the_base_byte_for_byte(tmp_path):
    base = base_of(tmp_path / "base")
    report = verify(base, base=base, adapters=[(LOKR, 0.0)])
    assert report.same and not any(t.touched for t in report.tensors)


def test_progress_counts_bytes(tmp_path):
    base, seen = base_of(tmp_path / "base"), []
    verify(base, base=base, adapters=[(LOKR, 1.0)], progress=lambda done, total: seen.append((done, total)))
    assert seen[-1][0] == seen[-1][1] and seen == sorted(seen)
