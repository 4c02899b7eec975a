"""What ships: the packages that are listed, the wheel they make, and how it behaves outside the checkout."""

import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

import krona_hub

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TOP = {"krona_hub": ROOT / "krona_hub", "krona_hub.cli": ROOT / "cli", "krona_hub.schemas": ROOT / "schemas"}


def packages_in_the_tree() -> set[str]:
    found = set()
    for name, folder in TOP.items():
        for init in folder.rglob("__init__.py"):
            found.add(".".join([name, *init.parent.relative_to(folder).parts]))
    return found


def test_the_package_list_equals_the_tree():
    assert set(PROJECT["tool"]["setuptools"]["packages"]) == packages_in_the_tree()


def test_every_folder_with_python_files_is_a_package():
    folders = {file.parent for top in TOP.values() for file in top.rglob("*.py")}
    assert [f for f in sorted(folders) if not (f / "__init__.py").exists()] == []


def test_the_version_is_stated_once_and_the_same():
    assert PROJECT["project"]["version"] == krona_hub.__version__


def test_every_dependency_is_pinned_in_the_known_good_set():
    pinned = {line.split("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    wanted = [*PROJECT["project"]["dependencies"], *PROJECT["project"]["optional-dependencies"]["test"]]
    assert {w.split(">=")[0] for w in wanted} <= pinned


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    """The wheel, built from a copy of what git tracks, so that no build folder appears in the checkout."""
    place = tmp_path_factory.mktemp("wheel")
    copy = place / "source"
    listed = subprocess.run(
        ["git", "-C", ROOT, "ls-files", "-co", "--exclude-standard"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    for name in listed:
        if (ROOT / name).is_file():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            (copy / name).write_bytes((ROOT / name).read_bytes())
    build = "from setuptools import build_meta as b; import sys; print(b.build_wheel(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", build, place], cwd=copy, check=True, capture_output=True)
    return next(place.glob("*.whl"))


@pytest.mark.slow
def test_the_wheel_holds_everything_inside_krona_hub(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    tops = {name.split("/")[0] for name in names}
    assert {t for t in tops if not t.endswith(".dist-info")} == {"krona_hub"}
    for needed in ("py.typed", "cli/main.py", "schemas/__init__.py", "assets/demo_lora.safetensors"):
        assert f"krona_hub/{needed}" in names, needed
    data = [p for p in (ROOT / "krona_hub").rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    missing = [str(p) for p in data if p.relative_to(ROOT).as_posix() not in names]
    assert not missing and any(name.endswith("licenses/LICENSE") for name in names)
    schemas = {f"krona_hub/schemas/{p.name}" for p in (ROOT / "schemas").glob("*.json")}
    assert schemas <= names


@pytest.mark.slow
def test_the_wheel_works_in_a_clean_environment_outside_the_checkout(wheel, tmp_path):
    home = tmp_path / "venv"
    venv.create(home, with_pip=False)
    site = next(home.glob("lib/python*/site-packages"))
    pip = [sys.executable, "-m", "pip", "--python", home / "bin/python"]
    installed = subprocess.run([*pip, "install", "-q", "--no-deps", wheel], capture_output=True, text=True)
    assert installed.returncode == 0, installed.stderr
    others = {str(Path(module.__file__).parent.parent) for module in map(__import__, ("torch", "click", "rich"))}
    (site / "dependencies.pth").write_text("\n".join(sorted(others)))
    where = "import krona_hub; print(krona_hub.__file__)"
    shown = subprocess.run([home / "bin/python", "-c", where], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert str(home) in shown.stdout
    ran = subprocess.run([home / "bin/krona", "demo"], cwd=tmp_path, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert (tmp_path / "krona-demo/commands.txt").exists()
