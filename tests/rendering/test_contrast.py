"""Text can be read and lines told from the paper, in both colour schemes: the ratios of WCAG 2.2, from the CSS."""

import re

import pytest

from krona_hub.rendering.html.style import STYLE

TEXT, GRAPHIC = 4.5, 3.0  # WCAG 1.4.3 and 1.4.11, level AA


def colours(scheme):
    """Name -> (r, g, b) of a scheme; dark names what it changes."""
    light, dark = (
        dict(re.findall(r"--([\w]+):([^;}]+)", block)) for block in re.findall(r":root\{([^}]*)\}", STYLE)[:2]
    )
    return {name: rgb(value) for name, value in (light | (dark if scheme == "dark" else {})).items()}


def rgb(value):
    if value.startswith("#"):
        digits = value[1:] if len(value) == 7 else "".join(2 * c for c in value[1:])
        return tuple(int(digits[i : i + 2], 16) for i in (0, 2, 4))
    return tuple(int(part) for part in value.split(","))


def over(colour, paper, alpha):
    return tuple(alpha * c + (1 - alpha) * p for c, p in zip(colour, paper, strict=True))


def luminance(colour):
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one, other):
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def test_the_measure_knows_its_ends():
    assert contrast((0, 0, 0), (255, 255, 255)) == pytest.approx(21)
    assert contrast((9, 9, 9), (9, 9, 9)) == 1


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read(scheme):
    found = colours(scheme)
    for ink in ("ink", "soft"):
        for paper in ("bg", "card"):
            assert contrast(found[ink], found[paper]) >= TEXT, (ink, paper)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_numbers_in_the_heat_map_can_be_read_at_every_strength(scheme):
    found = colours(scheme)
    (step,) = re.findall(r"calc\(var\(--e\)\*([.\d]+)\)", STYLE)
    for percent in range(1, 101):
        cell = over(found["heat"], found["bg"], percent * float(step))
        assert contrast(found["ink"], cell) >= TEXT, percent


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_lines_and_dots_stand_out_from_the_paper(scheme):
    found = colours(scheme)
    for name in ("c0", "c1", "c2", "c3", "dot"):
        assert contrast(found[name], found["bg"]) >= GRAPHIC, name
