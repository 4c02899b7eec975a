"""Every layout that files hold, against the formula written out densely."""

import pytest
import torch

from krona_hub.formats.reading.reader import read
from krona_hub.kron.terms import LowRank
from tests.formats.files_on_disk import CONV, CONV_LAYER, TINY, TO_Q, Q, module, peft_folder, rand, save


def delta(tmp_path, tensors, layer=TO_Q):
    return read(save(tmp_path, tensors), base=TINY)[layer]


def close(found, wanted):
    return torch.allclose(found.double(), wanted.double(), rtol=1e-5, atol=1e-6)


def test_a_lora_is_alpha_over_rank_times_up_down(tmp_path):
    up, down = rand(12, 3), rand(3, 10)
    found = delta(tmp_path, module(Q, lora_up=up, lora_down=down, alpha=torch.tensor(7.0)))
    assert close(found.dense(), 7 / 3 * up @ down)


def test_without_alpha_the_scale_is_one_and_the_tensors_keep_their_type(tmp_path):
    up, down = rand(12, 3, dtype=torch.bfloat16), rand(3, 10, dtype=torch.float16)
    found = delta(tmp_path, module(Q, lora_up=up, lora_down=down))
    right = found.sums[0].right
    assert isinstance(right, LowRank) and (right.up.dtype, right.down.dtype) == (torch.bfloat16, torch.float16)
    assert close(found.dense(), up.float() @ down.float())


def test_a_scale_makes_the_factor_that_takes_it_float32_and_no_other(tmp_path):
    up, down = rand(12, 3, dtype=torch.float16), rand(3, 10, dtype=torch.float16)
    found = delta(tmp_path, module(Q, lora_up=up, lora_down=down, alpha=torch.tensor(1.0, dtype=torch.float16)))
    right = found.sums[0].right
    assert (right.up.dtype, right.down.dtype) == (torch.float32, torch.float16)
    assert close(found.dense(), up.float() @ down.float() / 3)


def test_a_half_precision_alpha_is_the_stored_value(tmp_path):
    alpha = torch.tensor(2**0.5, dtype=torch.bfloat16)
    up, down = rand(12, 2), rand(2, 10)
    found = delta(tmp_path, module(Q, lora_up=up, lora_down=down, alpha=alpha))
    assert close(found.dense(), 1.4140625 / 2 * up @ down)


def test_an_alpha_of_one_dimension_with_one_number_is_accepted(tmp_path):
    up, down = rand(12, 2), rand(2, 10)
    found = delta(tmp_path, module(Q, lora_up=up, lora_down=down, alpha=torch.tensor([1.0])))
    assert close(found.dense(), up @ down / 2)


def test_a_stored_alpha_of_zero_is_a_zero_delta_and_is_said(tmp_path):
    path = save(tmp_path, module(Q, lora_up=rand(12, 2), lora_down=rand(2, 10), alpha=torch.tensor(0.0)))
    adapter = read(path, base=TINY)
    assert not adapter[TO_Q].dense().any()
    assert any("alpha is 0" in note for note in adapter.provenance.notes)


def test_a_convolution_lora_is_flattened_from_dimension_one(tmp_path):
    up, down = rand(8, 2, 1, 1), rand(2, 6, 3, 3)
    found = delta(tmp_path, module(CONV, lora_up=up, lora_down=down), CONV_LAYER)
    assert close(found.dense(), (up.flatten(1) @ down.flatten(1)).reshape(8, 6, 3, 3))


def test_a_tucker_locon_of_unequal_ranks_is_the_einsum(tmp_path):
    up, mid, down = rand(8, 3, 1, 1), rand(3, 2, 3, 3), rand(2, 6, 1, 1)
    tensors = module(CONV, lora_up=up, lora_mid=mid, lora_down=down, alpha=torch.tensor(5.0))
    wanted = torch.einsum("mnkl,im,nj->ijkl", mid, up.flatten(1), down.flatten(1)) * 5 / 2
    assert close(delta(tmp_path, tensors, CONV_LAYER).dense(), wanted)


W1 = {"full": ("lokr_w1",), "factored": ("lokr_w1_a", "lokr_w1_b")}
W2 = {"full": ("lokr_w2",), "factored": ("lokr_w2_a", "lokr_w2_b"), "tucker": ("lokr_t2", "lokr_w2_a", "lokr_w2_b")}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("second", W2)
@pytest.mark.parametrize("first", W1)
def test_every_lokr_of_a_convolution_is_its_kronecker_product(tmp_path, first, second, flat):
    """Ranks differ (3 and 2), alpha is neither; w2_b and w2 come with and without their kernel."""
    parts = {
        "lokr_w1": rand(2, 3), "lokr_w1_a": rand(2, 3), "lokr_w1_b": rand(3, 3),
        "lokr_w2": rand(4, 2, 3, 3), "lokr_w2_a": rand(4, 2), "lokr_w2_b": rand(2, 2, 3, 3),
        "lokr_t2": rand(2, 5, 3, 3),
    }  # fmt: skip
    if second == "tucker":
        parts |= {"lokr_w2_a": rand(2, 4), "lokr_w2_b": rand(5, 2)}
    stored = {name: parts[name] for name in (*W1[first], *W2[second])}
    w1 = stored["lokr_w1"] if first == "full" else stored["lokr_w1_a"] @ stored["lokr_w1_b"]
    w2 = {
        "full": lambda: parts["lokr_w2"].flatten(1),
        "factored": lambda: parts["lokr_w2_a"] @ parts["lokr_w2_b"].flatten(1),
        "tucker": lambda: torch.einsum("ijkl,ip,jr->prkl", parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"]),
    }[second]()
    if flat and second != "tucker":
        last = W2[second][-1]
        stored[last] = stored[last].flatten(1)
    scale = {("full", "full"): 1, ("factored", "full"): 7 / 3}.get(
        (first, second), 7 / (5 if second == "tucker" else 2)
    )
    found = delta(tmp_path, module(CONV, **stored, alpha=torch.tensor(7.0)), CONV_LAYER)
    assert close(found.dense(), scale * torch.kron(w1.contiguous(), w2.flatten(1).contiguous()).reshape(8, 6, 3, 3))


def test_the_four_dimensional_product_is_the_flattened_one():
    """What decode relies on: trailing 1s on w1 make no difference to where the kernel lies."""
    w1, w2 = rand(2, 3), rand(4, 2, 3, 3)
    assert torch.equal(torch.kron(w1[..., None, None], w2).flatten(1), torch.kron(w1, w2.flatten(1)))


def test_a_split_that_reaches_into_the_kernel_reads(tmp_path):
    """c = 27 divides in·k·k = 54, but not in = 6 (FORMATS §9)."""
    w1, w2 = rand(4, 27), rand(2, 2)
    found = delta(tmp_path, module(CONV, lokr_w1=w1, lokr_w2=w2, alpha=torch.tensor(64.0)), CONV_LAYER)
    assert close(found.dense(), torch.kron(w1, w2).reshape(8, 6, 3, 3))


def test_cdka_is_a_sum_of_several_terms(tmp_path):
    a, b = rand(3, 4, 5), rand(3, 3, 2)
    found = delta(tmp_path, module(Q, cdka_a=a, cdka_b=b, alpha=torch.tensor(4.0)))
    assert found.sums[0].terms == 3
    assert close(found.dense(), 4 / (3 * 2) ** 0.5 * sum(torch.kron(b[i], a[i]) for i in range(3)))


def test_a_stored_difference_is_itself(tmp_path):
    whole = rand(8, 6, 3, 3)
    assert close(delta(tmp_path, module(CONV, diff=whole), CONV_LAYER).dense(), whole)


def test_a_one_by_one_convolution_and_a_linear_layer_are_one_another(tmp_path):
    name = "lora_unet_mid_block_attentions_0_proj_in"
    up, down = rand(10, 2), rand(2, 6)
    found = delta(tmp_path, module(name, lora_up=up, lora_down=down), "unet.mid_block.attentions.0.proj_in")
    assert close(found.dense(), (up @ down).reshape(10, 6, 1, 1))


@pytest.mark.parametrize(("shape", "axis"), [((12, 1), "out"), ((1, 10), "in")])
def test_a_dora_scale_says_its_axis_by_its_shape(tmp_path, shape, axis):
    parts = module(Q, lora_up=rand(12, 2), lora_down=rand(2, 10), dora_scale=rand(*shape).abs())
    found, base = delta(tmp_path, parts), rand(12, 10)
    directed = base + parts[f"{Q}.lora_up.weight"] @ parts[f"{Q}.lora_down.weight"]
    norm = directed.norm(dim=1 if axis == "out" else 0, keepdim=True)
    assert found.magnitude_axis == axis
    assert close(found.dense(base), directed * parts[f"{Q}.dora_scale"] / norm - base)


@pytest.mark.parametrize(("shape", "axis"), [((1, 1), "out"), ((1, 12), "in")])
def test_a_dora_scale_of_one_number_is_per_output_of_a_layer_with_one_output(tmp_path, shape, axis):
    projector = "diffusion_model.txtfusion.projector"
    parts = module(projector, lora_up=rand(1, 2), lora_down=rand(2, 12), dora_scale=rand(*shape).abs())
    path = save(tmp_path, parts)
    found = read(path, base="krea2")["transformer.text_fusion.projector"]
    assert found.magnitude_axis == axis
    assert torch.equal(found.magnitude, parts[f"{projector}.dora_scale"].flatten())


def test_a_peft_magnitude_is_per_output_also_where_its_shape_could_mean_inputs(tmp_path):
    parts = {
        "mid_block.resnets.0.conv1.lora_A.weight": rand(2, 6, 3, 3),
        "mid_block.resnets.0.conv1.lora_B.weight": rand(8, 2, 1, 1),
        "mid_block.resnets.0.conv1.lora_magnitude_vector.weight": rand(1, 8, 1, 1),
    }
    folder = peft_folder(tmp_path / "p", {"peft_type": "LORA", "r": 2, "lora_alpha": 2}, parts)
    assert read(folder, base=TINY, component="unet")[CONV_LAYER].magnitude_axis == "out"


def test_a_conv1d_lokr_of_peft_means_what_peft_computes(tmp_path):
    """The axes of PEFT's product are misaligned there; the file's meaning is PEFT's result (FORMATS §4)."""
    peft = pytest.importorskip("peft")

    model = torch.nn.Sequential(torch.nn.Conv1d(4, 6, 3))
    config = peft.LoKrConfig(r=8, alpha=3, target_modules=["0"], init_weights=False)
    adapted = peft.get_peft_model(model, config)
    wanted = adapted.base_model.model[0].get_delta_weight("default").detach()
    adapted.save_pretrained(tmp_path / "peft")
    text = (tmp_path / "peft" / "adapter_model.safetensors").read_bytes()
    assert b"model.0.lokr_w2" in text  # stored whole: the case in question

    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "peft" / "adapter_model.safetensors")
    renamed = {k.replace("base_model.model.0", "down_blocks.0.resnets.0.conv1"): t for k, t in tensors.items()}
    folder = peft_folder(tmp_path / "renamed", {"peft_type": "LOKR", "r": 8, "alpha": 3}, renamed)
    adapter = read(folder, base=TINY, component="unet")
    assert close(adapter["unet.down_blocks.0.resnets.0.conv1"].dense(), wanted)
    assert any("Conv1d" in note for note in adapter.provenance.notes)
