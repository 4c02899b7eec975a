"""Half precision, and stand-ins for packages and devices that may be missing."""

import errno
import sys
from importlib.machinery import ModuleSpec
from importlib.metadata import version
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from krona_hub import read
from krona_hub.errors import NoDeviceError, ResourceError, StoppedError
from krona_hub.training import setup
from krona_hub.training.api import train
from krona_hub.training.configuration import checked, preset_values
from krona_hub.training.model import device
from krona_hub.training.model.precision import MixedPrecision
from krona_hub.training.progress import checkpoint, metrics
from krona_hub.training.progress.metrics import read_metrics, series, trackers_of
from tests.training.test_runs import stop_after


@pytest.mark.parametrize("mode", ["bf16", "fp16"])
def test_mixed_precision_learns_what_float32_learns_up_to_its_rounding(mode, quick, tmp_path):
    whole = read(train(quick).adapter, base=quick["base"])
    mixed = read(train(quick, mixed_precision=mode, output=str(tmp_path / mode)).adapter, base=quick["base"])
    assert not all(torch.equal(d.dense(), mixed[n].dense()) for n, d in whole.layers.items())
    moved, apart = torch.tensor(0.0), torch.tensor(0.0)
    for name, delta in whole.layers.items():
        moved += delta.dense().square().sum()
        apart += (delta.dense() - mixed[name].dense()).square().sum()
    assert apart < 0.05 * moved


def test_a_base_in_half_precision_trains_validates_and_draws(quick):
    more = {"base_dtype": "bfloat16", "held_out": 1, "validate_every": 2, "sample_every": 2, "sample_steps": 2}
    report = train(quick | more)
    assert len(report.validation) == 3 and len(list((report.run / "samples").glob("step-*.png"))) == 3
    adapter = read(report.adapter, base=quick["base"])
    assert all(t.dtype == torch.float32 for d in adapter.layers.values() for t in d.tensors)


def test_float16_looks_for_a_scale_that_keeps_gradients_finite():
    weight = nn.Parameter(torch.ones(2))
    optimizer, precision = torch.optim.SGD([weight], lr=1.0), MixedPrecision("fp16", torch.device("cpu"))
    first = precision.state["scale"]
    precision.backward(weight.sum() * float("inf"))
    precision.unscale(optimizer)
    precision.step(optimizer, finite=False)
    assert precision.state["scale"] < first and torch.equal(weight.detach(), torch.ones(2))
    other = MixedPrecision("fp16", torch.device("cpu"))
    other.restore(precision.state)
    assert other.state == precision.state


def test_a_run_in_float16_goes_on_to_the_same_bytes(quick, tmp_path):
    whole = train(quick, mixed_precision="fp16", output=str(tmp_path / "whole")).adapter.read_bytes()
    with pytest.raises(StoppedError):
        train(quick, mixed_precision="fp16", progress=stop_after(1))
    assert train(resume_from=quick["output"]).adapter.read_bytes() == whole


# --- packages --------------------------------------------------------------------------------------------------------


def pretend(monkeypatch, name, **content):
    """Install a module of that name for the duration of the test."""
    module = ModuleType(name)
    module.__dict__.update(content)
    module.__spec__ = ModuleSpec(name, None)
    monkeypatch.setitem(sys.modules, name, module)


def test_the_paper_presets_take_eight_bit_adam_where_it_is_installed(monkeypatch, quick):
    with monkeypatch.context() as without:
        without.setattr("krona_hub.training.configuration.find_spec", lambda name: None)
        assert preset_values("paper-sd")["optimizer"] == "adamw"
    made = []

    class AdamW8bit(torch.optim.AdamW):
        def __init__(self, parameters, **arguments):
            made.append(arguments)
            super().__init__(parameters, **arguments)

    pretend(monkeypatch, "bitsandbytes")
    pretend(monkeypatch, "bitsandbytes.optim", AdamW8bit=AdamW8bit)
    report = train(quick, preset="paper-sd", shape="8x4", learning_rate=2e-3)
    assert made[0]["lr"] == 2e-3 and read(report.adapter, base=quick["base"]).parameters == report.parameters


@pytest.mark.parametrize(("name", "package"), [("prodigy", "prodigyopt"), ("schedule-free", "schedulefree")])
def test_an_optimizer_of_another_package_goes_on_to_the_same_bytes(name, package, quick, tmp_path):
    pytest.importorskip(package)
    more = {"optimizer": name, "learning_rate": 1.0 if name == "prodigy" else 1e-2, "validate_every": 2, "held_out": 1}
    whole = train(quick | more, output=str(tmp_path / "whole"))
    assert any(d.low_rank_delta().any() for d in read(whole.adapter, base=quick["base"]).layers.values())
    with pytest.raises(StoppedError):
        train(quick | more, progress=stop_after(1))
    assert train(resume_from=quick["output"]).adapter.read_bytes() == whole.adapter.read_bytes()


def test_eight_bit_adam_goes_on_to_the_same_bytes(quick, tmp_path):
    pytest.importorskip("bitsandbytes")
    more = {"optimizer": "adamw-8bit", "shape": "2x2", "targets": "all"}  # B of 4,096 numbers and more is in eight bits
    whole = train(quick | more, output=str(tmp_path / "whole"))
    with pytest.raises(StoppedError):
        train(quick | more, progress=stop_after(1))
    assert train(resume_from=quick["output"]).adapter.read_bytes() == whole.adapter.read_bytes()


def test_what_a_schedule_free_optimizer_hands_out_are_its_averages(monkeypatch, quick):
    """The factors in training mode differ from those that are validated and written."""

    class AdamWScheduleFree(torch.optim.SGD):
        def __init__(self, parameters, lr, **_):
            super().__init__(parameters, lr=lr)
            self.shift = 0.0

        def eval(self):
            self.move(0.25 - self.shift)

        def train(self):
            self.move(-self.shift)

        def move(self, by):
            self.shift += by
            for p in self.param_groups[0]["params"]:
                p.data.add_(by)

    pretend(monkeypatch, "schedulefree", AdamWScheduleFree=AdamWScheduleFree)
    report = train(quick, optimizer="schedule-free", learning_rate=0.0)
    factors = [t for d in read(report.adapter, base=quick["base"]).layers.values() for t in (d.sums[0].right,)]
    assert all(torch.allclose(b, torch.full_like(b, 0.25)) for b in factors)


class Eight(nn.Linear):
    """A layer with 8-bit weights, as in quantization packages: its weight is usable only through a call."""

    def __init__(self, plain):
        super().__init__(plain.in_features, plain.out_features, plain.bias is not None)
        scale = plain.weight.detach().abs().max() / 127
        self.weight = nn.Parameter((plain.weight.detach() / scale).round().to(torch.int8), requires_grad=False)
        self.scale, self.bias = scale, plain.bias

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) * self.scale, self.bias)


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_quantised_base_trains(how, monkeypatch, quick):
    import diffusers

    requests, load = [], diffusers.DiffusionPipeline.from_pretrained

    def loaded(path, quantization_config, **more):
        requests.append(quantization_config)
        pipe = load(path, **more)
        for parent in list(pipe.unet.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear:
                    setattr(parent, name, Eight(child))
        pipe.unet.is_quantized = True
        return pipe

    pretend(monkeypatch, "bitsandbytes")
    monkeypatch.setattr(
        "importlib.metadata.version", lambda name: "0.49.0" if name == "bitsandbytes" else version(name)
    )
    monkeypatch.setattr(device.diffusers.DiffusionPipeline, "from_pretrained", loaded)
    monkeypatch.setattr(device, "has_gpu", lambda: False)
    with pytest.raises(NoDeviceError, match="int8-torchao"):
        train(quick, quantize=how)
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    report = train(quick, quantize=how)
    assert set(requests[0].quant_mapping) == {"unet", "transformer"}
    assert any(d.low_rank_delta().any() for d in read(report.adapter, base=quick["base"]).layers.values())


@pytest.mark.parametrize(("how", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_layers_of_bitsandbytes_train(how, layer, monkeypatch, quick):
    """Real bitsandbytes layers on any device: diffusers creates them only on a GPU, although they work without."""
    pytest.importorskip("bitsandbytes")
    from diffusers.quantizers.bitsandbytes import bnb_quantizer

    for kind in (bnb_quantizer.BnB4BitDiffusersQuantizer, bnb_quantizer.BnB8BitDiffusersQuantizer):
        monkeypatch.setattr(kind, "validate_environment", lambda *_, **__: None)
        monkeypatch.setattr(kind, "update_device_map", lambda *_: {"": "cpu"})
    monkeypatch.setattr(device, "has_gpu", lambda: True)
    settings = checked(quick | {"quantize": how})
    assert layer in {type(m).__name__ for m in device.open_base(settings, device.machine_for(settings)).unet.modules()}
    report = train(settings)
    assert any(d.low_rank_delta().any() for d in read(report.adapter, base=quick["base"]).layers.values())


def test_a_base_that_torchao_quantises_trains(quick):
    pytest.importorskip("torchao")
    report = train(quick, quantize="int8-torchao")
    assert any(d.low_rank_delta().any() for d in read(report.adapter, base=quick["base"]).layers.values())


def test_tensorboard_is_told_where_it_is_installed_and_a_missing_tracker_is_refused(monkeypatch):
    monkeypatch.setattr("krona_hub.training.progress.metrics.find_spec", lambda name: {"tensorboardX": 1}.get(name))
    assert trackers_of(checked({})) == ("tensorboard",) and trackers_of(checked({"trackers": "none"})) == ()
    assert trackers_of(checked({"trackers": "auto,tensorboard"})) == ("tensorboard",)
    with pytest.raises(NoDeviceError, match="pip install wandb"):
        trackers_of(checked({"trackers": ["wandb"]}))


def test_a_tracker_is_told_every_step(monkeypatch, quick):
    """The tracker interface of accelerate, with a tracker that records its calls."""
    from accelerate.tracking import GeneralTracker

    class Remembers(GeneralTracker):
        name, requires_logging_directory, rows = "remembers", False, []

        def __init__(self):
            super().__init__()

        @property
        def tracker(self):
            return self.rows

        def store_init_configuration(self, values):
            self.rows.append(values)

        def log(self, values, step, **_):
            self.rows.append((step, values))

    monkeypatch.setattr(setup, "trackers_of", lambda settings: (Remembers(),))
    report = train(quick, learning_rate=2e-3, held_out=1, validate_every=4)
    config, *rows = Remembers.rows
    assert config["learning_rate"] == "0.002" and [step for step, _ in rows] == [0, 1, 2, 3, 4, 4]
    assert {"loss", "smooth_loss", "learning_rate"} <= set(rows[1][1])
    assert [(step, row["validation_loss"]) for step, row in (rows[0], rows[-1])] == list(report.validation)


def test_tensorboard_can_read_what_it_is_told(quick):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    report = train(quick, trackers=["tensorboard"])
    book = events.EventAccumulator(str(report.run / "krona"))
    book.Reload()
    logged = [(event.step, pytest.approx(event.value, rel=1e-6)) for event in book.Scalars("loss")]
    assert series(read_metrics(report.run), "loss") == logged


# --- a full disk -----------------------------------------------------------------------------------------------------


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_is_told_and_the_checkpoint_before_it_is_whole(monkeypatch, quick, tmp_path):
    whole = train(quick, checkpoint_every=1, output=str(tmp_path / "whole")).adapter.read_bytes()
    written, plain = [], checkpoint.write_tensors

    def fills_up(path, *arguments, **more):
        written.append(path)
        return full() if len(written) == 3 else plain(path, *arguments, **more)

    monkeypatch.setattr(checkpoint, "write_tensors", fills_up)
    with pytest.raises(ResourceError, match="disk is full") as caught:
        train(quick, checkpoint_every=1)
    assert caught.value.exit_code == 8
    assert sorted(p.name for p in (Path(quick["output"]) / "checkpoints").iterdir()) == ["step-0000001", "step-0000002"]
    assert train(resume_from=quick["output"]).adapter.read_bytes() == whole


def test_a_full_disk_under_the_metrics_is_told(monkeypatch, quick):
    run = Path(quick["output"])
    run.mkdir()
    broken = metrics.Metrics(run)
    monkeypatch.setattr(Path, "open", full)
    with pytest.raises(ResourceError, match="disk is full"):
        broken.add(1, loss=0.5)
    monkeypatch.undo()
    assert read_metrics(run) == []
