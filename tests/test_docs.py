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
@pytest.mark.parametrize("page", ["README.md", "docs/merging.md"])
def test_a_page_shows_what_the_commands_print(page):
    assert comparable((ROOT / page).read_text()) == comparable(PAGES[page]()), "run: python -m scripts.make_docs"


def comparable(page: str) -> str:
    """The page without what is not the same on every machine: seconds, and differences that rounding alone makes."""
    page = re.sub(r"(worst relative difference )\d\S*e-\d+", r"\1…", page)
    return re.sub(r"(written .*? in )\d.*", r"\1…", page)


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
