"""The rules of the house that a machine can check. Each failure says which rule, and where."""

import ast
import re
from collections import Counter, defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
RINGS = [  # a package may import from its own ring and from rings above it in this list, never below
    {"errors", "aliases", "version", "assets"},
    {"kron", "checkpoints"},
    {"adapters", "sources"},
    {"layers", "bases"},
    {"schema"},
    {"formats"},
    {"conversion", "merging", "pipelines", "accounting"},
    {"combining", "extraction", "verification", "rendering", "images"},
    {"calibration"},
    {"training"},
    {"hub", "evaluation"},
]
FLOORS = {  # the same inside three packages: a file, or a folder of files
    "formats": [{"forms", "parsing"}, {"known"}, {"reading"}, {"compatibility"}, {"writing"}],
    "merging": [
        {"arithmetic", "output"},
        {"base_weights", "block_weights", "merge_record"},
        {"merge_input", "state_dict", "undo"},
        {"plan"},
        {"request", "report"},
        {"execute"},
        {"api"},
    ],
    "training": [
        {"settings"},
        {"configuration", "training_record", "model"},
        {"data"},
        {"progress"},
        {"plan", "loop", "html_report"},
        {"setup"},
        {"finish"},
        {"api"},
    ],
}
VERBS = (
    "calibration",
    "combining",
    "conversion",
    "extraction",
    "images",
    "merging",
)  # packages of one verb, with the same doors
DOORS = ("api", "request", "execute", "report")
NETWORK = {"huggingface_hub", "requests", "httpx", "urllib", "socket"}
SCREEN = {"click", "rich", "rich_click", "argparse"}
VAGUE = {
    "asked", "carry_out", "curves", "draws", "facts", "faults", "finishing", "fitting", "following", "held",
    "interruptions", "leftovers", "look", "looking", "made_of", "numbers", "others", "parts", "places", "placing",
    "preparing", "pruning", "reporting", "sampling", "saving", "sharding", "spelling", "spoke", "syncing", "tracking",
    "watching", "ways", "wording", "words",
}  # fmt: skip
MOST_LINES, LONGEST_FUNCTION, MOST_FILES = 400, 70, 20
RULER = re.compile(r"^# (?:---|──) .* (?:-|─)+$")


def python_files(*tops: str) -> list[Path]:
    return [path for top in tops for path in sorted((ROOT / top).rglob("*.py"))]


TREES = {path: ast.parse(path.read_text()) for path in python_files("krona_hub", "cli")}
LIBRARY = [path for path in TREES if path.is_relative_to(ROOT / "krona_hub")]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = ("krona_hub", *parts) if parts[0] == "cli" else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(path): path for path in TREES}


def imported(path: Path) -> set[str]:
    """Modules that a file imports at any depth: lazy imports and those under TYPE_CHECKING are arrows, too."""
    names = set()
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: write absolute imports inside krona_hub"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in MODULES else str(node.module) for name in whole}
    return names - {module_of(path)}


def depth_of(name: str, rings: list[set[str]], where: str) -> int:
    depth = next((i for i, ring in enumerate(rings) if name in ring), None)
    assert depth is not None, f"{where}: no ring holds {name!r}; add it to the rings where it belongs"
    return depth


def faces() -> list[Path]:
    return [path for path in TREES if path.name == "__init__.py" and path.parent.name not in ("krona_hub", "cli")]


# --- arrows ----------------------------------------------------------------------------------------------------------


def test_arrows_point_inwards():
    for path in LIBRARY:
        if path != ROOT / "krona_hub/__init__.py":
            own = module_of(path).split(".")[1]
            for name in imported(path):
                if name.startswith("krona_hub."):
                    target = name.split(".")[1]
                    assert depth_of(target, RINGS, name) <= depth_of(own, RINGS, str(path)), f"{path} imports {name}"


@pytest.mark.parametrize("package", FLOORS)
def test_arrows_point_down_inside_a_package(package):
    prefix = f"krona_hub.{package}."
    for path in LIBRARY:
        if module_of(path).startswith(prefix):
            own = module_of(path).removeprefix(prefix).split(".")[0]
            for name in imported(path):
                if name.startswith(prefix):
                    target = name.removeprefix(prefix).split(".")[0]
                    depths = depth_of(target, FLOORS[package], name), depth_of(own, FLOORS[package], str(path))
                    assert depths[0] <= depths[1], f"{path} imports {name}"


def test_imports_form_no_circle():
    graph = {name: imported(path) & MODULES.keys() for name, path in MODULES.items() if path.name != "__init__.py"}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail[trail.index(name) :], name])
        if name not in done:
            trail.append(name)
            for target in sorted(graph.get(name, ())):
                visit(target)
            done.add(trail.pop())

    for name in graph:
        visit(name)


def test_packages_of_one_ring_form_no_circle():
    arrows = defaultdict(set)
    for path in LIBRARY:
        if path != ROOT / "krona_hub/__init__.py":
            own = module_of(path).split(".")[1]
            arrows[own] |= {n.split(".")[1] for n in imported(path) if n.startswith("krona_hub.")} - {own}
    done, trail = set(), []

    def visit(name):
        assert name not in trail, " -> ".join([*trail, name])
        if name not in done:
            trail.append(name)
            for target in arrows[name]:
                visit(target)
            done.add(trail.pop())

    for name in list(arrows):
        visit(name)


def test_only_the_api_of_a_verb_imports_its_execute_and_inside_a_function():
    for verb in VERBS:
        name, door = f"krona_hub.{verb}.execute", f"krona_hub.{verb}.api"
        assert {module_of(path) for path in TREES if name in imported(path)} == {door}
        top = [node for node in TREES[MODULES[door]].body if isinstance(node, ast.ImportFrom)]
        assert name not in {node.module for node in top}, f"{door} imports {name} at its top"


def test_only_sources_and_hub_touch_the_network():
    for path in LIBRARY:
        if module_of(path).split(".")[1:2] not in (["sources"], ["hub"]):
            assert not {n.split(".")[0] for n in imported(path)} & NETWORK, path


# --- rooms -----------------------------------------------------------------------------------------------------------


def test_every_verb_has_the_same_doors():
    for verb in VERBS:
        missing = [door for door in DOORS if f"krona_hub.{verb}.{door}" not in MODULES]
        assert not missing, f"krona_hub/{verb} lacks {missing}"


def test_a_face_defines_nothing():
    for path in faces():
        made = (ast.FunctionDef, ast.ClassDef)
        own = [node.name for node in TREES[path].body if isinstance(node, made) and node.name != "__getattr__"]
        assert not own, f"{path} defines {own}"


def test_no_module_has_the_name_of_a_function_in_it_that_a_face_hands_on():
    for path in faces():
        for node in TREES[path].body:
            if isinstance(node, ast.ImportFrom):
                same = [a.name for a in node.names if str(node.module).endswith(f".{a.name}")]
                assert not same, f"{path}: the name of {node.module} would be hidden by {same}"


def test_no_folder_has_too_many_files():
    folders = Counter(path.parent.relative_to(ROOT).as_posix() for path in LIBRARY)
    assert not {name: n for name, n in folders.items() if n > MOST_FILES}


def test_nothing_floats_beside_the_packages():
    beside = {path.stem for path in (ROOT / "krona_hub").glob("*.py")}
    assert beside == {"__init__", "errors", "aliases", "version"}


# --- sizes and names -------------------------------------------------------------------------------------------------


def test_no_file_and_no_function_is_too_long():
    files = {path.name: n for path in TREES if (n := len(path.read_text().splitlines())) > MOST_LINES}
    functions = {
        f"{path.name}: {node.name}": node.end_lineno - node.lineno + 1
        for path in LIBRARY
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno + 1 > LONGEST_FUNCTION
    }
    assert not files and not functions, (files, functions)


def test_a_class_name_means_one_thing():
    where = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].append(path.relative_to(ROOT).as_posix())
    assert not {name: paths for name, paths in where.items() if len(paths) > 1}


def test_no_file_has_a_vague_name():
    assert not sorted(path.relative_to(ROOT).as_posix() for path in TREES if path.stem in VAGUE)


def test_no_module_stands_for_a_value():
    for path, tree in TREES.items():
        assert not [n for n in ast.walk(tree) if isinstance(n, ast.Name) and n.id == "ModuleType"], path


def test_what_several_packages_share_has_one_home():
    """One type of progress, one digest of files, one list of the file names of other programs."""
    homes = {"Progress": "aliases.py", "file_sha256": "digest.py", "PEFT_WEIGHTS": "file_names.py"}
    for path, tree in TREES.items():
        for node in tree.body:
            names = {node.name} if isinstance(node, ast.FunctionDef | ast.ClassDef) else set()
            if isinstance(node, ast.Assign):
                names = {n.id for t in node.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
            for name in names & homes.keys():
                assert path.name == homes[name], f"{path}: {name} belongs in {homes[name]}"
        if path.name != "file_names.py":
            texts = {n.value for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)}
            foreign = {"adapter_model.safetensors", "adapter_config.json", "pytorch_lora_weights.safetensors"}
            assert not texts & foreign, f"{path}: {texts & foreign} belongs in checkpoints/file_names.py"
        if path.name != "digest.py":
            assert "hashlib.file_digest" not in path.read_text(), f"{path}: use checkpoints.digest.file_sha256"


def test_sections_of_a_file_have_one_ruler():
    for path in TREES:
        for line in path.read_text().splitlines():
            if RULER.match(line):
                assert line.startswith("# --- ") and len(line) == 119, f"{path}: {line}"


def test_every_module_opens_with_a_sentence_about_itself():
    for path in TREES:
        if path.read_text().strip():
            assert ast.get_docstring(TREES[path]), f"{path}: say what this file is for"


# --- what the library does not do ------------------------------------------------------------------------------------


def test_the_library_neither_prints_nor_parses_command_lines():
    for path in LIBRARY:
        assert not {n.split(".")[0] for n in imported(path)} & SCREEN, path
        calls = [n.func for n in ast.walk(TREES[path]) if isinstance(n, ast.Call)]
        assert not any(isinstance(f, ast.Name) and f.id == "print" for f in calls), path


def test_asserts_do_not_guard_user_input():
    for path in LIBRARY:
        assert not [n for n in ast.walk(TREES[path]) if isinstance(n, ast.Assert)], f"{path}: raise a KronaError"
