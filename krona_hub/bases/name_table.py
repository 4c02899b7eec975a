"""Translate module names from any dialect to canonical layers, and from a layer to any dialect. Torch-free.

No rule can reverse underscores (`to_q` or `to.q`?), so a table lists every name of a base model in its underscored
form (FORMATS §12.1). It contains both the diffusers and the original names, which never collide.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from functools import cached_property, lru_cache
from heapq import nlargest

from krona_hub.bases import dialects, ldm_names, name_prefixes, name_rules
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.dialects import prefixed, processor_name, spelling_of, text_model
from krona_hub.bases.module_spec import Placement
from krona_hub.bases.name_rules import apply, fused_projections
from krona_hub.bases.original_names import AUTHORS
from krona_hub.errors import AmbiguousError, InexpressibleError, NotFoundError

DIALECTS = tuple(dialects.DIALECTS)

LIKELY = 24  # layers compared letter by letter for "did you mean"
Placements = tuple[Placement, ...]
LANGUAGE_MODEL = re.compile(
    r"^(model_language_model_|language_model_model_|language_model_|model_)"
)  # and `` in ComfyUI
PROCESSOR_ERA = (  # old attention-processor name -> current name, tried in order
    (re.compile(r"^(.*_)processor_(to_[qkv])(?:_lora)?$"), r"\1\2"),
    (re.compile(r"^(.*?_)(?:processor_)?to_out(?:_lora)?$"), r"\1to_out_0"),
    (re.compile(r"^(.*_)processor_((?:add_[qkv]_proj|to_add_out))(?:_lora)?$"), r"\1\2"),
    (re.compile(r"^(.*self_attn_)to_([qkv]|out)(?:_lora)?$"), r"\1\2_proj"),
)


@dataclass(frozen=True, eq=False)
class ComponentNames:
    """The names of one component, indexed on first use."""

    component: str
    modules: Component

    @cached_property
    def spellings(self) -> Mapping[str, Mapping[str, Placements]]:
        """Who writes other names than diffusers (see `original_names`) -> dotted name -> placements."""
        return {who: _in(self.component, names) for who, names in self._spelled.items()}

    @cached_property
    def _spelled(self) -> Mapping[str, Mapping[str, Placements]]:
        original = self.modules.original
        if original:
            return {who: apply(original.rules(who), self.modules) for who in original.spellings}
        ldm = ldm_names.names(self.modules)
        return {AUTHORS: ldm} if ldm else {}

    @property
    def originals(self) -> Mapping[str, Placements]:
        """Original dotted name -> placements; {} if those are the diffusers names."""
        return self.spellings.get(AUTHORS, {})

    @cached_property
    def _norm_names(self) -> Mapping[str, Mapping[str, Placements]]:
        original = self.modules.original
        if original:
            return {who: apply(original.rules(who), self.modules.norms) for who in original.spellings}
        return {AUTHORS: ldm_names.names(self.modules, self.modules.norms)}

    def norm_homes(self, spelling: str) -> Mapping[str, str]:
        """Canonical norm or bare parameter -> its dotted name in a spelling."""
        names = self._norm_names.get(spelling, {})
        return {f"{self.component}.{place.layer}": name for name, places in names.items() for place in places}

    @cached_property
    def norm_index(self) -> Mapping[str, Placements]:
        """Underscored name -> norms or a bare parameter, without a final `.weight` or `.scale`."""
        named = (item for names in self._norm_names.values() for item in names.items())
        index = {underscored(_stem(name)): places for name, places in named}
        index.update(
            (underscored(_stem(path)), (Placement(path),)) for path in self.modules.norms if self.is_clear(path)
        )
        return index

    def is_clear(self, norm: str) -> bool:
        """Whether the name of a norm means the same norm in every spelling."""
        original = self.modules.original
        return not (original and original.unclear and norm.endswith(original.unclear))

    @cached_property
    def index(self) -> Mapping[str, str | Placements]:
        """Underscored name -> a path of this component, or the placements of a name in another spelling."""
        index: dict[str, str | Placements] = {underscored(n): p for n, p in fused_projections(self.modules).items()}
        for names in reversed(list(self._spelled.values())):
            index.update((underscored(name), places) for name, places in names.items())
        index.update((underscored(path), path) for path in self.modules)
        return index

    @cached_property
    def homes(self) -> Mapping[str, Mapping[str, str]]:
        """Spelling -> canonical layer -> dotted name of the module that contains it, or of the first of its rows."""
        return {
            who: {
                place.layer: name
                for name, places in names.items()
                for place in places
                if not place.part or not place.part[0]
            }
            for who, names in self.spellings.items()
        }

    def find(self, path: str) -> Placements | None:
        """The placements of a name without its prefix; None if the component has no such module.

        Finds what `index` has, without building it.
        """
        if path in self.modules:
            return (Placement(f"{self.component}.{path}"),)
        for key in self._keys(path):
            # where a converter wrote dots for underscores, the name is none: `cross_attn.k.img` is no module of Wan
            dots = path.count(".") if key == underscored(path) else 0
            places = next((places for dotted, places in self._find(key) if dotted.count(".") >= dots), None)
            if places is not None:
                return _canonical(self.component, places)
        return None

    def _find(self, key: str) -> Iterator[tuple[str, Placements]]:
        """The dotted forms of an underscored name, with their placements."""
        if key in self._plain:
            yield self._plain[key], (Placement(self._plain[key]),)
        original = self.modules.original
        for who in original.spellings if original else ():
            if original and (found := name_rules.find(key, original.lookup(who), self.modules)):
                yield found
        if original is None and (ldm := self._ldm.get(key)):
            yield ldm, self._spelled[AUTHORS][ldm]
        if found := name_rules.find_fused(key, self._plain, self.modules):
            yield found

    @cached_property
    def _plain(self) -> Mapping[str, str]:
        """Underscored path -> path; without those of two layers, which only models outside the catalog have."""
        found = {underscored(path): path for path in self.modules}
        if len(found) == len(self.modules):
            return found
        counts = Counter(map(underscored, self.modules))
        return {key: path for key, path in found.items() if counts[key] == 1}

    @cached_property
    def _ldm(self) -> Mapping[str, str]:
        return {underscored(name): name for name in self._spelled.get(AUTHORS, ())}

    def find_vector(self, path: str) -> Placements | None:
        """As `find`, also for norms and bare parameters."""
        places = self.find(path)
        if places is not None:
            return places
        norm = next((self.norm_index[k] for k in self._keys(_stem(path)) if k in self.norm_index), None)
        return norm and _canonical(self.component, norm)

    def _keys(self, path: str) -> Iterator[str]:
        return keys_of(path, text_encoder=self.component.startswith("text_encoder"))


Find = Callable[[ComponentNames, str], Placements | None]


@dataclass(frozen=True, eq=False)
class NameTable:
    """All names of the modules of a base model. Built in milliseconds; `table(base)` caches one per base."""

    base: Base

    def find(self, name: str, component: str | None = None) -> Placements | None:
        """Find the placements of a stored module; None if the base model has no such module.

        `name` is the module name in any dialect, without the parameter (`.lora_down.weight`, …). A fused module has
        several placements, with the rows of each. Raises AmbiguousError if a name without a component fits several
        components and `component` does not choose one.

        >>> from krona_hub.bases import catalog
        >>> names = table(catalog.get("sdxl"))
        >>> names.find("lora_unet_input_blocks_4_1_proj_in")[0].layer
        'unet.down_blocks.1.attentions.0.proj_in'
        """
        return _only(name, self.candidates(name), component)

    def vector_places(self, name: str, component: str | None = None) -> Placements | None:
        """Find the layers, norm or bare parameter with this name; None if the base model has nothing of that name.

        As `find`, for deltas of biases, norms and bare parameters: `name` is the name of the module in any dialect, or
        of the bare parameter. `layer` of a placement is the path of the module, or of the bare parameter.

        >>> from krona_hub.bases import catalog
        >>> table(catalog.get("sdxl")).vector_places("lora_unet_input_blocks_4_1_norm")[0].layer
        'unet.down_blocks.1.attentions.0.norm'
        >>> table(catalog.get("wan21-t2v-14b")).vector_places("transformer.blocks.0.scale_shift_table")[0].layer
        'transformer.blocks.0.scale_shift_table'
        """
        return _only(name, self._search(name, ComponentNames.find_vector), component)

    def candidates(self, name: str) -> list[tuple[str, Placements]]:
        """(component, placements), for the longest prefix with which the name is known."""
        return self._search(name, ComponentNames.find)

    def _search(self, name: str, find: Find) -> list[tuple[str, Placements]]:
        for role, path in name_prefixes.readings(name):
            owners = name_prefixes.components(role, self.base)
            found = [(owner, p) for owner in owners if (p := find(self.parts[owner], path)) is not None]
            if found:
                return found
        return []

    @cached_property
    def parts(self) -> Mapping[str, ComponentNames]:
        """Component -> its names."""
        return {c: ComponentNames(c, modules) for c, modules in self.base.components.items()}

    def spell(self, layer: str, dialect: str) -> str:
        """The name of a canonical layer in a dialect, or of the fused module that contains it.

        Raises NotFoundError for a layer that the base model does not have, InexpressibleError if the dialect has no
        name for it, UsageError for an unknown dialect.

        >>> from krona_hub.bases import catalog
        >>> names = table(catalog.get("flux1-dev"))
        >>> names.spell("transformer.transformer_blocks.0.attn.to_q", "kohya-ldm")
        'lora_unet_double_blocks_0_img_attn_qkv'
        """
        if self.base.module(layer) is None:
            raise self._unknown(layer)
        return _expressible(layer, spell(self, layer, dialect), dialect)

    def vector_name(self, path: str, dialect: str) -> str:
        """The name of a canonical layer, norm or bare parameter in a dialect: the inverse of `vector_places`.

        The bias of a layer in a fused module has the name of that module. Raises the errors of `spell`.

        >>> from krona_hub.bases import catalog
        >>> table(catalog.get("flux1-dev")).vector_name("transformer.transformer_blocks.0.attn.norm_q", "original")
        'diffusion_model.double_blocks.0.img_attn.norm.query_norm'
        """
        component, _, inside = path.partition(".")
        part = self.parts.get(component)
        if part is None or inside not in part.modules.norms:
            return self.spell(path, dialect)
        if dialect == "processor" or not part.is_clear(inside):
            return _expressible(path, None, dialect)
        spelling = spelling_of(self.base, component, dialect)
        if spelling:
            inside = part.norm_homes(spelling).get(path, inside)
        return prefixed(self.base, component, _stem(inside), dialect)

    def _unknown(self, layer: str) -> NotFoundError:
        near = self.nearest(layer)
        fix = f"Did you mean {near!r}?" if near else "Specify the base model of the adapter with --base."
        return NotFoundError(f"{self.base.name} has no layer {layer!r}.", fix=fix)

    def fused(self, dialect: str) -> Mapping[str, Placements]:
        """Names of a dialect that are not plain layers: several layers, a part of one, or another order of values."""
        return {
            dialects.prefixed(self.base, part.component, name, dialect): places
            for part in self.parts.values()
            if (spelling := spelling_of(self.base, part.component, dialect))
            for name, places in part.spellings[spelling].items()
            if not (len(places) == 1 and places[0].plain)
        }

    def nearest(self, name: str) -> str | None:
        """The canonical layer with the most similar name, for "did you mean"; None if no name is similar."""
        key = underscored(name_prefixes.readings(name)[0][1])
        words = set(key.split("_"))
        likely = nlargest(LIKELY, self._words, key=lambda layer: len(self._words[layer] & words))
        flat = {underscored(layer): layer for layer in likely}
        near = get_close_matches(key, flat, n=1, cutoff=0.5)
        return flat[near[0]] if near else None

    @cached_property
    def _words(self) -> Mapping[str, frozenset[str]]:
        """Canonical layer -> words of its name, a fast filter before the letter-by-letter comparison."""
        return {layer: frozenset(underscored(layer).split("_")) for layer, _ in self.base.layers()}


@lru_cache(maxsize=64)
def table(base: Base) -> NameTable:
    """The name table of a base model, cached."""
    return NameTable(base)


def _only(name: str, candidates: Iterable[tuple[str, Placements]], component: str | None) -> Placements | None:
    """The placements in the chosen component, or in the only one. Raises AmbiguousError if there are several."""
    found = {owner: places for owner, places in candidates if component in (None, owner)}
    if len(found) > 1:
        raise AmbiguousError(f"{name} exists in {' and in '.join(found)}.", fix="Choose one with --component.")
    return next(iter(found.values()), None)


def _expressible(path: str, name: str | None, dialect: str) -> str:
    if name is None:
        raise InexpressibleError(
            f"{path} has no name in the {dialect} dialect.", fix="Choose another format, or omit the layer."
        )
    return name


def keys_of(path: str, *, text_encoder: bool = True) -> Iterator[str]:
    """The underscored names that a name without prefix may mean, the most literal first.

    >>> list(keys_of("text_model.encoder.layers.0.mlp.fc1"))[:2]
    ['encoder_layers_0_mlp_fc1', 'model_encoder_layers_0_mlp_fc1']
    """
    key = underscored(path)
    key = key.removeprefix("text_model_") if text_encoder else key
    inner = LANGUAGE_MODEL.sub("", key)
    also = (inner, f"model_{inner}") if text_encoder else ()
    yield from dict.fromkeys((key, *_modern(key), *also))


def _stem(name: str) -> str:
    """The name of the module of a parameter; several authors call the weight of a norm `scale`."""
    return name.removesuffix(".weight").removesuffix(".scale")


def underscored(path: str) -> str:
    """The path with underscores instead of dots."""
    return path.replace(".", "_")


def _modern(key: str) -> Iterable[str]:
    """Current names for an attention-processor name."""
    if not ("processor" in key or "self_attn_to_" in key or key.endswith("to_out")):
        return ()
    return (pattern.sub(new, key) for pattern, new in PROCESSOR_ERA if pattern.match(key))


def _in(component: str, names: Mapping[str, Placements]) -> Mapping[str, Placements]:
    return {name: _canonical(component, places) for name, places in names.items()}


def _canonical(component: str, places: Placements) -> Placements:
    return tuple(
        place._replace(
            layer=f"{component}.{place.layer}", shared_with=tuple(f"{component}.{x}" for x in place.shared_with)
        )
        for place in places
    )


def spell(table: NameTable, layer: str, dialect: str) -> str | None:
    """The name of an existing layer in a dialect; None if the dialect has no name for it."""
    component, _, path = layer.partition(".")
    if dialect == "processor":
        return processor_name(component, text_model(table.base, component, path, dialect))
    spelling = spelling_of(table.base, component, dialect)
    if spelling:
        path = table.parts[component].homes[spelling].get(layer, path)
    return prefixed(table.base, component, path, dialect)
