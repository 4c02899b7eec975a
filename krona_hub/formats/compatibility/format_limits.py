"""What a layer's delta looks like as numbers only, and which formats can hold such a form. Torch-free.

The form of a layer is its sizes: splits, terms, ranks, row order, DoRA axis. Every rule of the kind "this format
cannot hold that" is a question about the form, and stands in this file; the values never matter to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from krona_hub.formats.forms.delta_form import ChannelSplit, LayerFactorization, channel_split, is_factored
from krona_hub.kron.shapes import lycoris_factors, peft_factors

KRONECKER = ("lycoris-lokr", "peft-lokr", "diffusers-lokr", "diffusekrona")  # formats of one Kronecker term
LOW_RANK = ("kohya-lora", "diffusers-lora", "peft-lora", "lycoris-locon")  # formats of one up·down
PROJECTIONS = (".to_q", ".to_k", ".to_v", ".to_out.0")  # what DiffuseKronA adapts


def no_lora(form: LayerFactorization) -> str | None:
    """Why a LoRA file cannot hold this form as it stands; None where it can."""
    if form.lora_rank is not None:
        return None
    worst = next(s for s in form.sums if s.lora_rank is None or not s.plain)
    return f"it is a Kronecker sum ({worst.shape}, {_count(worst.terms, 'term')}) and no product up·down"


def no_single_term(form: LayerFactorization) -> str | None:
    """Why a file of one A ⊗ B per module cannot hold this form; None where it can (or may, if factors agree)."""
    if form.lora_rank is not None:
        return None
    if not all(s.plain for s in form.sums):
        return "its rows are shuffled as in DiffuseKronA, which is no plain A ⊗ B"
    terms = sum(s.terms for s in form.sums)
    return f"it is a sum of {terms} Kronecker terms, and one module holds one" if terms > 1 else None


def no_locon(form: LayerFactorization) -> str | None:
    """LyCORIS LoCon holds a LoRA, or a whole matrix as `.diff`."""
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
            return f"A has {s.shape.a2} columns, which do not divide the {form.weight_shape[1]} input channels"
    return None


def no_conv1d(form: LayerFactorization) -> str | None:
    """PEFT computes another matrix for a Conv1d with a whole w2 (FORMATS.md §4)."""
    if len(form.weight_shape) != 3:
        return None
    rank = form.sums[0].right_rank if form.lora_rank is None else form.lora_rank
    split = channel_split(form)
    kept = is_factored(rank, (split.out[1], split.in_[1]))
    return None if kept else "it is a Conv1d with a whole B, for which PEFT computes something else"


def no_conv3d(form: LayerFactorization) -> str | None:
    return "it is a Conv3d, which PEFT's LoKr does not know" if len(form.weight_shape) == 5 else None


def no_diffusekrona(form: LayerFactorization) -> str | None:
    """One dense pair per attention projection, rows in DiffuseKronA's order."""
    if form.dora or form.is_conv or (form.layer and not form.layer.endswith(PROJECTIONS)):
        return "DiffuseKronA adapts linear attention projections only, without DoRA"
    if len(form.sums) != 1 or form.sums[0].terms != 1:
        return "DiffuseKronA holds one term per layer"
    s = form.sums[0]
    if s.left_rank is not None or s.right_rank is not None:
        return "DiffuseKronA stores whole factors, and a factor of this delta is a product"
    if s.rows == "shuffled" or 1 in (s.shape.a1, s.shape.b1):
        return None
    return "DiffuseKronA interleaves the rows of A ⊗ B, and this delta does not"


Rule = Callable[[LayerFactorization], str | None]
RULES: Mapping[str, tuple[Rule, ...]] = {  # format -> what it cannot hold
    "krona": (),
    "kohya-lora": (no_dora, no_lora),
    "lycoris-locon": (no_locon,),
    "diffusers-lora": (no_input_dora, no_lora),
    "peft-lora": (no_input_dora, no_lora),
    "lycoris-lokr": (no_single_term,),
    "peft-lokr": (no_dora, no_single_term, no_row_kernel, no_conv1d, no_conv3d),
    "diffusers-lokr": (no_dora, no_single_term, no_row_kernel, no_conv1d, no_conv3d),
    "diffusekrona": (no_diffusekrona,),
}


def refusal(form: LayerFactorization, format_name: str) -> str | None:
    """Why files of this format cannot hold this form exactly, as a clause; None where they can.

    >>> from krona_hub.formats.forms.delta_form import SumForm
    >>> from krona_hub.kron.shapes import KronShape
    >>> refusal(LayerFactorization((8, 6), (SumForm(KronShape(2, 2, 4, 3)),)), "kohya-lora")
    'it is a Kronecker sum (2x2 ⊗ 4x3, 1 term) and no product up·down'
    >>> refusal(LayerFactorization((8, 6), (SumForm(KronShape(2, 2, 4, 3)),)), "lycoris-lokr") is None
    True
    """
    return next((why for rule in RULES[format_name] if (why := rule(form))), None)


def common_peft_factor(splits: Iterable[ChannelSplit]) -> int | None:
    """The `decompose_factor` under which PEFT derives exactly these splits; None where no single one does.

    >>> common_peft_factor([ChannelSplit((4, 80), (4, 192))])
    4
    >>> common_peft_factor([ChannelSplit((64, 5), (4, 192))]) is None
    True
    """
    wanted = {pair for split in splits for pair in split}
    largest = max((a for a, _ in wanted), default=1)
    candidates: tuple[int, ...] = (-1, *range(1, largest + 1))
    for factor in candidates:
        if all(peft_factors(a * b, factor) == (a, b) for a, b in wanted):
            return factor
    return None


def lycoris_resumes(split: ChannelSplit, kernel: int = 1) -> bool:
    """Whether LyCORIS derives this split again when it builds a module from a file.

    It guesses its `factor` from the tensors. `kernel` is k·k… where w2 is stored as a product, whose second half
    (r, d·k·k) makes LyCORIS see d·k·k input channels while it guesses; else 1.

    >>> lycoris_resumes(ChannelSplit((4, 80), (4, 192))), lycoris_resumes(ChannelSplit((64, 5), (4, 192)))
    (True, False)
    """
    (a1, b1), (a2, channels) = split
    b2 = channels * kernel
    out, in_ = a1 * b1, a2 * b2
    if (a1, a2) == (lycoris_factors(out)[0], lycoris_factors(in_)[0]):
        guess = -1
    else:
        left, right = max(a1, a2), max(b1, b2)
        guess = next((f for f in (left, right) if f in (a1, b1) and f in (a2, b2)), min(left, right))
    return lycoris_factors(out, guess) == (a1, b1) and lycoris_factors(a2 * channels, guess) == (a2, channels)


def _count(n: int, word: str) -> str:
    return f"{n} {word}" if n == 1 else f"{n} {word}s"
