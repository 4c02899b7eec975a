"""Where a conversion goes: the format, its kind, and the forms it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.conversion.methods import DEFAULT_MAX_ERROR, Exact, Keep, MaxError, Method
from krona_hub.conversion.output_options import format_named
from krona_hub.errors import InexpressibleError, UsageError
from krona_hub.formats.compatibility.tools import loads_form, target_for, tool_named
from krona_hub.formats.forms.normal_forms import is_lora
from krona_hub.formats.known.diffusekrona import DIFFUSEKRONA
from krona_hub.formats.known.registry import storage_of
from krona_hub.formats.writing.encode import why_not
from krona_hub.kron.shapes import KronShape, peft_factors

PEFT_FACTORS = (-1, 1, 2, 4, 8, 16, 32, 64)

# May the target hold this many terms of this shape, B of this rank (None: dense), on this weight?
Loads = Callable[[tuple[int, ...], KronShape, int, int | None], bool]


@dataclass(frozen=True)
class ConversionTarget:
    """A format, and for which tool."""

    format: str
    tool: str | None = None

    @property
    def to_lora(self) -> bool:
        return storage_of(self.format).kind == "low-rank"

    @property
    def loads(self) -> tuple[Loads, ...]:
        """Predicates over the forms of one layer. Where there are several, all layers must follow the same one."""
        plain = partial(_loads, self.tool or self.format)
        if self.format == DIFFUSEKRONA.name:  # interleaved rows: the nearest plain A ⊗ B is none of its forms
            return ()
        if not storage_of(self.format).one_factor:
            return (plain,)
        return tuple(partial(_loads_with_factor, plain, factor) for factor in PEFT_FACTORS)

    def for_result(self, deltas: Iterable[LayerDelta]) -> ConversionTarget:
        """The same, or what the tool takes a LoRA in where every layer turned out to be one."""
        tool = None if self.tool is None else tool_named(self.tool)
        wanted = None if tool is None else target_for(tool, all(map(is_lora, deltas)))
        return self if wanted is None else ConversionTarget(wanted.format, self.tool)

    def holds_any_shape(self, delta: LayerDelta) -> bool:
        """Whether a layer may keep the Kronecker shape it came with: not where all layers must follow one factor."""
        return not storage_of(self.format).one_factor and why_not(delta, self.format, tool=self.tool) is None

    def refusals(self, layers: Mapping[str, LayerDelta]) -> dict[str, str]:
        """Layer -> why the target cannot hold its delta exactly."""
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
    """The format asked for, or the one that the tool wants for this kind of adapter. Raises UsageError for both.

    `--for` never changes the kind: a LoRA stays a LoRA unless a way to make it Kronecker is given.
    """
    if to is not None and tool is not None:
        raise UsageError("--to and --for exclude each other.", fix="--for chooses the format itself.")
    if tool is None:
        return ConversionTarget(format_named(to or "krona"))
    known = tool_named(tool)
    stays_lora = all(map(is_lora, adapter.layers.values())) and (method is None or isinstance(method, Exact))
    wanted = target_for(known, stays_lora)
    if wanted is None and method is not None and known.lora is not None:
        wanted = known.lora  # a way was given, and the tool takes nothing but LoRA
    if wanted is None:
        raise InexpressibleError(
            f"{known.title} loads LoRA only, and this is a Kronecker adapter.",
            fix=f"Add --max-error {DEFAULT_MAX_ERROR} or --exact or --rank R to make a LoRA of it for {known.name}.",
        )
    return ConversionTarget(wanted.format, known.name)


def default_method(adapter: Adapter, target: ConversionTarget) -> Method:
    """Without a way nothing changes within a kind or for a tool; into the other kind, the smallest within 5 %."""
    kinds = {is_lora(delta) for delta in adapter.layers.values()}
    return Keep() if target.tool is not None or kinds == {target.to_lora} else MaxError()
