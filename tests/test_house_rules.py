"""The rules of the house that a machine can check. Each failure says which rule, and where."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
RINGS = [  # a file may import from its own ring and from rings above it in this list, never below
    {"errors", "assets"},
    {"kron"},
    {"adapter", "origin"},
    {"schema", "checkpoints", "sources", "bases", "layers"},
    {"formats"},
    {"conversion", "accounting", "merging", "extraction", "combining", "verification", "runtime", "words"},
    {"images", "pages", "training", "evaluation"},
    {"report", "model_card", "demo", "hub"},
]
RING = {name: depth for depth, ring in enumerate(RINGS) for name in ring}
NETWORK = {"huggingface_hub", "requests", "httpx", "urllib", "socket"}
SCREEN = {"click", "rich", "rich_click", "argparse"}


def library_files() -> list[Path]:
    return [p for p in sorted((ROOT / "krona_hub").rglob("*.py")) if p != ROOT / "krona_hub/__init__.py"]


def part_of(path: Path) -> str:
    """The room of a file: `krona_hub/formats/known/peft.py` lives in `formats`."""
    name = path.relative_to(ROOT / "krona_hub").with_suffix("").parts[0]
    assert name in RING, f"{path}: no ring holds {name!r}; add it to RINGS where it belongs"
    return name


def imported(path: Path) -> set[str]:
    """Modules that a file imports, at any depth: a lazy import is an arrow too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports inside krona_hub"
            whole = node.module == "krona_hub"
            names |= {f"krona_hub.{alias.name}" for alias in node.names} if whole else {node.module}
    return names


def test_arrows_point_inwards():
    for path in library_files():
        for name in imported(path):
            if name.startswith("krona_hub."):
                target = name.split(".")[1]
                assert target in RING, f"{path}: {name} is in no ring; import from the module itself"
                assert RING[target] <= RING[part_of(path)], f"{path} must not import {name}"


def test_rooms_of_one_ring_form_no_cycle():
    arrows = {name: set() for name in RING}
    for path in library_files():
        arrows[part_of(path)] |= {n.split(".")[1] for n in imported(path) if n.startswith("krona_hub.")}
    done, path = set(), []

    def visit(name):
        assert name not in path, " -> ".join([*path, name])
        if name not in done:
            path.append(name)
            for target in arrows[name] - {name}:
                visit(target)
            done.add(path.pop())

    for name in arrows:
        visit(name)


def test_only_sources_and_hub_touch_the_network():
    for path in library_files():
        if part_of(path) not in {"sources", "hub", "model_card"}:
            assert not {n.split(".")[0] for n in imported(path)} & NETWORK, path


def test_the_library_neither_prints_nor_parses_command_lines():
    for path in library_files():
        assert not {n.split(".")[0] for n in imported(path)} & SCREEN, path
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path


def test_every_module_opens_with_a_sentence_about_itself():
    for path in library_files():
        if path.read_text().strip():
            assert ast.get_docstring(ast.parse(path.read_text())), f"{path}: say what this file is for"


def test_asserts_do_not_guard_user_input():
    for path in library_files():
        tree = ast.parse(path.read_text())
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Assert)], f"{path}: raise a KronaError"
