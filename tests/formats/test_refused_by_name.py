"""What krona does not read is named, each kind in its own sentence, with a way out that exists."""

import importlib

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from krona_hub.bases.base import Base
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.checkpoints.header import read_header
from krona_hub.checkpoints.reader import read_scalars
from krona_hub.errors import KronaError, UnrecognisedError, UnsupportedError
from krona_hub.formats.parsing.foreign import ALGORITHMS
from krona_hub.formats.parsing.keys import FOREIGN
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.reading.reader import read
from tests import single_file, tiny
from tests.formats.files_on_disk import CONV, TINY, TO_Q, Q, module, rand, save
from tests.shared import shared

VAGUE = ("Unknown key", "No adapter weights found", "Is this a checkpoint", "unsupported algorithms")
LORA = module(Q, lora_up=rand(12, 2), lora_down=rand(2, 10))


def refusal(path, **more) -> KronaError:
    with pytest.raises(KronaError) as caught:
        read(path, **more)
    error = caught.value
    assert error.fix and str(path) in error.cause
    assert not any(words in str(error) for words in VAGUE)
    return error


# --- algorithms ------------------------------------------------------------------------------------------------------


def of_lycoris(algorithm, folder):
    """A file as LyCORIS saves it, with a linear layer of 24 inputs and 16 outputs."""
    module = importlib.import_module(f"lycoris.modules.{MODULES[algorithm][0]}")
    layer = getattr(module, MODULES[algorithm][1])("lycoris_to_q", nn.Linear(24, 16), 1.0, 4, 2)
    return save(folder, {f"lycoris_to_q.{k}": v.detach().clone() for k, v in layer.state_dict().items()})


MODULES = {
    "tlora": ("tlora", "TLoraModule"), "glora": ("glora", "GLoRAModule"), "diag-oft": ("diag_oft", "DiagOFTModule"),
    "boft": ("boft", "ButterflyOFTModule"), "ia3": ("ia3", "IA3Module"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("algorithm", "name"),
    [("tlora", "T-LoRA"), ("glora", "GLoRA"), ("diag-oft", "OFT or BOFT"), ("boft", "OFT or BOFT"), ("ia3", "IA3")],
)
def test_an_algorithm_of_lycoris_is_named(algorithm, name, tmp_path):
    error = refusal(of_lycoris(algorithm, tmp_path))
    assert isinstance(error, UnsupportedError) and f"{name} (1 module, e.g. 'lycoris_to_q')" in error.cause
    assert ALGORITHMS[name].cause in error.cause and "Merge it into its base model" in error.fix


@pytest.mark.parametrize(
    "kind", ["VeraConfig", "OFTConfig", "BOFTConfig", "IA3Config", "C3AConfig", "FourierFTConfig", "HRAConfig",
             "AdaLoraConfig", "GraloraConfig", "DeloraConfig", "ShiraConfig", "RandLoraConfig", "MissConfig"],
)  # fmt: skip
def test_an_algorithm_of_peft_is_named_with_and_without_its_configuration(kind, tmp_path):
    import peft

    more = {
        "IA3Config": {"feedforward_modules": []}, "AdaLoraConfig": {"total_step": 9}, "C3AConfig": {"block_size": 8},
        "FourierFTConfig": {"n_frequency": 4}, "GraloraConfig": {"r": 4, "gralora_k": 2},
        "OFTConfig": {"oft_block_size": 4, "r": 0}, "BOFTConfig": {"boft_block_size": 4},
        "MissConfig": {"r": 4}, "ShiraConfig": {"r": 2},
    }.get(kind, {})  # fmt: skip
    model = nn.Sequential()
    model.add_module("to_q", nn.Linear(24, 16))
    model = peft.get_peft_model(model, getattr(peft, kind)(target_modules=["to_q"], **more))
    model.save_pretrained(tmp_path / "whole")
    found = {FOREIGN[end] for key in load_file(tmp_path / "whole/adapter_model.safetensors") for end in FOREIGN
             if key.endswith(f".{end}")}  # fmt: skip
    (name,) = found
    alone = tmp_path / "alone.safetensors"
    alone.write_bytes((tmp_path / "whole/adapter_model.safetensors").read_bytes())
    for source in (tmp_path / "whole", alone):
        error = refusal(source)
        assert isinstance(error, UnsupportedError) and name in error.cause and "Merge it into its base" in error.fix


@pytest.mark.parametrize("case", ["sdxl_tlora", "sd15_ia3", "flux1_reshape_and_set_weight"])
def test_a_file_from_the_wild_is_refused_by_name(case):
    path = shared("wild", "files", f"{case}.safetensors")
    name = {"sdxl_tlora": "T-LoRA", "sd15_ia3": "IA3"}.get(case, "Control LoRA")
    assert name in refusal(path).cause


@pytest.mark.parametrize(("end", "name"), FOREIGN.items())
def test_beside_a_lora_a_foreign_module_is_named_and_can_be_skipped(end, name, tmp_path):
    path = save(tmp_path, LORA | {f"other.{end}": rand(3, 2)})
    error = refusal(path, base=TINY)
    assert "other" in error.cause and "is not supported: " in error.cause and "--allow-missing" in error.fix
    assert list(read(path, base=TINY, allow_missing=True).layers) == [TO_Q]
    assert describe(path, base=TINY).unmatched.keys() == {"other"}


def test_every_explained_algorithm_is_one_that_keys_name():
    assert ALGORITHMS.keys() <= set(FOREIGN.values())


# --- control LoRAs, packed and scaled files --------------------------------------------------------------------------


@pytest.mark.parametrize("allow_missing", [False, True])
def test_a_control_lora_is_named_by_its_wider_input_layer(allow_missing, tmp_path):
    base = Base("tiny", None, {"transformer": {"x_embedder": ModuleSpec((12, 5)), "proj_out": ModuleSpec((5, 12))}})
    wide = module("transformer.x_embedder", lora_B=rand(12, 2), lora_A=rand(2, 10))
    other = module("transformer.proj_out", lora_B=rand(5, 3), lora_A=rand(3, 12))
    path = save(tmp_path, wide | other)
    if allow_missing:
        assert list(read(path, base=base, allow_missing=True).layers) == ["transformer.proj_out"]
    else:
        error = refusal(path, base=base)
        assert "Control LoRA (an input layer of 10 instead of 5 channels)" in error.cause
        assert "FluxControlPipeline" in error.fix


def test_a_wrong_shape_elsewhere_is_not_called_a_control_lora(tmp_path):
    wide = save(tmp_path, module(Q, lora_up=rand(12, 2), lora_down=rand(2, 20)))
    assert "ontrol" not in refusal(wide, base=TINY).cause


@pytest.mark.parametrize("allow_missing", [False, True])
@pytest.mark.parametrize("scale", [f"{Q}.lora_up.scale_weight", f"{Q}.lora_up.weight_scale", "scaled_fp8",
                                   f"{Q}.lora_up.comfy_quant"])  # fmt: skip
def test_scaled_fp8_is_never_read_without_its_scales(scale, allow_missing, tmp_path):
    tensors = {name: t.to(torch.float8_e4m3fn) for name, t in LORA.items()} | {scale: torch.tensor([0.25])}
    path = save(tmp_path, tensors)
    for format in (None, "kohya-lora"):
        error = refusal(path, base=TINY, format=format, allow_missing=allow_missing)
        assert "scaled fp8" in error.cause and scale in error.cause and "bf16" in error.fix


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_fp8_without_scales_is_read_exactly_with_its_alpha(dtype, tmp_path):
    tensors = {name: t.to(dtype) for name, t in (LORA | {f"{Q}.alpha": torch.tensor(3.0)}).items()}
    delta = read(save(tmp_path, tensors), base=TINY)[TO_Q].dense().double()
    up, down, alpha = (tensors[f"{Q}.{part}"].double() for part in ("lora_up.weight", "lora_down.weight", "alpha"))
    assert torch.allclose(delta, up @ down * alpha / 2, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_every_scalar_of_fp8_is_read_as_torch_reads_it(dtype, tmp_path):
    numbers = torch.arange(256, dtype=torch.uint8)
    header = read_header(save(tmp_path, {f"n{i:03}": n.view(dtype) for i, n in enumerate(numbers)}))
    found = torch.tensor(list(read_scalars(header, sorted(header.tensors)).values()))
    assert torch.equal(found.nan_to_num(7.5), numbers.view(dtype).float().nan_to_num(7.5))


def test_a_file_packed_for_nunchaku_is_named(tmp_path):
    block = "transformer_blocks.0.qkv_proj"
    path = save(tmp_path, {f"{block}.lora_down": rand(10, 16), f"{block}.lora_up": rand(30, 16)})
    error = refusal(path)
    assert "Nunchaku (1 module" in error.cause and "original adapter" in error.fix


# --- files that are not adapters -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A whole model in one file with the names of its authors, and its diffusers folder."""
    pipe, folder = tiny.sd15(), tmp_path_factory.mktemp("checkpoint")
    tiny.save(pipe, folder / "base")
    return single_file.save(pipe, folder / "model.safetensors"), folder / "base"


@pytest.mark.parametrize("format", [None, "kohya-lora"])
def test_a_checkpoint_is_called_by_its_family(checkpoint, format):
    path, folder = checkpoint
    with single_file.known("tiny-sd", str(folder)):
        error = refusal(path, format=format)
    if format is None:
        assert isinstance(error, UnrecognisedError) and "a checkpoint of tiny-sd, not an adapter" in error.cause
        assert "krona extract BASE MODEL" in error.fix


def test_a_checkpoint_with_ema_copies_says_so(checkpoint, tmp_path):
    path, folder = checkpoint
    tensors = load_file(path)
    copies = {f"model_ema.{k.removeprefix('model.').replace('.', '')}": t.clone() for k, t in tensors.items()
              if k.startswith("model.")}  # fmt: skip
    save_file(tensors | copies, tmp_path / "ema.safetensors")
    with single_file.known("tiny-sd", str(folder)):
        assert "tiny-sd, with EMA copies (model_ema)" in refusal(tmp_path / "ema.safetensors").cause


def test_folders_of_models_are_not_adapters(checkpoint):
    _, folder = checkpoint
    component = refusal(folder / "unet")
    assert "checkpoint of" in component.cause and "krona extract" in component.fix
    pipeline = refusal(folder)
    assert "a model in the layout of diffusers" in pipeline.cause and "krona extract" in pipeline.fix


OTHERS = {
    "Control-LoRA": {"lora_controlnet": rand(1), "input_blocks.1.0.in_layers.2.up": rand(4, 2)},
    "ControlNet": {"controlnet_cond_embedding.conv_in.weight": rand(4, 3, 3, 3)},
    "IP-Adapter": {"image_proj.proj.weight": rand(4, 3), "ip_adapter.1.to_k_ip.weight": rand(4, 3)},
    "textual-inversion": {"clip_g": rand(4, 3), "clip_l": rand(4, 2)},
    "autoencoder": {"decoder.conv_in.weight": rand(4, 3, 3, 3), "encoder.conv_in.weight": rand(4, 3, 3, 3)},
    "whole weights": {"blocks.0.mixer.weight": rand(4, 3), "blocks.0.mixer.bias": rand(4)},
    "no adapter format that krona knows": {"a.b": rand(2, 3)},
    "no adapter format that krona knows (1 tensor": {"blocks.0.new_lora9.down.weight": rand(2, 3)},
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_files_are_named(name, tmp_path):
    assert name in refusal(save(tmp_path, OTHERS[name])).cause


def test_a_whole_weight_beside_a_lora_is_called_that(tmp_path):
    error = refusal(save(tmp_path, LORA | {"conv_out.weight": rand(4, 3)}), base=TINY)
    assert "conv_out.weight: This is a whole weight" in error.cause


# --- convolutions with groups ----------------------------------------------------------------------------------------


class Convolved(nn.Module):
    def __init__(self, ins, outs, groups):
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, padding=1, groups=groups)

    def forward(self, x):
        return self.conv1(x)


GROUPED = [(6, 8, 2), (6, 6, 6), (6, 12, 6)]  # inputs, outputs, groups


def adapted(kind, ins, outs, groups, rank):
    """The model with a random adapter of PEFT, and a base that describes it."""
    import peft

    torch.manual_seed(0)
    config = {
        "LORA": lambda: peft.LoraConfig(r=rank, lora_alpha=3, target_modules=["conv1"], init_lora_weights=False),
        "LOKR": lambda: peft.LoKrConfig(r=rank, alpha=3, target_modules=["conv1"], init_weights=False),
    }[kind]()
    model = peft.get_peft_model(Convolved(ins, outs, groups), config)
    base = Base("tiny", None, {"unet": {"conv1": ModuleSpec((outs, ins // groups, 3, 3), groups=groups)}})
    return model, base


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("ins", "outs", "groups"), GROUPED)
def test_a_peft_lora_of_a_grouped_convolution_is_refused_because_no_weight_holds_it(ins, outs, groups, tmp_path):
    model, base = adapted("LORA", ins, outs, groups, 2 * groups)
    with pytest.raises(NotImplementedError):  # PEFT cannot merge it either
        model.merge_and_unload()
    model.save_pretrained(tmp_path / "lora")
    error = refusal(tmp_path / "lora", base=base, component="unet")
    assert isinstance(error, UnsupportedError) and f"a convolution with {groups} groups" in error.cause
    x = torch.randn(1, ins, 4, 4)
    x[:, : ins // groups] = 0  # all inputs of the first group
    zero = torch.zeros_like(x)
    with torch.no_grad():
        first = slice(0, outs // groups)
        seen = (model(x) - model(zero))[:, first]
    assert seen.abs().max() > 1e-3  # its outputs depend on other groups: more than a grouped weight can do


@pytest.mark.parametrize(("ins", "outs", "groups"), GROUPED)
def test_a_peft_lokr_of_a_grouped_convolution_is_read_as_peft_merges_it(ins, outs, groups, tmp_path):
    model, base = adapted("LOKR", ins, outs, groups, 2)
    before = model.base_model.model.conv1.base_layer.weight.detach().clone()
    model.save_pretrained(tmp_path / "lokr")
    delta = read(tmp_path / "lokr", base=base, component="unet")["unet.conv1"].dense()
    assert torch.allclose(delta.reshape(before.shape), model.merge_and_unload().conv1.weight - before, atol=1e-5)


@pytest.mark.parametrize("algorithm", ["locon", "lokr"])
@pytest.mark.parametrize(("ins", "outs", "groups"), GROUPED)
def test_lycoris_of_a_grouped_convolution_is_read_as_lycoris_computes_it(algorithm, ins, outs, groups, tmp_path):
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.lokr import LokrModule

    torch.manual_seed(0)
    layer = nn.Conv2d(ins, outs, 3, padding=1, groups=groups)
    kind = LoConModule if algorithm == "locon" else LokrModule
    network = kind("x", layer, 1.0, 4, 3)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_()
    base = Base("tiny", None, {"unet": {"conv1": ModuleSpec((outs, ins // groups, 3, 3), groups=groups)}})
    path = save(tmp_path, {f"lora_unet_conv1.{k}": t.detach().clone() for k, t in network.state_dict().items()})
    delta = read(path, base=base, component="unet")["unet.conv1"].dense()
    assert torch.allclose(delta.reshape(layer.weight.shape), network.get_diff_weight(1.0)[0], atol=1e-5)


def test_unequal_ranks_of_a_convolution_are_not_called_groups(tmp_path):
    path = save(tmp_path, module(CONV, lora_up=rand(8, 2, 1, 1), lora_down=rand(3, 6, 3, 3)))
    assert "different ranks" in refusal(path, base=TINY).cause
