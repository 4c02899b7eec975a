"""The table of modules: short, and whole again after a click on a header."""

import re

from krona_hub.rendering.html.module_table import modules_table

ROWS = [
    (("unet.blocks.0.to_q",), ("lora", 3)),
    (("unet.blocks.1.to_q", "unet.blocks.1.to_k"), ("lora", 5)),
    (("unet.blocks.0.to_k",), ("lora", 2)),
    (("unet.blocks.0.to_v", "unet.blocks.1.to_v"), ("lora", 7)),
    (("unet.conv_in",), ("lora", 1)),
]


def test_modules_stand_under_the_name_of_their_block():
    drawn = modules_table(("kind", ">parameters"), ROWS)
    heads = re.findall(r"scope=rowgroup[^>]*>(.*)", drawn)
    assert heads == ["unet.blocks.0", "unet.blocks.1", "in several blocks", "unet"]
    cells = re.findall(r"<tr><td>([^<]*)", drawn)
    assert cells == ["to_q", "to_k", "to_q + to_k", "unet.blocks.0.to_v + unet.blocks.1.to_v", "conv_in"]


def test_what_all_modules_have_alike_is_said_once_and_numbers_stay():
    drawn = modules_table(("kind", ">parameters"), [(layers, ("lora", 3)) for layers, _ in ROWS])
    assert "Kind of all: lora." in drawn and drawn.count("lora") == 1
    assert drawn.count("<td>3") == len(ROWS)
