"""Single-file checkpoints: every number is that of the dense oracle, in fused, swapped and transposed tensors too."""

import pytest
import torch
from safetensors.torch import load_file

from krona_hub import merge, plan_merge
from krona_hub.adapters.adapter import Adapter
from krona_hub.bases.loading import read, weight_files
from tests import single_file, tiny
from tests.formats import made
from tests.merging.oracle import in_double, rounded

PIPELINES = {"sd15": tiny.sd15, "sdxl": tiny.sdxl, "flux": tiny.flux}
PARTLY = ("to_q", "to_v", "add_q_proj", "proj_mlp", "norm_out.linear", "q_proj", "text_projection")  # of fused tensors


@pytest.fixture(params=PIPELINES)
def case(request, tmp_path):
    """A pipeline, and it as one file in its authors' names, in bfloat16."""
    pipe = PIPELINES[request.param]()
    plain = tiny.save(pipe, tmp_path / "plain")
    single_file.save(pipe, tmp_path / "base.safetensors", torch.bfloat16)
    with single_file.known(f"tiny-{request.param}", plain):
        yield pipe, tmp_path / "base.safetensors"


def held_layers(pipe, file, *endings):
    """The layers of the file with one of the endings."""
    held = weight_files(file)
    return {layer: shape for layer, shape in tiny.layers(pipe, *endings).items() if layer in held}


def assert_is_rounded_sum(file, base, adapter: Adapter, weight: float):
    """Layer by layer W + w·ΔW of the oracle in float64, rounded once; the base's own where there is no delta."""
    before, after = ({n: read(place) for n, place in weight_files(path).items()} for path in (base, file))
    for layer, old in before.items():
        wanted = old
        if layer in adapter.layers:
            delta = in_double(adapter.layers[layer])
            total = old.double() + weight * delta.dense(old.double()).reshape(old.shape)
            wanted = rounded(total, old.dtype)
        assert torch.equal(after[layer], wanted), layer


@pytest.mark.parametrize("kind", ["lora", "lokr"])
def test_some_layers_of_a_fused_tensor_change_and_its_other_rows_do_not(kind, case, tmp_path):
    pipe, base = case
    shapes = held_layers(pipe, base, *PARTLY)
    adapter = made.lora(shapes) if kind == "lora" else made.lokr(shapes, made.by_lycoris(4))
    merge(base, [(adapter, 0.6)], tmp_path / "out.safetensors", exact_rounding=True)
    assert_is_rounded_sum(tmp_path / "out.safetensors", base, adapter, 0.6)
    plan = plan_merge(base, [(adapter, 0.6)])
    changed = {t.name for t in plan.tensors}
    old, new = load_file(base), load_file(tmp_path / "out.safetensors")
    assert list(old) == list(new) and {n for n in old if not torch.equal(old[n], new[n])} == changed


@pytest.mark.parametrize("axis", ["out", "in"])
def test_dora_takes_its_norms_from_its_own_rows_of_a_fused_tensor(axis, case, tmp_path):
    pipe, base = case
    held = weight_files(base)
    shapes = {n: s for n, s in held_layers(pipe, base, "to_q", "to_v", "q_proj", "proj_mlp").items() if len(s) == 2}
    adapter = made.as_dora(made.lora(shapes), lambda n: read(held[n]).float().reshape(shapes[n]), axis)
    merge(base, [(adapter, 0.5)], tmp_path / "out.safetensors", exact_rounding=True)
    assert_is_rounded_sum(tmp_path / "out.safetensors", base, adapter, 0.5)
