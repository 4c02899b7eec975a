"""Pages are text: whatever comes from a file is escaped, and nothing asks the network."""

import re

import pytest

from krona_hub.errors import ConflictError
from krona_hub.rendering.html.charts import Axis, Line, bars, chart
from krona_hub.rendering.html.heat_map import heat_map
from krona_hub.rendering.html.markup import facts, page, paragraph, section, table, write_html

HOSTILE = '"><script>alert(1)</script><img src=x onerror=alert(2)>'


def test_hostile_names_are_escaped_in_every_part():
    lines = [Line(HOSTILE, [(0, 1), (1, 2)]), Line(HOSTILE, [(0, 1)], dot=True)]
    parts = (
        paragraph(HOSTILE),
        facts([(HOSTILE, HOSTILE)], HOSTILE),
        table([HOSTILE, f">{HOSTILE}"], [[HOSTILE, HOSTILE]], HOSTILE),
        chart(HOSTILE, HOSTILE, Axis(HOSTILE), Axis(HOSTILE), lines),
        bars(HOSTILE, HOSTILE, [(HOSTILE, 1.0, HOSTILE)]),
        heat_map({f"{HOSTILE}.1.{HOSTILE}": 0.5, HOSTILE: 0.1}, HOSTILE, HOSTILE),
    )  # fmt: skip
    document = page(HOSTILE, HOSTILE, section(HOSTILE, *parts))
    assert document.count("<script") == 1  # our own, whose hash the policy names
    assert "<img" not in document
    assert document.count("&lt;script&gt;alert(1)") > 12


def test_a_page_names_no_address_but_its_own_parts():
    document = page("a", "b", section("c", table(["d"], [["e"]], "f")))
    assert not re.findall(r"(?:https?:)?//[a-z]", document)
    assert "default-src 'none'" in document


def test_the_same_values_give_the_same_page():
    def drawn():
        return chart("a", "b", Axis("x"), Axis("y"), [Line("c", [(0, 1), (3, 2)])])

    assert drawn() == drawn()


def test_points_that_are_no_numbers_are_left_out_of_a_chart():
    drawn = chart(
        "a", "b", Axis("x"), Axis("y", log=True), [Line("c", [(0, float("nan")), (1, 0.0), (2, 1.0), (3, 2.0)])]
    )
    assert "nan" not in drawn and "inf" not in drawn
    assert chart("a", "b", Axis("x"), Axis("y"), [Line("c", [(0.0, float("inf"))])]) == ""


def test_one_point_and_equal_values_can_be_drawn():
    assert "<path" in chart("a", "b", Axis("x"), Axis("y"), [Line("c", [(5, 0.0), (6, 0.0)])])
    assert "<circle" in chart("a", "b", Axis("x"), Axis("y"), [Line("c", [(5, 1.0)], dot=True)])


def test_the_heat_map_colours_on_a_fixed_scale_and_writes_the_number():
    drawn = heat_map({"unet.blocks.1.q": 0.25, "unet.blocks.1.k": 1.7, "unet.blocks.0.q": float("nan")}, "a", "b")
    assert "--e:25>25" in drawn and "--e:100>170" in drawn and "NaN or infinite" in drawn
    assert drawn.index("unet.blocks.0") < drawn.index("unet.blocks.1")


def test_an_earlier_page_is_replaced_and_any_other_file_is_not(tmp_path):
    path = tmp_path / "page.html"
    write_html(path, page("first", ""))
    write_html(path, page("second", ""))
    assert "second" in path.read_text()
    path.write_text("<!doctype html>somebody's own page")
    with pytest.raises(ConflictError):
        write_html(path, page("third", ""))
    assert "somebody" in path.read_text()
