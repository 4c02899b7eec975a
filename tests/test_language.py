"""The project speaks plain American English with the words of the field: the worst departures are found here.

Looked at are texts that a person reads: strings of the library and of the command line, docstrings of public names,
and the documents. Texts stored in files, flags and keys that are published keep their spelling.
"""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PATTERNS = {  # expression -> what to write instead
    r"\b(is|are|was) no (?!longer|more|less|better|worse|larger|smaller)": "is not a … / Invalid … / Unknown …",
    r"\bshall\b": "the present tense",
    r"^Of ": "what the option is, as a noun",
    r"\b[Ss]ays? nothing\b": "suppress progress and notes",
    r"\bgo(es|ing)? on\b": "continue, resume",
    r"\bno number\b": "NaN or infinite",
    r"\bdrawn?\b|\bdraws\b": "generate (images), plot (charts), sample (random numbers)",
    r"\b(told|tells|tell)\b": "report, show, state",
    r"\bsa(id|ys) aloud\b|\baloud\b": "log",
    r"(?<![-_`/.])\bpictures?\b(?![-_`/.]\w)": "image",
    r"\bmended\b": "fixed",
    r"\btwins?\b": "companion export",
    r"\bspokes?\b": "format",
    r"[Cc]olour|[Oo]ptimis|[Rr]ecognis|[Nn]ormalis|[Qq]uantis|[Ss]tabilis|[Pp]ersonalis|[Ii]nitialis|[Ss]erialis"
    r"|[Rr]egularis|[Aa]rtefact|[Bb]ehaviour|\b[Gg]rey": "American spelling",
    r"\benergy kept\b|\bkept energy\b": "retained energy",
}  # fmt: skip
FOUND = {re.compile(pattern): advice for pattern, advice in PATTERNS.items()}
FROZEN = {  # published names and words, as they stand in flags, keys, error classes and files
    "UnrecognisedError", "--quantise", "draw_prior", "prior_pictures", "krona-pictures", "[pictures|base]",
    "[pictures]",
}  # fmt: skip
PACKAGES = sorted({p.relative_to(ROOT).parts[:2] if p.parts[len(ROOT.parts)] == "krona_hub" else ("cli",)
                   for top in ("krona_hub", "cli") for p in (ROOT / top).rglob("*.py")})  # fmt: skip
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(p.relative_to(ROOT).as_posix() for p in (ROOT / "docs").glob("*.md"))]


def objections(text: str) -> list[str]:
    for word in FROZEN:
        text = text.replace(word, "")
    return [f"{found[0]!r} -> {advice}" for pattern, advice in FOUND.items() if (found := pattern.search(text))]


def docstrings(tree: ast.Module) -> dict[ast.Constant, bool]:
    """Every docstring, and whether it belongs to a public name."""
    found = {}

    def visit(node: ast.AST, public: bool) -> None:
        body = getattr(node, "body", [])
        if body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            found[body[0].value] = public
        for child in body:
            if isinstance(child, ast.FunctionDef | ast.ClassDef):
                visit(child, public and not child.name.startswith("_"))

    visit(tree, True)
    return found


def texts(path: Path) -> list[tuple[int, str]]:
    """(line, text) of every string that a person may read: all but private docstrings, names and patterns."""
    tree = ast.parse(path.read_text())
    docs = docstrings(tree)
    strings = [n for n in ast.walk(tree) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
    read = [n for n in strings if docs.get(n, " " in n.value.strip() and not re.search(r"\\[bwds]|\(\?", n.value))]
    return [(n.lineno, n.value) for n in read]


@pytest.mark.parametrize("package", PACKAGES, ids="/".join)
def test_the_code_speaks_plainly(package):
    place = ROOT.joinpath(*package)
    wrong = [
        f"{path.relative_to(ROOT)}:{line}: {objection} in {text.strip()[:90]!r}"
        for path in ([place] if place.suffix else sorted(place.rglob("*.py")))
        for line, text in texts(path)
        for objection in objections(text)
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("page", PAGES)
def test_a_document_speaks_plainly(page):
    lines = enumerate((ROOT / page).read_text().splitlines(), 1)
    wrong = [f"{page}:{n}: {objection} in {line.strip()[:90]!r}" for n, line in lines for objection in objections(line)]
    assert not wrong, "\n".join(wrong)


def test_the_patterns_find_what_they_are_for():
    """So that the test can fail: each pattern objects to a text that the project had once."""
    once = [
        "'64' is no shape.", "The tool that shall load it", "Of Adam.", "Say nothing but the result.",
        "Go on with a run; to go on", "the loss is no number", "is drawn anew", "what was told", "said aloud",
        "a folder of pictures", "mended", "its twins", "a spoke", "colours", "99 % of the energy kept",
    ]  # fmt: skip
    assert all(map(objections, once))
    fine = "CONTRIBUTING: `prior_pictures` and krona-pictures are not images; it is no longer than 4, retained energy."
    assert not objections(fine)
