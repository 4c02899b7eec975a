"""`--report` of the commands, end to end."""

import json

from krona_hub.cli.main import main
from tests.rendering.pages import every_page


def test_every_command_writes_a_page_without_addresses_and_small(adapters, tmp_path):
    for name, path in every_page(adapters, tmp_path).items():
        document = path.read_text("utf-8")
        assert len(document.encode()) < 150_000, name
        assert "http://" not in document and "https://" not in document
        assert "<h1>" in document and document.count("<script") == 1


def test_json_stays_one_document_beside_a_page(adapters, tmp_path, capsys):
    main(["inspect", str(adapters / "lokr.safetensors"), "--json", "--report", str(tmp_path / "a.html")])
    assert json.loads(capsys.readouterr().out)["format"] == "lycoris-lokr"
    assert (tmp_path / "a.html").exists()


def test_a_conversion_that_is_refused_has_a_page_too(adapters, tmp_path, capsys):
    """It is when a result is refused that one wants to see where the error is."""
    page, out = tmp_path / "refused.html", tmp_path / "o.safetensors"
    code = main(
        ["convert", str(adapters / "lora.safetensors"), "--shape", "2x2", "-o", str(out), "--report", str(page)]
    )
    assert code == 3 and not out.exists()
    document = page.read_text()
    assert "Refused, nothing was written." in document and "--allow-loss to write this result" in document
    assert "Relative error" in document
    said = capsys.readouterr()
    assert str(page) in said.out + said.err and "KH140" in said.err


def test_a_file_that_is_no_page_is_refused_before_any_work(adapters, tmp_path, capsys):
    path = tmp_path / "notes.html"
    path.write_text("mine")
    out = tmp_path / "o.safetensors"
    code = main(["convert", str(adapters / "lora.safetensors"), "-o", str(out), "--report", str(path)])
    assert code == 5 and path.read_text() == "mine"
    assert not out.exists()
