"""Pages in headless Chromium, where there is one: no error on the console, no request, no sideways scrolling."""

import shutil
import subprocess

import pytest

from krona_hub.cli.main import main
from tests.rendering.pages import every_page

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
PROBE = """<script>addEventListener("load", () => {
  const head = document.querySelector("table.sortable th button");
  if (head) { head.click(); head.click(); }
  document.title = [document.documentElement.scrollWidth, innerWidth, performance.getEntriesByType("resource").length,
    head ? head.parentNode.getAttribute("aria-sort") : "none"].join("/");
});</script>"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: pages were not looked at in a browser"),
]


@pytest.mark.parametrize("width", [400, 1280])
@pytest.mark.parametrize("name", ["inspect", "params", "convert", "training"])
def test_a_page_runs_without_errors_requests_or_sideways_scrolling(name, width, adapters, tmp_path):
    document = every_page(adapters, tmp_path)[name].read_text("utf-8")
    start, end = document.index("<meta http-equiv"), document.index('<meta name="viewport"')
    path = tmp_path / "probed.html"  # the policy forbids the probe, as it should: it is taken out for this test alone
    path.write_text(document[:start] + document[end:].replace("</body>", PROBE + "</body>"), "utf-8")
    dom, errors = visited(path, width)
    scroll, window, requests, sorting = dom.split("<title>")[1].split("</title>")[0].split("/")
    assert int(scroll) <= int(window)
    assert requests == "0"
    assert sorting in ("descending", "none")
    assert not errors


def test_the_policy_lets_the_pages_own_script_run_and_no_other(adapters, tmp_path):
    main(["params", "--base", "sd15", "--report", str(tmp_path / "p.html"), "-q"])
    path = tmp_path / "p.html"
    path.write_text(path.read_text("utf-8").replace("</body>", "<script>document.title='in'</script></body>"), "utf-8")
    dom, errors = visited(path, 1280)
    assert "<title>in</title>" not in dom and "<button" in dom
    assert any("Content Security Policy" in line for line in errors)


def visited(path, width):
    """The document after its scripts ran, and what the console said."""
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr", "--v=0",
         f"--user-data-dir={path.parent / 'profile'}", f"--window-size={width},900", "--dump-dom", path.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]
