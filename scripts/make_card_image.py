"""Render the model card of an adapter, as the Hub shows it, to an image for the documentation.

Pushes the adapter to the loopback hub of the tests, converts the resulting README.md to HTML and takes a screenshot
with Chromium:

    krona train --preset tiny-scenes --output runs/toy --sample-every 250 --sample-prompts "a photo of a zorbi" …
    python -m scripts.make_card_image runs/toy/adapter.safetensors docs/images/card.png
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from PIL import Image, ImageChops

REPO, BASE = "ana/zorbi", "ana/tiny-scenes"
WIDTH, HEIGHT = 920, 6000  # pixels of the page; empty space below the card is cropped
STYLE = """
body { font: 16px/1.5 sans-serif; color: #1f2328; background: #fff; margin: 24px 32px; }
h1, h2 { border-bottom: 1px solid #d1d9e0; padding-bottom: 6px; line-height: 1.25; margin: 24px 0 14px; }
h1 { font-size: 30px; margin-top: 0; } h2 { font-size: 22px; }
table { border-collapse: collapse; display: block; width: max-content; max-width: 100%; overflow: hidden; }
table { margin: 0 0 16px; font-size: 14px; }
th, td { border: 1px solid #d1d9e0; padding: 5px 12px; } tr:nth-child(2n) td { background: #f6f8fa; }
code { font: 13px monospace; background: #eff1f3; padding: 2px 5px; border-radius: 5px; }
pre { background: #f6f8fa; padding: 14px; border-radius: 6px; overflow: hidden; }
pre code { background: none; padding: 0; }
p.tags span { background: #eef4ff; border: 1px solid #d1d9e0; border-radius: 12px; padding: 2px 10px; font-size: 13px;
  margin-right: 6px; display: inline-block; margin-bottom: 4px; }
a { color: #0969da; text-decoration: none; } img { max-width: 100%; }
"""


def main(adapter: Path, out: Path) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pulled = publish(adapter, folder)
        page = folder / "repo" / "card.html"
        page.write_text(to_html((pulled / "README.md").read_text()), encoding="utf-8")
        take_screenshot(page, out)


def publish(adapter: Path, folder: Path) -> Path:
    """Push the adapter, pull the repository and return its folder."""
    from tests.hub.loopback.server import Loopback

    with Loopback() as hub:
        os.environ |= {
            "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_owner", "HF_HOME": str(folder / "hf"), "HF_HUB_DISABLE_XET": "1",
        }  # fmt: skip
        from krona_hub.hub import pull, push

        push(adapter, REPO, base="tiny-scenes", base_model=BASE, with_lora=True, with_lokr=True)
        return pull(REPO, folder / "repo").out


def to_html(card: str) -> str:
    from markdown_it import MarkdownIt

    from krona_hub.hub.model_card import split

    front, text = split(card)
    body = MarkdownIt("commonmark", {"html": True}).enable("table").render(text)
    shown = [front["pipeline_tag"], front["library_name"], *front["tags"], f"adapter of {front['base_model']}"]
    tags = "".join(f"<span>{tag}</span>" for tag in dict.fromkeys([*shown, f"license: {front.get('license', 'none')}"]))
    return f'<!DOCTYPE html><meta charset="utf-8"><style>{STYLE}</style><p class="tags">{tags}</p>{body}'


def take_screenshot(page: Path, out: Path) -> None:
    """Take a screenshot of a page, cropped at the bottom and reduced to 96 colors."""
    browser = shutil.which("chromium") or shutil.which("google-chrome") or sys.exit("Chromium is not installed.")
    shot = page.with_suffix(".png")
    subprocess.run(
        [browser, "--headless", "--no-sandbox", "--hide-scrollbars", f"--window-size={WIDTH},{HEIGHT}",
         f"--screenshot={shot}", page.as_uri()],
        check=True, capture_output=True, timeout=120,
    )  # fmt: skip
    with Image.open(shot) as opened:
        image = opened.convert("RGB")
    edge = ImageChops.difference(image, Image.new("RGB", image.size, "white")).getbbox()
    image.crop((0, 0, WIDTH, edge[3] + 24 if edge else HEIGHT)).quantize(96).save(out, optimize=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
