"""One page of each kind."""

from PIL import Image

from krona_hub.cli.main import main
from krona_hub.rendering.html.markup import write_html
from krona_hub.rendering.html.training_report import Run, training_html


def every_page(adapters, folder):
    """Name -> the file of a page of that kind."""
    places = {name: folder / f"{name}.html" for name in ("inspect", "params", "convert", "training")}
    lora = str(adapters / "lora.safetensors")
    main(["inspect", lora, "--report", str(places["inspect"]), "-q"])
    main(["params", "--base", "sdxl", "--report", str(places["params"]), "-q"])
    main(["convert", lora, "--budget", "50%", "--dry-run", "--report", str(places["convert"]), "-q"])
    Image.new("RGB", (64, 64), "red").save(folder / "a.png")
    rows = [{"step": i, "loss": 1 / i, "smooth_loss": 1 / i, "validation_loss": 2 / i} for i in range(1, 60)]
    run = Run("toy", rows, {"prompt": "a photo " * 30}, None, {5: [folder / "a.png"]}, ["a long prompt " * 9])
    write_html(places["training"], training_html(run))
    return places
