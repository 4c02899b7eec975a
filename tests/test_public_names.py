"""`import krona_hub` is light, and its names are what they promise whatever else was imported."""

import ast
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import krona_hub

ROOT = Path(__file__).parent.parent


def submodules() -> list[str]:
    files = sorted((ROOT / "krona_hub").rglob("*.py"))
    parts = [f.relative_to(ROOT).with_suffix("").parts for f in files]
    return sorted({".".join(p[:-1] if p[-1] == "__init__" else p) for p in parts})


def test_importing_krona_hub_imports_no_torch():
    code = "import sys, krona_hub; print('torch' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("name", krona_hub.PUBLIC)
def test_a_public_name_is_there_and_says_what_it_is_for(name):
    value = getattr(krona_hub, name)
    assert value is getattr(import_module(krona_hub.PUBLIC[name]), name) and value.__doc__
    assert name in dir(krona_hub)


def test_public_functions_stay_callable_after_every_submodule_is_imported():
    names = [name for name in krona_hub.PUBLIC if name[0].islower()]
    code = (
        f"import importlib, krona_hub\nfor m in {submodules()!r}: importlib.import_module(m)\n"
        f"print(all(callable(getattr(krona_hub, n)) for n in {names!r}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "True\n", done.stderr


def test_no_module_has_the_name_of_a_public_function():
    tops = {m.split(".")[1] for m in submodules() if "." in m}
    later = {
        "plan_merge",
        "merge",
        "apply_to_state_dict",
        "extract",
        "combine",
        "verify",
        "attach",
        "detach",
        "load_into",
    }
    assert not tops & (set(krona_hub.PUBLIC) | later | {"train", "push", "pull"})


def test_a_name_that_does_not_exist_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        krona_hub.nothing  # noqa: B018


def test_type_checkers_see_the_same_names():
    tree = ast.parse((ROOT / "krona_hub/__init__.py").read_text())
    block = next(node for node in tree.body if isinstance(node, ast.If))
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == krona_hub.PUBLIC
