"""The documents match the program: each page is generated again and compared."""

import doctest
import inspect
import re
import shlex
import tomllib

import pytest

from krona_hub import errors
from scripts.make_docs import PAGES, ROOT


@pytest.mark.parametrize("page", ["docs/commands.md", "docs/errors.md"])
def test_a_generated_page_is_up_to_date(page, monkeypatch):
    assert (ROOT / page).read_text() == PAGES[page](), "run: python -m scripts.make_docs"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/merging.md", "docs/generate.md"])
def test_a_page_shows_what_the_commands_print(page):
    assert comparable((ROOT / page).read_text()) == comparable(PAGES[page]()), "run: python -m scripts.make_docs"


def comparable(page: str) -> str:
    """Remove from a page what differs between machines: seconds, and differences due to rounding."""
    page = re.sub(r"(worst relative difference )\d\S*e-\d+", r"\1…", page)
    page = re.sub(r"(computed .*?, )\d.*", r"\1…", page)
    page = re.sub(r"(by )\d\S*( of 255)", r"\1…\2", page)
    return re.sub(r"(written .*? in )\d.*", r"\1…", page)


@pytest.mark.slow
def test_the_library_example_of_the_readme_runs(tmp_path, monkeypatch):
    from scripts.example_files import example_folder

    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    monkeypatch.chdir(example_folder(tmp_path))
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})


def test_the_sessions_of_the_runtime_page_run(tmp_path, monkeypatch):
    from krona_hub import write
    from tests import tiny
    from tests.formats import made

    pipe = tiny.sd15()
    base = tiny.save(pipe, tmp_path / "base")
    toy, yesterday = (made.lokr(tiny.layers(pipe), made.by_lycoris(4), ranks=(2,)) for _ in range(2))
    write(toy, tmp_path / "toy.safetensors", base=base)
    style = made.lora(tiny.layers(pipe, "to_q", "to_k", "to_v"))
    write(style, tmp_path / "style.safetensors", format="kohya-lora", base=base)
    monkeypatch.chdir(tmp_path)
    names = {"pipe": pipe, "toy": toy, "toy_of_yesterday": yesterday}
    assert run_sessions("docs/runtime.md", names) > 20


def test_the_sessions_of_the_training_page_run(tmp_path, monkeypatch):
    from tests.training.bases import save_base, save_photos

    save_base("sd15", tmp_path).rename(tmp_path / "tiny")
    save_photos(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert run_sessions("docs/training.md", {}) > 10


def run_sessions(page, names):
    """Run the `pycon` blocks of a page as one session and return the number of examples."""
    session = "\n".join(re.findall(r"```pycon\n(.*?)```", (ROOT / page).read_text(), re.DOTALL))
    test = doctest.DocTestParser().get_doctest(session, names, page, None, None)
    output = []
    failed, tried = doctest.DocTestRunner().run(test, out=output.append)
    assert not failed, "".join(output)
    return tried


@pytest.mark.parametrize("page", ["README.md", "docs/training.md"])
def test_the_training_commands_and_files_of_a_page_are_understood(page):
    from krona_hub.cli.train_command import command
    from krona_hub.training.configuration import checked

    text = (ROOT / page).read_text()
    lines = re.findall(r"^krona train (.*)", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)), re.MULTILINE)
    assert lines
    for line in lines:
        command.make_context("train", shlex.split(line, comments=True))
    for block in re.findall(r"```toml\n(.*?)```", text, re.DOTALL):
        checked(tomllib.loads(block))


def test_every_error_class_has_a_code_of_its_own():
    classes = [e for _, e in inspect.getmembers(errors, inspect.isclass) if issubclass(e, errors.KronaError)]
    codes = [e.__dict__["code"] for e in classes]
    assert len(set(codes)) == len(codes) and all(re.fullmatch(r"KH\d{3}", code) for code in codes)
