"""Rules that state which factorizations a format cannot store. Torch-free."""

from __future__ import annotations

from collections.abc import Callable

from krona_hub.errors import counted
from krona_hub.formats.forms.delta_form import LayerFactorization, channel_split, is_factored

PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")  # layers that DiffuseKronA adapts
Limit = Callable[[LayerFactorization], str | None]  # why it cannot be stored, as a clause; None if it can


def no_lora(form: LayerFactorization) -> str | None:
    """Why a LoRA file cannot store this factorization without conversion; None if it can."""
    if form.lora_rank is not None:
        return None
    worst = next(s for s in form.sums if s.lora_rank is None or not s.plain)
    return f"it is a Kronecker sum ({worst.shape}, {counted(worst.terms, 'term')}), not a product up·down"


def no_single_term(form: LayerFactorization) -> str | None:
    """Why a file with one A ⊗ B per module cannot store this factorization; None if it can."""
    if form.lora_rank is not None:
        return None
    if not all(s.plain for s in form.sums):
        return "its rows are shuffled as in DiffuseKronA, so it is not a plain A ⊗ B"
    terms = sum(s.terms for s in form.sums)
    return f"it is a sum of {terms} Kronecker terms, and a module stores only one" if terms > 1 else None


def no_locon(form: LayerFactorization) -> str | None:
    """LyCORIS LoCon stores a LoRA, or a full matrix as `.diff`."""
    dense = all(s.shape[:2] == (1, 1) and s.plain for s in form.sums)
    return None if dense else no_lora(form)


def no_dora(form: LayerFactorization) -> str | None:
    axis = {"out": "output row", "in": "input column"}
    return f"it is a DoRA (one magnitude per {axis[form.dora]})" if form.dora else None


def no_input_dora(form: LayerFactorization) -> str | None:
    return no_dora(form) if form.dora == "in" else None


def no_row_kernel(form: LayerFactorization) -> str | None:
    """PEFT splits the channels of a convolution, never its kernel."""
    for s in form.sums:
        if form.is_conv and form.lora_rank is None and form.weight_shape[1] % s.shape.a2:
            return f"the {s.shape.a2} columns of A do not divide the {form.weight_shape[1]} input channels"
    return None


def no_conv1d(form: LayerFactorization) -> str | None:
    """PEFT computes a different matrix for a Conv1d with a dense w2 (FORMATS.md §4)."""
    if len(form.weight_shape) != 3:
        return None
    rank = form.sums[0].right_rank if form.lora_rank is None else form.lora_rank
    split = channel_split(form)
    kept = is_factored(rank, (split.out[1], split.in_[1]))
    return None if kept else "it is a Conv1d with a dense B, for which PEFT computes a different delta"


def no_conv3d(form: LayerFactorization) -> str | None:
    return "it is a Conv3d, which PEFT LoKr does not support" if len(form.weight_shape) == 5 else None


def no_diffusekrona(form: LayerFactorization) -> str | None:
    """One dense pair per attention projection, rows in DiffuseKronA's order."""
    if form.dora or form.is_conv or (form.layer and not form.layer.endswith(PROJECTIONS)):
        return "DiffuseKronA adapts linear attention projections only, without DoRA"
    if len(form.sums) != 1 or form.sums[0].terms != 1:
        return "DiffuseKronA stores one term per layer"
    s = form.sums[0]
    if s.left_rank is not None or s.right_rank is not None:
        return "DiffuseKronA stores dense factors, and a factor of this delta is a low-rank product"
    if s.rows == "shuffled" or 1 in (s.shape.a1, s.shape.b1):
        return None
    return "DiffuseKronA interleaves the rows of A ⊗ B, and this delta does not"


PEFT_LOKR_LIMITS = (no_dora, no_single_term, no_row_kernel, no_conv1d, no_conv3d)
