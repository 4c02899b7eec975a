"""Folders for PEFT and files for LyCORIS, loaded by them: the model must compute what base + ΔW computes."""

import json
import logging

import pytest

from krona_hub.errors import InexpressibleError
from krona_hub.formats.writing.writer import write
from tests import tiny
from tests.formats import made

ALL = ("to_q", "to_k", "to_out.0", "proj_in", "ff.net.0.proj", "conv1", "time_emb_proj", "conv_shortcut", "conv_in",
       "q_proj", "fc1")  # fmt: skip
SHAPES = {
    name: {layer: shape for layer, shape in tiny.layers(build(), *ALL).items() if "up_blocks" not in layer}
    for name, build in (("sd15", tiny.sd15), ("sdxl", tiny.sdxl))
}
PEFT = {
    "lora": ("peft-lora", lambda shapes: made.lora(shapes)),
    "lora as lokr": ("peft-lokr", lambda shapes: made.lora(shapes)),
    "lokr, factor 4": ("peft-lokr", lambda shapes: made.lokr(shapes, made.by_peft(4))),
    "lokr, no factor": ("peft-lokr", lambda shapes: made.lokr(shapes, made.by_peft(-1), (1, 3))),
    "lokr, not swapped": ("peft-lokr", lambda shapes: made.lokr(shapes, made.by_peft(16), (None, 1))),
    "lokr, both factored": ("peft-lokr", lambda shapes: made.lokr(shapes, made.by_peft(16), (1,), (1,))),
}


def difference(model, reference) -> float:
    got, want = tiny.output(model), tiny.output(reference)
    return float((got - want).abs().max() / want.abs().max())


@pytest.mark.parametrize("kind", PEFT)
@pytest.mark.parametrize("name", SHAPES)
def test_peft_loads_the_folder_of_every_component(name, kind, tmp_path):
    from peft import PeftModel

    format_name, make = PEFT[kind]
    build = getattr(tiny, name)
    adapter = make(SHAPES[name])
    report = write(adapter, tmp_path / "out", format=format_name, base=tiny.save(build(), tmp_path))
    assert report.layers == len(adapter)
    reference = tiny.components(tiny.added(build(), adapter))
    for component, model in tiny.components(build()).items():
        assert difference(model, reference[component]) > 1e-2
        loaded = PeftModel.from_pretrained(model, str(tmp_path / "out" / component)).eval()
        assert difference(loaded.get_base_model(), reference[component]) < 1e-5, component


def test_peft_loads_a_dora_of_linear_layers_and_convolutions(tmp_path):
    from peft import PeftModel

    pipe = tiny.sd15()
    plain = made.only(made.lora(SHAPES["sd15"]), "unet")
    adapter = made.as_dora(plain, lambda layer: tiny.module_of(pipe, layer).weight)
    write(adapter, tmp_path / "out", tool="peft", base=tiny.save(pipe, tmp_path))
    loaded = PeftModel.from_pretrained(tiny.sd15().unet, str(tmp_path / "out")).eval()
    assert difference(loaded.get_base_model(), tiny.added(pipe, adapter).unet) < 1e-5


def test_a_target_that_ends_like_another_adapts_itself_alone(tmp_path):
    from peft import PeftModel

    pipe = tiny.flux()  # proj_out of the model, and proj_out of its single blocks
    adapter = made.lora({k: s for k, s in tiny.layers(pipe, "proj_out").items() if k == "transformer.proj_out"})
    write(adapter, tmp_path / "out", format="peft-lora", base=tiny.save(pipe, tmp_path))
    loaded = PeftModel.from_pretrained(tiny.flux().transformer, str(tmp_path / "out")).eval()
    assert sum("lora_A" in n and n.endswith("weight") for n, _ in loaded.named_parameters()) == 1
    assert difference(loaded.get_base_model(), tiny.added(pipe, adapter).transformer) < 1e-5


def test_ranks_that_differ_between_like_named_modules_are_kept_apart(tmp_path):
    from peft import PeftModel

    pipe = tiny.flux()
    adapter = made.lora(tiny.layers(pipe, "proj_out"), ranks=(2, 5))
    write(adapter, tmp_path / "out", format="peft-lora", base=tiny.save(pipe, tmp_path))
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["rank_pattern"]
    loaded = PeftModel.from_pretrained(tiny.flux().transformer, str(tmp_path / "out")).eval()
    assert difference(loaded.get_base_model(), tiny.added(pipe, adapter).transformer) < 1e-5


def test_peft_refuses_what_it_cannot_build(tmp_path):
    general = made.lokr(SHAPES["sd15"], lambda shape: (8, 2))
    with pytest.raises(InexpressibleError, match="decompose_factor"):
        write(general, tmp_path / "out", tool="peft")
    assert not list(tmp_path.iterdir())


LYCORIS = {
    "lokr, factor 4": ("lycoris-lokr", lambda shapes: made.lokr(shapes, made.by_lycoris(4))),
    "lokr, factor 8": ("lycoris-lokr", lambda shapes: made.lokr(shapes, made.by_lycoris(8), (None, 2, 1))),
    "lokr, no factor": ("lycoris-lokr", lambda shapes: made.lokr(shapes, made.by_lycoris(-1), (1, 3))),
    "lokr, both factored": ("lycoris-lokr", lambda shapes: made.lokr(shapes, made.by_lycoris(-1), (1, 2), (1, 2))),
    "lora as lokr": ("lycoris-lokr", lambda shapes: made.lora(shapes)),
    "locon": ("lycoris-locon", lambda shapes: made.lora(shapes)),
}


@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("kind", LYCORIS)
def test_lycoris_loads_the_file_and_computes_the_same(kind, dora, tmp_path):
    from lycoris import create_lycoris_from_weights

    format_name, make = LYCORIS[kind]
    pipe = tiny.sdxl()
    adapter = made.only(make(SHAPES["sdxl"]), "unet")
    if dora:
        adapter = made.as_dora(adapter, lambda layer: tiny.module_of(pipe, layer).weight)
    tool = "lycoris" if format_name == "lycoris-lokr" and kind != "lora as lokr" else None
    path = tmp_path / "x.safetensors"
    write(adapter, path, format=format_name, tool=tool, base=tiny.save(pipe, tmp_path))
    network, _ = _quietly(create_lycoris_from_weights, 1.0, str(_renamed(path)), pipe.unet)
    assert len(network.loras) == len(adapter)
    network.apply_to()
    assert difference(pipe.unet, tiny.added(tiny.sdxl(), adapter).unet) < 1e-5


def _renamed(path):
    """create_lycoris_from_weights looks for its own prefix, sd-scripts for lora_unet_: the same file otherwise."""
    from safetensors.torch import load_file, save_file

    tensors = {k.replace("lora_unet_", "lycoris_", 1): t for k, t in load_file(path).items()}
    save_file(tensors, path.with_name("y.safetensors"))
    return path.with_name("y.safetensors")


def _quietly(call, *args):
    logging.disable(logging.CRITICAL)
    try:
        return call(*args)
    finally:
        logging.disable(logging.NOTSET)


def test_lycoris_is_not_given_splits_that_it_does_not_derive(tmp_path):
    general = made.only(made.lokr(SHAPES["sdxl"], lambda s: (8, 2)), "unet")
    with pytest.raises(InexpressibleError, match="LyCORIS derives a shape other than"):
        write(general, tmp_path / "x.safetensors", tool="lycoris")


def test_the_same_adapter_gives_the_same_bytes(tmp_path):
    adapter = made.lora(SHAPES["sd15"])
    for name in ("a", "b"):
        write(adapter, tmp_path / name, format="peft-lora")
    one, two = (sorted(p for p in (tmp_path / n).rglob("*") if p.is_file()) for n in ("a", "b"))
    assert [p.read_bytes() for p in one] == [p.read_bytes() for p in two]
