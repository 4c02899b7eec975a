"""What other applications add to a weight for one module of an adapter file: the rules of each, stated again.

Nothing here comes from the library. The rules are those that TOOLS.md measured and read, the faults included; the
arithmetic is in float32, strength 1. One function per application takes the tensors of a module by parameter name and
the base weight, and returns the change of that weight, or raises `NotApplied` where the application leaves the layer
out, refuses the file or stops. None of them looks at the metadata of a file, so `lora_adapter_metadata` has no effect.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import wraps
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

Parts = Mapping[str, Tensor]

FORGE_MOST_UNKNOWN_KEYS = 12  # Forge refuses a file whole that has more keys than this without a module
EPS = torch.finfo(torch.float32).eps


class NotApplied(Exception):
    """The application does not change the weight; the argument says why."""


class Target(NamedTuple):
    """The weight of an application's own model, and the window (dimension, start, length) of it or None."""

    weight: str
    rows: list[int] | None


# --- files and names -------------------------------------------------------------------------------------------------

PARAMETER = re.compile(
    r"(?P<module>.+?)(?:\.|_(?=lora\.(?:up|down)\.))(?P<name>"
    r"lora_(?:up|down|mid)\.weight|lora_[AB](?:\.default)?(?:\.(?:weight|bias))?|lora(?:_linear_layer)?\.(?:up|down)\.weight"
    r"|lokr_(?:w[12](?:_[ab])?|t[12])|hada_(?:w[12]_[ab]|t[12])|lora_magnitude_vector(?:\.weight)?|magnitude"
    r"|alpha|dora_scale|scale|diff|diff_b|diff_m|set_weight|w_norm|b_norm)"
)


def modules_of(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by module and parameter. A key that names no known parameter is an error."""
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        match = PARAMETER.fullmatch(key)
        if match is None:
            raise ValueError(f"{key!r} ends in no known parameter")
        modules.setdefault(match["module"], {})[match["name"]] = tensor
    return modules


def finder(rows: Iterable[Mapping]) -> Callable[[str], Target | None]:
    """A lookup in the list of names of one base model: the target of a concrete module name, or None.

    `#` in a pattern stands for digits. A few patterns have two targets, `…linear_#` for instance, because the list does
    not tell the numbers apart: the last number of the name then counts the targets in their order, from 1.
    """
    patterns: dict[str, list[Target]] = {}
    for row in rows:
        for name in row["accepted"]:
            patterns.setdefault(name, []).append(Target(row["weight"], row["rows"]))
    known = [(re.compile(r"\d+".join(map(re.escape, name.split("#")))), found) for name, found in patterns.items()]

    def find(module: str) -> Target | None:
        targets = next((found for pattern, found in known if pattern.fullmatch(module)), [])
        position = int(re.findall(r"\d+", module)[-1]) - 1 if len(targets) > 1 else 0
        return targets[position] if 0 <= position < len(targets) else None

    return find


# --- shared arithmetic -----------------------------------------------------------------------------------------------


def emulated(function):
    """Turns an error of torch into NotApplied, and requires a result of the shape of the weight."""

    @wraps(function)
    def run(parts: Parts, weight: Tensor, *settings) -> Tensor:
        weight = weight.float()
        try:
            delta = function(parts, weight, *settings)
        except (RuntimeError, IndexError) as error:
            raise NotApplied(str(error)) from error
        if delta.shape != weight.shape:
            raise NotApplied(f"shape {tuple(delta.shape)} for a weight of {tuple(weight.shape)}")
        return delta

    return run


def required(parts: Parts, *names: str) -> list[Tensor]:
    missing = [name for name in names if name not in parts]
    if missing:
        raise NotApplied(f"no {', '.join(missing)} among {sorted(parts)}")
    return [parts[name].float() for name in names]


def lora_of(parts: Parts, *spellings: tuple[str, str]) -> tuple[Tensor, Tensor] | None:
    """The factors up and down of a LoRA, in the first spelling that the module has."""
    return next((tuple(required(parts, *names)) for names in spellings if names[0] in parts), None)


def scale_of(parts: Parts, rank: int | None) -> float:
    """alpha / rank; 1 without an alpha, or where nothing has a rank."""
    return float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0


def dtypes_agree(parts: Parts, *names: str) -> None:
    """What a product without a cast demands of the stored tensors."""
    if len({parts[name].dtype for name in names if name in parts}) > 1:
        raise NotApplied(f"{' and '.join(names)} must have the same dtype")


def is_lokr(parts: Parts) -> bool:
    return any(name.startswith("lokr_") for name in parts)


def factor_of(parts: Parts, name: str, core: Callable[..., Tensor], product=torch.mm) -> tuple[Tensor, int | None]:
    """A factor of a LoKr, and its rank or None where it is full. `core` forms a w2 that has a core."""
    if name in parts:
        return parts[name].float(), None
    a, b = required(parts, f"{name}_a", f"{name}_b")
    if name == "lokr_w2" and "lokr_t2" in parts:
        return core(parts["lokr_t2"].float(), a, b), len(b)
    return product(a, b), len(b)


def lokr_of(parts: Parts, core: Callable[..., Tensor]) -> tuple[Tensor, int | None, int | None]:
    """The product of a LoKr without its scale, and the ranks of the two factors."""
    (w1, rank1), (w2, rank2) = factor_of(parts, "lokr_w1", core), factor_of(parts, "lokr_w2", core)
    return kron(w1, w2), rank1, rank2


def tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """The Tucker form of w2, for convolutions of two dimensions; a is (rank, rows)."""
    return torch.einsum("ijkl,ip,jr->prkl", core, a, b).contiguous()


def no_tucker(core: Tensor, a: Tensor, b: Tensor) -> Tensor:
    raise NotApplied("torch.kron of a w2 that is not contiguous: view size is not compatible (torch 2.13)")


def kron(w1: Tensor, w2: Tensor) -> Tensor:
    """w1 ⊗ w2, with the dimensions aligned for a w2 of four only: torch.kron aligns any other at its last ones."""
    return torch.kron(w1[:, :, None, None] if w2.ndim == 4 else w1, w2)


def product_of(up: Tensor, down: Tensor, core: Tensor | None = None) -> Tensor:
    """up · down as a matrix, or with the core of a Tucker LoRA, for convolutions of two dimensions."""
    if core is None:
        return torch.mm(up.flatten(1), down.flatten(1))
    return torch.einsum("mnkl,im,nj->ijkl", core.float(), up.flatten(1), down.flatten(1))


def column_norms(weight: Tensor) -> Tensor:
    """The norm of each input column, shaped (1, in, 1, …)."""
    return weight.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *[1] * (weight.ndim - 2))


def row_norms(weight: Tensor) -> Tensor:
    """The norm of each output row, shaped (out, 1, 1, …)."""
    return weight.flatten(1).norm(dim=1).reshape(-1, *[1] * (weight.ndim - 1))


def decomposed(weight: Tensor, delta: Tensor, parts: Parts, norm: Tensor) -> Tensor:
    """The change that DoRA makes of a change. In place, as the programs do it: a ratio too large is an error."""
    changed = weight + delta
    changed *= parts["dora_scale"].float() / norm
    return changed - weight


# --- applications that ran -------------------------------------------------------------------------------------------

PEFT, KOHYA = ("lora_B.weight", "lora_A.weight"), ("lora_up.weight", "lora_down.weight")
NESTED = ("lora.up.weight", "lora.down.weight")
LINEAR_LAYER = ("lora_linear_layer.up.weight", "lora_linear_layer.down.weight")
MOCHI, NAMED = ("lora_B", "lora_A"), ("lora_B.default.weight", "lora_A.default.weight")


@emulated
def comfyui(parts: Parts, weight: Tensor) -> Tensor:
    """ComfyUI 0.33.0, measured.

    DoRA of the output axis divides by the norm of the base weight; a Tucker LoKr is left out; a w2 of five dimensions
    gives a wrong product. Where a factor itself cannot be formed, ComfyUI stops.
    """
    return comfyui_family(parts, weight, (KOHYA, PEFT, NESTED, MOCHI, LINEAR_LAYER, NAMED))


@emulated
def forge(parts: Parts, weight: Tensor) -> Tensor:
    """Forge dfdcbab685e5, measured: ComfyUI's arithmetic with fewer spellings; on an error the whole file fails.

    Not covered: Forge pads a LoRA of FLUX tools whose number of input columns is not that of the weight.
    """
    return comfyui_family(parts, weight, (KOHYA, PEFT, NESTED, LINEAR_LAYER))


def comfyui_family(parts: Parts, weight: Tensor, spellings: Iterable[tuple[str, str]]) -> Tensor:
    if (full := parts.get("diff", parts.get("w_norm"))) is not None:
        return full.float()
    if is_lokr(parts):
        delta, rank1, rank2 = lokr_of(parts, no_tucker)
        rank = rank2 or rank1
    elif (factors := lora_of(parts, *spellings)) is not None:
        delta, rank = product_of(*factors, parts.get("lora_mid.weight")), len(factors[1])
    else:
        raise NotApplied(f"no adapter among {sorted(parts)}")
    delta = delta.reshape(weight.shape) * scale_of(parts, rank)
    if "dora_scale" not in parts:
        return delta
    on_output = len(parts["dora_scale"]) == len(weight)
    norm = row_norms(weight) if on_output else column_norms(weight + delta)
    return decomposed(weight, delta, parts, norm + EPS)


@emulated
def a1111(parts: Parts, weight: Tensor) -> Tensor:
    """The Lora extension of AUTOMATIC1111 1.10.1, measured.

    DoRA is always taken along the input axis; of `lora_A`, `lora_B` modules the alpha and the DoRA are dropped; the
    products of LoKr factors have no cast. A file of half precision is multiplied in half precision there, which is not
    repeated here. Only linear layers and Conv2d exist; a w2 of five dimensions cannot take the shape of the weight.
    """
    if all(name in parts for name in PEFT):
        parts = {"lora_up.weight": parts["lora_B.weight"], "lora_down.weight": parts["lora_A.weight"]}
    if all(name in parts for name in KOHYA):
        if weight.ndim not in (2, 4):
            raise NotApplied("matched a layer with unsupported type")
        up, down = required(parts, *KOHYA)
        delta, rank = product_of(up, down, parts.get("lora_mid.weight")), len(down)
    elif is_lokr(parts):
        dtypes_agree(parts, "lokr_w1_a", "lokr_w1_b")
        dtypes_agree(parts, "lokr_w2_a", "lokr_w2_b", "lokr_t2")
        delta, rank1, rank2 = lokr_of(parts, tucker)
        rank = rank2 or rank1
        if delta.ndim == 5:
            raise NotApplied("the product is taken for a matrix, and has more elements than that")
    elif "diff" in parts:
        delta, rank = parts["diff"].float(), None
    else:
        raise NotApplied(f"no module type for {sorted(parts)}")
    delta = delta.reshape(weight.shape) * scale_of(parts, rank)
    return delta if "dora_scale" not in parts else decomposed(weight, delta, parts, column_norms(weight + delta))


@emulated
def onetrainer(parts: Parts, weight: Tensor, settings: Mapping[str, object]) -> Tensor:
    """OneTrainer 23df3832e8f2, measured: going on with training under `settings`, its names and its defaults.

    It builds its own modules from the settings and then demands exactly their tensors: the ranks, the split of LyCORIS
    with the smaller factor first, alpha for LoKr, no core in a LoRA. LoKr is scaled by alpha / `lokr_dim` also where
    both factors are full.
    """
    if weight.ndim not in (2, 4):
        raise NotApplied("only Linear and Conv2d are supported layers")
    renamed = {PEFT[0]: KOHYA[0], PEFT[1]: KOHYA[1], NESTED[0]: KOHYA[0], NESTED[1]: KOHYA[1]}
    parts = {renamed.get(name, name): tensor for name, tensor in parts.items()}
    lokr = "lokr_dim" in settings
    if not lokr and "lora_up.weight" in parts and "alpha" not in parts:
        parts["alpha"] = torch.tensor(float(parts["lora_up.weight"].shape[1]))
    dim = int(settings["lokr_dim" if lokr else "lora_rank"])
    rows, *rest = weight.shape
    wanted = {KOHYA[0]: (rows, dim, *[1] * (weight.ndim - 2)), KOHYA[1]: (dim, *rest)}
    wanted = onetrainer_lokr(weight.shape, dim, settings) if lokr else wanted
    by_row = bool(settings.get("lokr_dora_on_output", True) if lokr else settings.get("lora_decompose_output_axis"))
    decompose = settings.get("lokr_weight_decompose" if lokr else "lora_decompose")
    if decompose:
        wanted["dora_scale"] = tuple(row_norms(weight).shape if by_row else column_norms(weight).shape)
    found = {name: tuple(tensor.shape) for name, tensor in parts.items() if name != "alpha"}
    if found != wanted or "alpha" not in parts:
        raise NotApplied(f"the module holds {found}, the settings demand {wanted} and alpha")
    delta = lokr_of(parts, tucker)[0] if lokr else product_of(*required(parts, *KOHYA))
    delta = delta.reshape(weight.shape) * scale_of(parts, dim)
    if not decompose:
        return delta
    norm = row_norms(weight + delta) if by_row else column_norms(weight + delta)
    return decomposed(weight, delta, parts, norm + EPS if lokr else norm)


def onetrainer_lokr(shape: tuple[int, ...], dim: int, settings: Mapping[str, object]) -> dict[str, tuple[int, ...]]:
    rows, columns, *kernel = shape
    factor = int(settings.get("lokr_decompose_factor", -1))
    (a, b), (c, d) = lycoris_split(rows, factor), lycoris_split(columns, factor)
    if settings.get("lokr_decompose_both") and dim < max(a, c) / 2:
        first = {"lokr_w1_a": (a, dim), "lokr_w1_b": (dim, c)}
    else:
        first = {"lokr_w1": (a, c)}
    if settings.get("lokr_full_matrix") or dim >= max(b, d) / 2:
        return {**first, "lokr_w2": (b, d, *kernel)}
    if settings.get("lokr_use_tucker") and any(k != 1 for k in kernel):
        return {**first, "lokr_t2": (dim, dim, *kernel), "lokr_w2_a": (dim, b), "lokr_w2_b": (dim, d)}
    return {**first, "lokr_w2_a": (b, dim), "lokr_w2_b": (dim, d * prod(kernel))}


def lycoris_split(size: int, factor: int) -> tuple[int, int]:
    """Two factors of a size, the smaller one first: `factor` if it divides the size, else the nearest to square."""
    if factor > 0 and size % factor == 0:
        return min(factor, size // factor), max(factor, size // factor)
    limit = size if factor < 0 else max(factor, 1)
    small = max(n for n in range(1, limit + 1) if size % n == 0 and n * n <= size)
    return small, size // small


# --- applications that were read -------------------------------------------------------------------------------------


@emulated
def invokeai(parts: Parts, weight: Tensor) -> Tensor:
    """InvokeAI 8e71a8a51939; its layer classes ran on a few files, the rules beyond those are read.

    The rank of a LoKr is that of w1_b, before that of w2_b. A LoKr with DoRA stops the load. The DoRA of a LoRA is
    taken along the input axis, and then the core of a Tucker LoRA is not read.
    """
    if "dora_scale" in parts and "lora_up.weight" not in parts:
        raise NotApplied("KeyError: lora_up.weight")
    if (factors := lora_of(parts, KOHYA, PEFT)) is not None:
        core = None if "dora_scale" in parts else parts.get("lora_mid.weight")
        delta, rank = product_of(*factors, core), len(factors[1])
    elif "lokr_w1" in parts or "lokr_w1_a" in parts:
        delta, rank1, rank2 = lokr_of(parts, tucker)
        rank = rank1 or rank2
    elif "diff" in parts:
        delta, rank = parts["diff"].float(), None
    else:
        raise NotApplied(f"unsupported lora format: {sorted(parts)}")
    delta = delta.reshape(weight.shape) * scale_of(parts, rank)
    return delta if "dora_scale" not in parts else decomposed(weight, delta, parts, column_norms(weight + delta))


@emulated
def sdcpp(parts: Parts, weight: Tensor) -> Tensor:
    """stable-diffusion.cpp 97d2990807fe, read: merging at load, its mode for weights that are not quantized.

    No DoRA and no core of a LoKr; the scale is 1 where both factors of a LoKr are full. The rank is the first size of
    the down factor that is not 1, since ggml drops the dimensions at the end of its order: rank 1 is taken for as many
    ranks as there are columns. The product of a LoKr never aligns dimensions: it is right for a w2 of two only. Both
    rules were run with ggml d99724f2b141, the program as a whole was not.
    """
    if (factors := lora_of(parts, KOHYA, PEFT)) is not None:
        if weight.ndim > 4:
            raise NotApplied("ggml joins the first two of five dimensions")
        delta, down = product_of(*factors, parts.get("lora_mid.weight")), factors[1]
    elif "diff" in parts:
        delta, down = parts["diff"].float(), None
    elif "lokr_t2" in parts:
        raise NotApplied("the core of w2 is not read")
    elif is_lokr(parts):
        w1, w2 = (factor_of(parts, name, tucker, product_of)[0] for name in ("lokr_w1", "lokr_w2"))
        delta, down = torch.kron(w1, w2), parts.get("lokr_w2_b", parts.get("lokr_w1_b"))
    else:
        raise NotApplied(f"no adapter among {sorted(parts)}")
    rank = None if down is None else next((size for size in down.shape if size != 1), 1)
    return delta.reshape(weight.shape) * scale_of(parts, None if rank == 1 and is_lokr(parts) else rank)


@emulated
def musubi(parts: Parts, weight: Tensor) -> Tensor:
    """musubi-tuner 30c658c4f4b0: LoKr with a full w1 and LoRA of linear layers ran; the rest is read.

    It looks for lokr_w1 only; its product of a LoKr aligns all dimensions and is added as it is, so w2 must have those
    of the weight. LoRA goes into linear layers and Conv2d, its core is ignored. No matrix product has a cast.
    """
    if is_lokr(parts):
        if "lokr_w1" not in parts:
            raise NotApplied("a factored w1 is passed over")
        dtypes_agree(parts, "lokr_w2_a", "lokr_w2_b")
        w2, rank = factor_of(parts, "lokr_w2", no_tucker)
        w1 = parts["lokr_w1"].float().reshape(*parts["lokr_w1"].shape, *[1] * (w2.ndim - 2))
        return torch.kron(w1, w2) * scale_of(parts, rank)
    up, down = required(parts, *KOHYA)
    dtypes_agree(parts, *KOHYA)
    if weight.ndim == 2 and up.ndim == 4:
        up, down = up.squeeze(3).squeeze(2), down.squeeze(3).squeeze(2)
    return merged_lora(up, down, weight) * scale_of(parts, len(down))


@emulated
def kohya(parts: Parts, weight: Tensor) -> Tensor:
    """sd-scripts 48d368fa5577, networks/lora.py: measured on a small U-Net, the odd cases read.

    LoRA of linear layers and Conv2d, under lora_up and lora_down; an alpha of 0 means the rank; a core is ignored.
    """
    up, down = required(parts, *KOHYA)
    delta = merged_lora(up, down, weight)
    return delta if float(parts.get("alpha", 0)) == 0 else delta * scale_of(parts, len(down))


def merged_lora(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    """up · down in its own shape, spread over the weight as the addition of the two tensors does."""
    if weight.ndim not in (2, 4) or up.ndim != weight.ndim or down.ndim != weight.ndim:
        raise NotApplied(f"factors of {up.ndim} and {down.ndim} dimensions for a weight of {weight.ndim}")
    return product_of(up, down).reshape(len(up), *down.shape[1:]).broadcast_to(weight.shape)
