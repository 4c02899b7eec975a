"""Rules of applications about the factorization of one layer. Torch-free.

Each returns why an application applies such a delta wrongly or not at all, as a clause, or None.
"""

from __future__ import annotations

from collections.abc import Iterable

from krona_hub.formats.compatibility.format_limits import common_peft_factor, lycoris_resumes
from krona_hub.formats.forms.delta_form import LayerFactorization, channel_split, is_factored
from krona_hub.formats.forms.limits import no_dora
from krona_hub.kron.shapes import lycoris_factors


def no_output_dora(form: LayerFactorization) -> str | None:
    if form.dora != "out":
        return None
    return f"{no_dora(form)}, whose norms are computed without the delta or along the other axis"


def no_dora_of_one_row(form: LayerFactorization) -> str | None:
    """Loaders that count the rows of the magnitude take the one row of a layer with one output for its outputs."""
    if form.dora != "in" or form.weight_shape[0] > 1:
        return None
    return "its DoRA magnitude per input has as many rows as the layer has outputs, and is taken for one per output"


def no_lokr_dora(form: LayerFactorization) -> str | None:
    return no_dora(form) if form.lora_rank is None else None


def no_conv(form: LayerFactorization) -> str | None:
    return "it is a convolution, and only linear layers are adapted" if form.is_conv else None


def no_kernel(form: LayerFactorization) -> str | None:
    return "it is a convolution with a kernel, which stops the load" if form.kernel > 1 else None


def no_conv3d(form: LayerFactorization) -> str | None:
    return "it is a three-dimensional convolution, which is not adapted" if len(form.weight_shape) == 5 else None


def only_lycoris_splits(form: LayerFactorization) -> str | None:
    """LyCORIS builds modules from its own factorization, regardless of the file (FORMATS.md §15.6)."""
    if form.lora_rank is not None or not form.sums or not form.sums[0].plain:
        return None
    shape = form.sums[0].shape
    if form.is_conv and form.weight_shape[1] % shape.a2:
        return f"the {shape.a2} columns of A do not divide the {form.weight_shape[1]} input channels"
    if lycoris_resumes(channel_split(form)) or keeps_product_for_lycoris(form):
        return None
    return f"LyCORIS derives a shape other than {shape} for this weight"


def keeps_product_for_lycoris(form: LayerFactorization) -> bool:
    """Whether LyCORIS derives the same split with w2 as a product; for some convolutions only a dense w2 works."""
    split = channel_split(form)
    factored = form.sums and is_factored(form.sums[0].right_rank, (split.out[1], split.in_[1]))
    return bool(factored) and lycoris_resumes(split, form.kernel)


def only_sorted_splits(form: LayerFactorization) -> str | None:
    """OneTrainer builds modules with the factorization of LyCORIS, the smaller factor first, from its settings."""
    if form.lora_rank is not None or not form.sums or not form.sums[0].plain:
        return None
    shape = form.sums[0].shape
    if form.is_conv and form.weight_shape[1] % shape.a2:
        return f"the {shape.a2} columns of A do not divide the {form.weight_shape[1]} input channels"
    return None if lycoris_settings([form]) else f"no factor of its settings gives the shape {shape} for this weight"


def lycoris_settings(forms: Iterable[LayerFactorization]) -> tuple[int, ...]:
    """The values of `factor` for which LyCORIS derives the splits of all these LoKr layers; () if there is none."""
    splits = {channel_split(form) for form in forms if form.lora_rank is None and form.sums}
    pairs = {pair for split in splits for pair in split}
    largest = max((min(pair) for pair in pairs), default=1)
    tried = dict.fromkeys((-1, *range(1, largest + 1), *(max(pair) for pair in pairs)))
    return tuple(f for f in tried if all(lycoris_factors(a * b, f) == (a, b) for a, b in pairs))


def only_peft_splits(form: LayerFactorization) -> str | None:
    """Whether a decompose_factor exists for this layer alone; the writer checks that all layers agree on one."""
    if form.lora_rank is not None or not form.sums or (form.is_conv and form.weight_shape[1] % form.sums[0].shape.a2):
        return None
    fits = common_peft_factor([channel_split(form)]) is not None
    return None if fits else f"no decompose_factor of PEFT yields the shape {form.sums[0].shape}"
