"""The target of a conversion: the format, its kind, and the factorizations it supports."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.conversion.methods import DEFAULT_MAX_ERROR, Exact, Keep, MaxError, Method
from krona_hub.conversion.output_options import format_named
from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.applications import application_named, file_format, is_lora_format
from krona_hub.formats.compatibility.factorizations import loads_form
from krona_hub.formats.forms.normal_forms import has_hadamard, is_lora
from krona_hub.formats.known.diffusekrona import DIFFUSEKRONA
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.writing.aim import Aim
from krona_hub.formats.writing.encode import why_not
from krona_hub.kron.shapes import KronShape, peft_factors

PEFT_FACTORS = (-1, 1, 2, 4, 8, 16, 32, 64)

# (weight shape, shape, terms, rank of B or None if dense) -> whether the target can hold that factorization
Loads = Callable[[tuple[int, ...], KronShape, int, int | None], bool]


@dataclass(frozen=True)
class ConversionTarget:
    """A format, and the application it is written for."""

    format: str
    tool: str | None = None
    is_stated: bool = False  # whether the kind was asked for, so that it stays

    @property
    def to_lora(self) -> bool:
        return storage_of(self.format).kind == "low-rank"

    @property
    def loads(self) -> tuple[Loads, ...]:
        """Predicates over the factorizations of one layer; if there are several, all layers must satisfy the same."""
        plain = partial(_loads, self.tool or self.format)
        if self.format == DIFFUSEKRONA.name:  # interleaved rows: a plain A ⊗ B cannot be stored
            return ()
        if not storage_of(self.format).one_factor:
            return (plain,)
        return tuple(partial(_loads_with_factor, plain, factor) for factor in PEFT_FACTORS)

    def for_result(self, deltas: Iterable[LayerDelta]) -> ConversionTarget:
        """Return this target, or the LoRA format of the application if every converted layer is a LoRA."""
        if self.tool is None or (self.is_stated and not self.to_lora):
            return self
        found = tuple(deltas)
        has_dora = any(delta.magnitude is not None for delta in found)
        wanted = file_format(application_named(self.tool), is_lora=all(map(is_lora, found)), has_dora=has_dora)
        return self if wanted is None else replace(self, format=wanted)

    def holds_any_shape(self, delta: LayerDelta) -> bool:
        """Whether a layer may keep its Kronecker shape; it may not if all layers must share one factor."""
        return not storage_of(self.format).one_factor and why_not(delta, self.format, tool=self.tool) is None

    def aim(self, split_qkv: bool) -> Aim:
        """The aim of the writer, whichever kinds of layers the source has."""
        tool = application_named(self.tool) if self.tool is not None else None
        return Aim(self.format, tool.dialect if tool else storage_of(self.format).dialect, tool, split_qkv)

    def refuses_lora(self, delta: LayerDelta) -> bool:
        """Whether the application does not load the layer as a LoRA either, of any rank."""
        out, in_ = delta.matrix_shape
        size = delta.weight_shape
        return self.tool is not None and not loads_form(self.tool, size, KronShape(1, 1, out, in_), right_rank=1)

    def requires(self, name: str, delta: LayerDelta) -> bool:
        """Whether a budget must not leave out a layer.

        A DoRA that keeps its magnitude changes its weight by that alone, so that leaving it out does not lose what its
        factors have; and some applications load a text encoder only if all of its layers are adapted.
        """
        is_whole = self.tool is not None and "whole-text" in application_named(self.tool).rules
        return delta.magnitude is not None or (is_whole and name.startswith("text_encoder"))

    def refusals(self, layers: Mapping[str, LayerDelta]) -> dict[str, str]:
        """Map each layer whose delta the target cannot hold exactly to the reason."""
        reasons = {name: why_not(delta, self.format, tool=self.tool, layer=name) for name, delta in layers.items()}
        return {name: why for name, why in reasons.items() if why is not None}


def _loads(target: str, weight: tuple[int, ...], shape: KronShape, terms: int, right_rank: int | None) -> bool:
    return loads_form(target, weight, shape, terms, right_rank)


def _loads_with_factor(
    plain: Loads, factor: int, weight: tuple[int, ...], shape: KronShape, terms: int, right_rank: int | None
) -> bool:
    split = (shape.a1, shape.a2)
    by_peft = (peft_factors(weight[0], factor)[0], peft_factors(weight[1], factor)[0])
    return split == by_peft and plain(weight, shape, terms, right_rank)


def choose_target(adapter: Adapter, *, to: str | None, tool: str | None, method: Method | None) -> ConversionTarget:
    """Return the requested format, or the one that the application loads.

    An application alone never changes the kind: a LoRA stays a LoRA unless a method for a Kronecker factorization is
    given. `to` chooses the kind for it. Raises UsageError for a format that the application does not load.
    """
    if tool is None:
        return ConversionTarget(format_named(to or "krona"))
    known = application_named(tool)
    has_dora = any(delta.magnitude is not None for delta in adapter.layers.values())
    loras = all(is_lora(delta) or has_hadamard(delta) for delta in adapter.layers.values())
    is_lora_file = loras and (method is None or isinstance(method, Exact))
    if to is not None:
        is_lora_file = is_lora_format(known, to)
    wanted = file_format(known, is_lora=is_lora_file, has_dora=has_dora)
    if wanted is None and method is not None and known.lora is not None:
        wanted = known.lora  # a method was given, and the application loads LoRA only
    if wanted is None:
        what = "not LoKr" if to is not None else "and the source is a Kronecker adapter"
        raise InexpressibleError(
            f"{known.title} loads only LoRA, {what}.",
            fix=f"Use --for {known.name} --to lora, for the smallest LoRA within {DEFAULT_MAX_ERROR:.0%} per layer; "
            "--exact or --rank R choose another.",
        )
    return ConversionTarget(wanted, known.name, to is not None)


def default_method(adapter: Adapter, target: ConversionTarget) -> Method:
    """Return the default: keep the factors within a kind or for an application, else the smallest within 5 %.

    No target stores a LoHa, whose equal LoRA has the square of its rank: it is approximated, too.
    """
    if any(map(has_hadamard, adapter.layers.values())):
        return MaxError()
    kinds = {is_lora(delta) for delta in adapter.layers.values()}
    if target.tool is not None and not (target.to_lora and False in kinds):
        return Keep()
    return Keep() if kinds == {target.to_lora} else MaxError()
