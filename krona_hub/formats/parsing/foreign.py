"""Algorithms and quantized files that krona does not read: what they are, and the way out. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from krona_hub.errors import UnsupportedError


class Algorithm(NamedTuple):
    """Why an algorithm is not read, and the way out."""

    cause: str  # completes "<name>: "
    fix: str


def _merged_with(application: str) -> str:
    return f"Merge it into its base model with {application}, and run `krona extract BASE MERGED`."


_LYCORIS = _merged_with("LyCORIS (create_lycoris_from_weights, then merge_to)")
_PEFT = _merged_with("PEFT (merge_and_unload)")
_TRAINER = _merged_with("the application that trained it")
_ROTATION = "it multiplies the base weights by orthogonal matrices instead of adding a difference"
_OTHER = Algorithm("its difference is not a Kronecker or low-rank product", _TRAINER)

_PACKED = (
    "the file stores the weights packed for the 4-bit kernels of one GPU library",
    "Use the original adapter, before its conversion for Nunchaku; use the original model in bf16 for a base model.",
)
ALGORITHMS: Mapping[str, Algorithm] = {
    "T-LoRA": Algorithm(
        "its rank depends on the timestep, and its initial factors, which the file lacks, are subtracted", _LYCORIS
    ),
    "GLoRA": Algorithm("its difference also contains the base weights, multiplied by a low-rank product", _LYCORIS),
    "OFT or BOFT": Algorithm(
        _ROTATION, _merged_with("LyCORIS (create_lycoris_from_weights, then merge_to) or PEFT (merge_and_unload)")
    ),
    "BOFT": Algorithm(_ROTATION, _PEFT),
    "HRA": Algorithm(_ROTATION, _PEFT),
    "RoAd": Algorithm("it rotates and scales the outputs of the layer", _PEFT),
    "IA3": Algorithm("it multiplies the base weights by a factor per input or output", _TRAINER),
    "HiRA": Algorithm("its low-rank product multiplies the base weights element by element", _PEFT),
    "AdaLoRA": Algorithm("a vector (lora_E) scales each rank of its product", _PEFT),
    "LoRA of an embedding": Algorithm("krona adapts linear layers and convolutions only", _PEFT),
    "trainable tokens": Algorithm("krona adapts linear layers and convolutions, not rows of an embedding", _PEFT),
    "VeRA": Algorithm("its random matrices are shared by all layers", _PEFT),
    "PVeRA": Algorithm("its random matrices are shared by all layers", _PEFT),
    "RandLoRA": Algorithm("its random matrices are shared by all layers", _PEFT),
    "VB-LoRA": Algorithm("its factors are sums of vectors from a bank that all layers share", _PEFT),
    "GraLoRA": Algorithm("every block of the weight has its own low-rank product", _PEFT),
    "DeLoRA": Algorithm("its product is normalized and scaled by the norm of the base weights", _PEFT),
    "SHiRA": Algorithm("it changes single entries of the weight", _PEFT),
    "C3A": Algorithm("its difference consists of circulant blocks", _PEFT),
    "FourierFT": Algorithm("its difference is an inverse Fourier transform of a few coefficients", _PEFT),
    "WaveFT": Algorithm("its difference is an inverse wavelet transform of a few coefficients", _PEFT),
    "MiSS": Algorithm("its difference repeats one block over the weight", _PEFT),
    "Bone": Algorithm("its difference repeats one block over the weight", _PEFT),
    "Nunchaku": Algorithm(*_PACKED),
    "GPTQ, AWQ or Nunchaku": Algorithm(
        "these are quantized weights of a model", "Use the model in bf16 or fp16, and quantize it after the merge."
    ),
    "control LoRA": Algorithm(
        "it widens the input layer of the model for a control image",
        "Load it with an application that widens the layer, such as ComfyUI or FluxControlPipeline of diffusers.",
    ),
}
SCALED_FP8 = (".scale_weight", ".weight_scale", ".weight_scale_2", ".scale_input", ".input_scale", ".comfy_quant")


def algorithm(name: str) -> Algorithm:
    """Return why the algorithm of that name, a value of `keys.FOREIGN`, is not read.

    >>> algorithm("IA3").cause
    'it multiplies the base weights by a factor per input or output'
    """
    return ALGORITHMS.get(name, _OTHER)


def unsupported(name: str, where: str = "") -> UnsupportedError:
    """Return the error for modules of that algorithm; `where` names them.

    >>> str(unsupported("SHiRA", " (2 modules)")).partition(".")[0]
    'SHiRA (2 modules) is not supported: it changes single entries of the weight'
    """
    cause, fix = algorithm(name)
    capital = name[0].upper() + name[1:]
    return UnsupportedError(f"{capital}{where} is not supported: {cause}.", fix=fix)


def is_whole_weight(key: str) -> bool:
    """Whether a key of no known grammar names a parameter of a model rather than a part of an adapter.

    >>> is_whole_weight("conv_out.weight"), is_whole_weight("blocks.0.new_lora.down.weight")
    (True, False)
    """
    return key.endswith((".weight", ".bias")) and "lora" not in key.lower()


def refuse_scaled(names: Iterable[str]) -> None:
    """Raise UnsupportedError if the tensors are stored with scales, without which their numbers are wrong."""
    scale = next((name for name in names if name == "scaled_fp8" or name.endswith(SCALED_FP8)), None)
    if scale is not None:
        raise UnsupportedError(
            f"The tensors are quantized with scales (scaled fp8), such as {scale!r}, which krona does not apply.",
            fix="Use the file in bf16 or fp16 from which it was quantized; fp8 without scales can be read.",
        )
