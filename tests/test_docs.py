"""The documents say what the program does: each page is made again and compared."""

import inspect
import re

import pytest

from krona_hub import errors
from scripts.make_docs import PAGES, ROOT


@pytest.mark.parametrize("page", ["docs/commands.md", "docs/errors.md"])
def test_a_generated_page_is_up_to_date(page, monkeypatch):
    assert (ROOT / page).read_text() == PAGES[page](), "run: python -m scripts.make_docs"


@pytest.mark.slow
def test_the_readme_shows_what_the_commands_print():
    made = PAGES["README.md"]()
    assert without_rounding((ROOT / "README.md").read_text()) == without_rounding(made), (
        "run: python -m scripts.make_docs"
    )


def without_rounding(page: str) -> str:
    """The page without the differences that rounding alone makes, which are not the same on every machine."""
    return re.sub(r"(worst relative difference )\d\S*e-\d+", r"\1…", page)


@pytest.mark.slow
def test_the_library_example_of_the_readme_runs(tmp_path, monkeypatch):
    from scripts.example_files import example_folder

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(example_folder(tmp_path))
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_every_error_class_has_a_code_of_its_own():
    classes = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.KronaError)]
    codes = [e.__dict__["code"] for e in classes]
    assert len(set(codes)) == len(codes) and all(re.fullmatch(r"KH\d{3}", code) for code in codes)
