"""The list of what is tested names tests that exist."""

import re
from pathlib import Path

HERE = Path(__file__).parent


def test_every_test_that_the_list_names_exists():
    text = (HERE / "README.md").read_text()
    named, file = [], ""
    for name in re.findall(r"`(test_\w+(?:\.py)?)`", text):
        if name.endswith(".py"):
            file = name
        else:
            named.append((file, name))
    assert len(named) > 40
    missing = [(f, n) for f, n in named if f"def {n}(" not in (HERE / f).read_text()]
    assert not missing


def test_all_groups_are_there():
    groups = re.findall(r"^\| (\d+) ", (HERE / "README.md").read_text(), re.MULTILINE)
    assert groups == [str(n) for n in range(1, 16)]
