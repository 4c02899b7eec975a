"""Every base model of the catalog in every spelling of its names: a file is read as what it means, and written again.

One module of each rule of a table, so of each kind: stacked, joined, swapped, shared and plain ones. The oracle reads
the tables and places the rows by itself. Real shapes are large, so that rows of ΔW are compared, never whole matrices.
"""

import random
import re
from collections.abc import Callable, Iterator, Mapping
from importlib.resources import files
from math import prod
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import krona_hub
from krona_hub.adapters.adapter import Adapter, LayerDelta
from krona_hub.bases import catalog, detection
from krona_hub.bases.base import Base
from krona_hub.bases.component import Component
from krona_hub.bases.families import FAMILIES
from krona_hub.bases.ldm_names import is_unet
from krona_hub.bases.module_spec import ModuleSpec
from krona_hub.bases.name_table import table
from krona_hub.errors import InexpressibleError
from krona_hub.formats.compatibility.applications import APPLICATIONS
from krona_hub.formats.compatibility.naming import PARTIAL, ComponentNamings, Names
from krona_hub.formats.compatibility.verdicts import loads_in
from krona_hub.formats.reading.describe import describe
from krona_hub.formats.writing import write_plan
from krona_hub.formats.writing.aim import Aim, aim_at
from krona_hub.formats.writing.module_names import FileNames
from krona_hub.formats.writing.write_plan import planned
from krona_hub.formats.writing.writer import write_planned
from krona_hub.kron.norms import norm
from krona_hub.kron.terms import LowRank

RANK, ALPHA = 2, 3.0
MOST = 24  # modules of a file that no table names
NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")
FUSED = {
    "to_qkv": ("to_q", "to_k", "to_v"), "to_kv": ("to_k", "to_v"),
    "to_added_qkv": ("add_q_proj", "add_k_proj", "add_v_proj"), "to_added_kv": ("add_k_proj", "add_v_proj"),
}  # fmt: skip


# --- what a name means -----------------------------------------------------------------------------------------------


class Piece(NamedTuple):
    """Rows of a stored module and the rows of the layer that they are; `swapped`: in halves of reverse order."""

    layer: str
    stored: tuple[int, int]
    rows: tuple[int, int]
    swapped: bool = False

    def stored_row(self, row: int) -> int | None:
        """The row of the stored module with a row of the layer; None if it is not in it."""
        inside, height = row - self.rows[0], self.rows[1] - self.rows[0]
        if not 0 <= inside < height:
            return None
        return self.stored[0] + ((inside + height // 2) % height if self.swapped else inside)


class Spelled(NamedTuple):
    """A module of a file without its prefix, and the layers it is."""

    name: str
    pieces: tuple[Piece, ...]
    shape: tuple[int, ...]  # of its delta


def whole(name: str, path: str, module: ModuleSpec, swapped: bool = False) -> Spelled:
    rows = (0, module.shape[0])
    return Spelled(name, (Piece(path, rows, rows, swapped),), module.shape)


def stack(name: str, paths: list[str], modules: Component) -> Spelled:
    pieces, start = [], 0
    for path in paths:
        height = modules[path].shape[0]
        pieces.append(Piece(path, (start, start + height), (0, height)))
        start += height
    return Spelled(name, tuple(pieces), (start, *modules[paths[0]].shape[1:]))


def spelled(base: Base, spelling: str, seed: random.Random) -> list[Spelled]:
    """One module per kind of name: of each rule of a table, or of some of the modules without one."""
    modules = base.components[base.denoiser]
    if spelling == "diffusers":
        kinds = by_kind(modules, seed)
        return [whole(path, path, modules[path]) for path in seed.sample(kinds, min(MOST, len(kinds)))]
    if spelling == "fused-diffusers":
        return list(fused(modules, seed))
    if modules.original is None:  # an LDM table has no rules; tests/bases/ compares it with diffusers' converter
        names = table(base).parts[base.denoiser].spellings[spelling]
        paths = {name: places[0].layer.partition(".")[2] for name, places in names.items()}
        return [whole(name, paths[name], modules[paths[name]]) for name in seed.sample(sorted(paths), MOST)]
    known = [found for line in lines(modules.original.spellings[spelling]) if (found := expanded(line, modules))]
    one_each = [module for found in known for module in seed.choice(found)]
    covered = {piece.layer for found in known for block in found for module in block for piece in module.pieces}
    kept = by_kind({path: m for path, m in modules.items() if path not in covered}, seed)
    return [*one_each, *(whole(path, path, modules[path]) for path in seed.sample(kept, min(3, len(kept))))]


def lines(name: str) -> list[list[str]]:
    text = files("krona_hub.bases").joinpath("originals", f"{name}.txt").read_text("utf-8")
    return [line.split() for line in text.splitlines()]


def expanded(line: list[str], modules: Component) -> list[list[Spelled]]:
    """The modules of a line of a table, for every block; several, if they are joined."""
    others, paths = alternatives(line[0], "|"), alternatives(line[1], "|" if "|" in line[1] else "&")
    pattern = re.compile(re.escape(paths[0]).replace(r"\{\}", r"(\d+)"))
    found = []
    for match in filter(None, map(pattern.fullmatch, modules)):
        own = [path.format(*match.groups()) for path in paths]
        names = [other.format(*match.groups()) for other in others]
        if not all(path in modules for path in own):
            continue
        first = modules[own[0]]
        if len(own) > 1 and "|" in line[1]:
            found.append([stack(names[0], own, modules)])
        elif len(names) > 1:
            share = first.shape[0] // len(names)
            found.append([
                Spelled(name, (Piece(own[0], (0, share), (i * share, (i + 1) * share)),), (share, *first.shape[1:]))
                for i, name in enumerate(names)
            ])  # fmt: skip
        else:
            swapped = "halves" in line or ("swap" in line and first.shape[0] == 2 * first.shape[1])
            alike = (whole(names[0], path, first, swapped).pieces[0] for path in own)
            found.append([Spelled(names[0], tuple(alike), first.shape)])
    return found


def alternatives(text: str, separator: str) -> list[str]:
    found = re.fullmatch(r"(.*)\((.*)\)(.*)", text)
    return [found[1] + part + found[3] for part in found[2].split(separator)] if found else [text]


def by_kind(modules: Mapping[str, ModuleSpec], seed: random.Random) -> list[str]:
    """One path of each that differ in numbers only."""
    kinds: dict[str, list[str]] = {}
    for path in modules:
        kinds.setdefault(NUMBER.sub("#", path), []).append(path)
    return [seed.choice(paths) for paths in kinds.values()]


def fused(modules: Component, seed: random.Random) -> Iterator[Spelled]:
    """One module of each kind; no two of them have a layer in common."""
    covered: set[str] = set()
    for name, parts in FUSED.items():
        owners = {path.removesuffix(f".{parts[0]}"): m for path, m in modules.items() if path.endswith(f".{parts[0]}")}
        free = {owner: m for owner, m in owners.items() if not covered & {f"{owner}.{part}" for part in parts}}
        for owner in by_kind(free, seed):
            paths = [f"{owner}.{part}" for part in parts]
            widths = {modules[path].shape[1:] for path in paths if path in modules}
            if all(path in modules for path in paths) and len(widths) == 1 and f"{owner}.{name}" not in modules:
                covered |= {*paths}
                yield stack(f"{owner}.{name}", paths, modules)


# --- numbers ---------------------------------------------------------------------------------------------------------


class Lora(NamedTuple):
    up: Tensor
    down: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.lora_up.weight": self.up, f"{name}.lora_down.weight": self.down}

    def row(self, row: int) -> Tensor:
        return ALPHA / RANK * self.up[row].flatten().double() @ self.down.flatten(1).double()


class Lokr(NamedTuple):
    w1: Tensor
    w2_a: Tensor
    w2_b: Tensor

    def tensors(self, name: str) -> dict[str, Tensor]:
        return {f"{name}.lokr_{part}": tensor for part, tensor in self._asdict().items()}

    def row(self, row: int) -> Tensor:
        outer, inner = divmod(row, len(self.w2_a))
        return ALPHA / RANK * torch.kron(self.w1[outer].double(), self.w2_a[inner].double() @ self.w2_b.double())


def random_lora(shape: tuple[int, ...], g: torch.Generator) -> Lora:
    up = torch.randn(shape[0], RANK, *[1] * len(shape[2:]), generator=g)
    return Lora(up, torch.randn(RANK, *shape[1:], generator=g))


def random_lokr(shape: tuple[int, ...], g: torch.Generator) -> Lokr:
    a1 = next(n for n in (16, 4, 2, 1) if shape[0] % n == 0)
    a2 = next(n for n in (8, 2, 1) if shape[1] % n == 0)
    w1 = torch.randn(a1, a2, generator=g)
    w2_b = torch.randn(RANK, prod(shape[1:]) // a2, generator=g)
    return Lokr(w1, torch.randn(shape[0] // a1, RANK, generator=g), w2_b)


MAKERS = {"lora": ("kohya-lora", random_lora), "lokr": ("lycoris-lokr", random_lokr)}


def row_of(delta: LayerDelta, row: int) -> Tensor:
    """A row of ΔW, from the factors."""
    total = torch.zeros(delta.matrix_shape[1], dtype=torch.float64)
    for s in delta.sums:
        outer, inner = divmod(row, s.shape.b1)
        for left, right in zip(rows_of(s.left, outer), rows_of(s.right, inner), strict=True):
            total += torch.kron(left, right)
    return total


def rows_of(factor: Tensor | LowRank, row: int) -> list[Tensor]:
    """This row of each matrix of a factor."""
    if isinstance(factor, LowRank):
        return [up[row].double() @ down.double() for up, down in zip(factor.up, factor.down, strict=True)]
    return [matrix[row].double() for matrix in factor]


def check(adapter: Adapter, base: Base, meant: Mapping[Spelled, Lora | Lokr], seed: random.Random) -> None:
    """Every layer, at the edges of its rows and in between, and nothing else."""
    pieces: dict[str, list[tuple[Piece, Lora | Lokr]]] = {}
    for module, numbers in meant.items():
        for piece in module.pieces:
            pieces.setdefault(f"{base.denoiser}.{piece.layer}", []).append((piece, numbers))
    assert adapter.layers.keys() == pieces.keys()
    for layer, own in pieces.items():
        height = adapter[layer].weight_shape[0]
        assert adapter[layer].weight_shape == base.module(layer).shape
        edges = [edge for piece, _ in own for start, end in [piece.rows] for edge in (start, end - 1)]
        for row in {*edges, max(0, height // 2 - 1), height // 2, seed.randrange(height)}:
            found = [numbers.row(at) for piece, numbers in own if (at := piece.stored_row(row)) is not None]
            wanted = found[0] if found else torch.zeros(adapter[layer].matrix_shape[1], dtype=torch.float64)
            torch.testing.assert_close(row_of(adapter[layer], row), wanted, rtol=1e-5, atol=1e-5, msg=f"{layer} {row}")


# --- the tests -------------------------------------------------------------------------------------------------------


def spellings(base: str) -> list[str]:
    """The spellings of a denoiser, that of diffusers and its fused names last."""
    source = catalog.get(base)
    own = table(source).parts[source.denoiser].spellings
    fuses = any(True for _ in fused(source.components[source.denoiser], random.Random(0)))
    return [*own, "diffusers", *["fused-diffusers"] * fuses]


BASES = [name for name, family in FAMILIES.items() if family.same_layers_as is None]
EVERY = [(base, spelling) for base in BASES for spelling in spellings(base)]


def of_each_architecture() -> set[tuple[str, str]]:
    """The first spelling of the first base model of each architecture."""
    found: dict[str, tuple[str, str]] = {}
    for base, spelling in EVERY:
        source = catalog.get(base)
        original = source.components[source.denoiser].original
        found.setdefault(original.name if original else f"{source.denoiser} without a table", (base, spelling))
    return set(found.values())


QUICK = of_each_architecture()
CASES = [pytest.param(*case, marks=[] if case in QUICK else pytest.mark.slow, id="-".join(case)) for case in EVERY]


@pytest.mark.parametrize("kind", ["lora", pytest.param("lokr", marks=pytest.mark.slow)])
@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_a_file_in_any_spelling_is_read_and_written_again(name, spelling, kind, tmp_path, monkeypatch):
    base, seed, g = catalog.get(name), random.Random(f"{name} {spelling} {kind}"), torch.Generator().manual_seed(7)
    format_name, maker = MAKERS[kind]
    meant = {module: maker(module.shape, g) for module in spelled(base, spelling, seed)}
    assert len(meant) == len({module.name for module in meant})
    prefixes = (f"{base.denoiser}." if "diffusers" in spelling else "diffusion_model.", "lora_unet_")
    forms = [{module: prefixed(prefix, module.name) for module in meant} for prefix in prefixes]
    for names in forms:
        adapter = krona_hub.read(save(tmp_path / "read.safetensors", names, meant), base=base)
        check(adapter, base, meant, seed)
    if spelling in ("fused-diffusers", *PARTIAL):  # only read: no application asks for these names, or not for all
        return
    for prefix, names in zip(prefixes, forms, strict=True):
        path = tmp_path / "written.safetensors"
        monkeypatch.setattr(write_plan, "file_names", in_naming(f"{prefix} {spelling}"))
        plan = planned(adapter, aim_at(adapter, format_name, None, False), base, None)
        write_planned(plan, path, overwrite=True)
        assert modules_in(path) == {*names.values()}, prefix
        check(krona_hub.read(path, base=base), base, meant, seed)


def in_naming(text: str) -> Callable[[Aim, Base, Adapter], FileNames]:
    """As `file_names`, for an application that finds the denoiser in this one naming."""
    namings = {"denoiser": ComponentNamings([text], {})}
    return lambda aim, base, adapter: FileNames(aim.dialect, table(base), Names(base, namings), title=text)


@pytest.mark.parametrize(("name", "spelling"), CASES)
def test_a_file_for_no_application_has_the_names_that_most_applications_find(name, spelling, tmp_path):
    """At least as many as find the file as it was read; names that nobody maps are not chosen."""
    base, seed, g = catalog.get(name), random.Random(f"{name} {spelling} default"), torch.Generator().manual_seed(7)
    meant = {module: random_lora(module.shape, g) for module in spelled(base, spelling, seed)}
    path, written = tmp_path / "read.safetensors", tmp_path / "written.safetensors"
    prefixes = (f"{base.denoiser}." if "diffusers" in spelling else "diffusion_model.", "lora_unet_")
    readers = []
    for prefix in prefixes:
        adapter = krona_hub.read(save(path, {m: prefixed(prefix, m.name) for m in meant}, meant), base=base)
        readers.append(loading(path, base))
    try:
        krona_hub.write(adapter, written, format="kohya-lora", base=base)
    except InexpressibleError as error:  # a module of two layers needs both
        assert "only one of them is adapted" in str(error) and not any(readers)
        return
    again = krona_hub.read(written, base=base)
    assert all(norm(again[layer].sums) == 0 for layer in again.layers.keys() - adapter.layers.keys())  # rows of q|k|v
    check(again.with_layers({layer: again[layer] for layer in adapter.layers}), base, meant, seed)
    found = loading(written, base)
    assert len(found) >= max(map(len, readers)), (found, readers)
    unmapped = {prefixed("lora_unet_", layer.partition(".")[2]) for layer in adapter}
    known = spellings(name)[0] != "diffusers" and not is_unet(base.components[base.denoiser])
    assert found or not known or modules_in(written) != unmapped, "as the trainers of this base model write them"


def loading(path: Path, base: Base) -> list[str]:
    """The applications that load a file, of those whose names depend on the base model."""
    found = loads_in(describe(path, base=base))
    return [name for name, verdict in found.items() if verdict.ok and not APPLICATIONS[name].every_base]


def prefixed(prefix: str, name: str) -> str:
    return prefix + (name.replace(".", "_") if prefix.endswith("_") else name)


def save(path: Path, names: Mapping[Spelled, str], meant: Mapping[Spelled, Lora | Lokr]) -> Path:
    tensors = {}
    for module, numbers in meant.items():
        tensors |= numbers.tensors(names[module]) | {f"{names[module]}.alpha": torch.tensor(ALPHA)}
    save_file(tensors, path)
    return path


def modules_in(path: Path) -> set[str]:
    with safe_open(path, "pt") as file:
        keys = list(file.keys())
    return {re.sub(r"\.(lora_(up|down)\.weight|lokr_w\d(_[ab])?|alpha)$", "", key) for key in keys}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "spelling"), EVERY, ids=["-".join(case) for case in EVERY])
def test_a_file_of_any_spelling_names_its_base_or_leaves_a_doubt(name, spelling, tmp_path):
    """A detection that is sure is right, and reads the same."""
    base, seed, g = catalog.get(name), random.Random(f"{name} {spelling}"), torch.Generator().manual_seed(7)
    meant = {module: random_lora(module.shape, g) for module in spelled(base, spelling, seed)}
    names = {module: prefixed("lora_unet_", module.name) for module in meant}
    found = detection.candidates({names[module]: module.shape for module in meant})
    assert name in {known for c in detection.ties(found) for known in (*c.names, *c.variants)}
    sure = detection.settled(found)
    if sure is not None:
        adapter = krona_hub.read(save(tmp_path / "x.safetensors", names, meant))
        check(adapter, base, meant, seed)
