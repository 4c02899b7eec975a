"""The names that authors, ComfyUI and trainers use, against lists that were verified in their own programs.

The oracle expands the rows of the lists by itself: no code of the tables is used.
"""

import itertools
import json
import re

import pytest

from krona_hub.bases import catalog, name_prefixes
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.name_patterns import template
from krona_hub.bases.name_table import keys_of, table
from tests.shared import SHARED, shared

FOLDER = SHARED / "bases" / "names"
LISTS = {p.stem: json.loads(p.read_text()) for p in sorted(FOLDER.glob("*.json"))} if FOLDER.exists() else {}
SPELLED = [(f, who) for f, known in LISTS.items() for who in known.get("spellings", ()) if known.get("bases")]


def base_of(name: str) -> tuple[str, str]:
    """The base model and the component of an entry of the lists: `stable-cascade.prior` -> its prior."""
    name, component = name.split(".") if name.endswith((".prior", ".decoder")) else (name, "")
    name = f"{name}-decoder" if component == "decoder" else name
    return name, component or catalog.get(name).denoiser


def expanded(row: list[str], modules: dict) -> list[tuple[list[str], list[str]]]:
    """(others' names, paths) for every block of a row: one of both, or several of either."""
    other, path, _ = row
    sides = [_alternatives(other), _alternatives(path)]
    pattern = re.compile(re.escape(sides[1][0]).replace(r"\{\}", r"(\d+)"))
    found = []
    for module in modules:
        if match := pattern.fullmatch(module):
            found.append(tuple([text.format(*match.groups()) for text in side] for side in sides))
    return found


def _alternatives(text: str) -> list[str]:
    stacked = re.fullmatch(r"(.*)\((.*)\)(.*)", text)
    return [stacked[1] + part + stacked[3] for part in stacked[2].split("|")] if stacked else [text]


def shown(places, component: str) -> list[tuple]:
    return [(place.layer.removeprefix(f"{component}."), place.rows, place.swap_halves) for place in places]


@pytest.mark.parametrize(("family", "who"), SPELLED, ids=["-".join(pair) for pair in SPELLED])
def test_every_row_of_a_list_is_read_and_no_two_rows_share_a_layer(family, who):
    known = LISTS[family]
    for entry in known["bases"]:
        name, component = base_of(entry)
        component = "text_conditioner" if family == "anima-llm-adapter" else component
        names = table(catalog.get(name))
        modules = catalog.get(name).components[component]
        rows = 0
        for row in known["spellings"][who]:
            for others, paths in expanded(row, modules):
                rows += 1
                check(names, component, modules, others, paths, row[2])
        assert rows or not known["spellings"][who], (family, entry)


def check(names, component, modules, others, paths, note) -> None:
    heights = [modules[path].shape[0] for path in paths]
    if note == "join":
        share = heights[0] // len(others)
        for i, other in enumerate(others):
            (place,) = names.find(spelled(other), component)
            assert place.layer == f"{component}.{paths[0]}"
            assert place.part == (i * share, (i + 1) * share)
        return
    other = f"{others[0]}.in_proj" if note == "in_proj" else others[0]
    places = shown(names.find(spelled(other), component), component)
    if len(paths) == 1:
        assert paths[0] in [path for path, _, _ in places]
        assert places[0][1] is None and places[0][2] == (note == "swap"), (other, places)
    else:
        edges = list(itertools.accumulate(heights, initial=0))
        assert places == [(p, (a, b), False) for p, a, b in zip(paths, edges, edges[1:], strict=False)]


def spelled(other: str) -> str:
    """What the keys of a file say: x-flux's parameter is part of the name of the module in single blocks."""
    return re.sub(r"\.processor\.(qkv|proj)_lora$", r".processor.\1", f"diffusion_model.{other}")


FUSED = {part: whole for whole, parts in LISTS.get("fused-diffusers", {}).get("rule", {}).items() for part in parts}


@pytest.mark.parametrize("name", catalog.names())
def test_the_fused_names_of_diffusers_are_read(name):
    fused = LISTS or shared("bases", "names")
    known = fused["fused-diffusers"]
    for component, file in FAMILIES[name].components.items():
        rows = known["classes"].get(catalog.component(file).class_name, {})
        modules = catalog.get(name).components[component]
        for pattern in rows:
            owner, _, whole = pattern.rpartition(".")
            first = re.escape(f"{owner}.{known['rule'][whole][0]}").replace(r"\{\}", r"(\d+)")
            matches = [m for path in modules if (m := re.fullmatch(first, path))]
            for match in matches:
                at = owner.format(*match.groups())
                paths = [f"{at}.{part}" for part in known["rule"][whole]]
                if not all(path in modules for path in paths):  # cross-attention of another kind of block
                    continue
                edges = list(itertools.accumulate((modules[path].shape[0] for path in paths), initial=0))
                places = table(catalog.get(name)).find(f"{component}.{at}.{whole}")
                assert shown(places, component) == [
                    (p, (a, b), False) for p, a, b in zip(paths, edges, edges[1:], strict=False)
                ]


FLUX_LIKE = r"attn[._]to_(qkv_mlp_proj|out)$|linear_(in|out)$|time_text_embed"
NOT_READ = {  # names that ComfyUI accepts and krona does not read, and why
    "wan22-animate-14b": "motion_encoder",  # no layers of diffusers
    "wan22-s2v-14b": "trainable_cond_mask",  # an embedding, as all that end so
    "ltx-2.3": "caption_projection|embeddings_connector",  # not in the released model; another component of diffusers
    "hunyuan-video-15-step-distilled": "cond_type_embedding",
    "anima": "llm_adapter.embed",
    "flux1-fill": FLUX_LIKE,  # names of FLUX.2, which ComfyUI maps for all models of the kind; no trainer writes them
    "ovis-image": FLUX_LIKE,
    "longcat-image": FLUX_LIKE,
    "chroma1-radiance": FLUX_LIKE
    + "|transformer_blocks|context_embedder|linear1_qkv",  # diffusers has no class of this model
    "hunyuan-dit-11": "style_embedder",
    "ideogram4": "embed_image_indicator",
    "hidream-o1": "embed_tokens|pos_embed",
    "qwen-image-layered": "addition_t_embedding",
}


@pytest.mark.parametrize("name", LISTS.get("comfyui-accepts", {}).get("bases", {}))
def test_names_that_comfyui_accepts_are_read(name):
    """A name for a weight leads to some layer; a file with it is not refused. `#` in a list is any number."""
    base, _ = base_of(name)
    names = table(catalog.get(base))
    known = {c: {template(key) for key in (*part.index, *part.norm_index)} for c, part in names.parts.items()}
    accepted = [a for row in LISTS["comfyui-accepts"]["bases"][name] for a in row["accepted"]]
    missing = [a for a in accepted if not is_known(a, known, names.base)]
    expected = NOT_READ.get(name, "(?!)")
    assert [m for m in missing if not re.search(expected, m)] == []
    assert missing or name not in NOT_READ, "the name is read by now"


def is_known(name: str, known: dict[str, set[str]], base) -> bool:
    return any(
        template(key.replace("#-#", "2-1")) in known[owner]
        for role, path in name_prefixes.readings(name)
        for owner in name_prefixes.components(role, base)
        for key in keys_of(path)
    )


NAMED = {  # base model of the list -> one of the catalog
    "wan": "wan21-t2v-14b", "ltx-video": "ltx-video-2b", "cosmos-predict2": "cosmos-predict2-2b-t2i",
    "cogvideox": "cogvideox-5b", "kandinsky5": "kandinsky5-lite-video", "hunyuan-dit": "hunyuan-dit-12",
    "hidream": "hidream-i1",
}  # fmt: skip
ENCODERS = LISTS.get("text-encoders", {}).get("encoders", [])


@pytest.mark.parametrize("entry", ENCODERS, ids=lambda e: f"{e['base_of']}-{e['component']}")
def test_names_of_text_encoders_that_comfyui_accepts_are_read(entry):
    name = NAMED.get(entry["base_of"], entry["base_of"])
    component = next(c for c, file in FAMILIES[name].components.items() if file == entry["component"])
    names, modules = table(catalog.get(name)), catalog.get(name).components[component]
    for path, accepted in entry["accepted_by_comfyui"].items():
        match = next(m for m in (re.fullmatch(re.escape(path).replace(r"\#", r"(\d+)"), p) for p in modules) if m)
        for text in accepted:
            numbers = iter(match.groups())
            concrete = re.sub("#", lambda _, numbers=numbers: next(numbers), text)
            (place,) = names.find(concrete, component)
            assert place.layer == f"{component}.{match[0]}" and place.plain, concrete
