"""Gathered moments against whole matrices of the same calls, and interruption."""

from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from krona_hub import read
from krona_hub.adapters.moments import delta_digest
from krona_hub.bases.loading import load_base
from krona_hub.calibration.denoiser_calls import outputs_of
from krona_hub.calibration.execute import gathered, open_session, record_of
from krona_hub.calibration.gather_moments import PROJECTIONS, MomentGatherer
from krona_hub.calibration.partial_sums import read_partial, write_partial
from krona_hub.errors import StoppedError, UnsupportedError
from krona_hub.kron.weighted.middle import middle_of
from krona_hub.layers.module_tree import parts_of, slots_of
from krona_hub.pipelines.randomness import generator
from tests.calibration.sessions import LORA, request_with, session_with

FLOAT32 = 2e-4  # the oracle adds in another order, in float32, over some thousand positions


def whole_moments(session, calls, layer):
    """C (in·k…)² and G (out)² of one layer, from whole inputs and gradients: the slow oracle."""
    module = slots_of(parts_of(session.how.pipe, session.adapter.components))[layer].module
    kernel = tuple(session.adapter[layer].weight_shape[2:])
    seen = []

    def hook(_module, args, out):
        out = out if out.requires_grad else out.detach().requires_grad_().clone()
        seen.append((args[0].detach(), out))
        return out

    handle = module.register_forward_hook(hook)
    try:
        with torch.enable_grad():
            outputs = outputs_of(session.how, calls)
            source = generator(0, "calibrate projection", 0)
            g = 0
            for _ in range(PROJECTIONS):
                projected = sum((y * torch.randn(y.shape, generator=source)).sum() for y in outputs)
                gradients = torch.autograd.grad(projected, [y for _, y in seen], retain_graph=True, allow_unused=True)
                ((x, gradient),) = [(x, g) for (x, _), g in zip(seen, gradients, strict=True) if g is not None]
                rows = gradient.movedim(1, -1) if kernel else gradient
                rows = rows.reshape(-1, rows.shape[-1]).double()
                g = g + rows.mT @ rows / (PROJECTIONS * len(calls))
    finally:
        handle.remove()
    if kernel:
        conv = getattr(module, "base", module)
        columns = functional.unfold(x, kernel, conv.dilation, conv.padding, conv.stride)
        rows = columns.mT.reshape(-1, columns.shape[1])
    else:
        rows = x.reshape(-1, x.shape[-1])
    rows = rows.double()
    return rows.mT @ rows / len(rows), g


def assert_equal_moments(session, layers):
    calls = session.calls("a photo of a zorbi on a blue table", 0, "test")
    for parameter in (p for m in parts_of(session.how.pipe).values() for p in m.parameters()):
        parameter.requires_grad_(False)
    gatherer = MomentGatherer(session.how, session.adapter, 0)
    gatherer.add(calls, 0)
    found = gatherer.moments()
    for layer in layers:
        c, g = whole_moments(session, calls, layer)
        delta = session.adapter[layer]
        up, down = (m.double() for m in middle_of(delta.sums, delta.matrix_shape))
        for mine, oracle in ((found[layer].inputs, down @ c @ down.mT), (found[layer].outputs, up.mT @ g @ up)):
            assert torch.linalg.norm(mine - oracle) <= FLOAT32 * torch.linalg.norm(oracle), layer


def test_moments_of_a_lora_are_those_of_the_whole_matrices(session):
    names = list(session.adapter.layers)
    text = next(name for name in names if name.startswith("text_encoder"))
    assert_equal_moments(session, [text, *(name for name in names if name.endswith(("attn1.to_q", "attn2.to_v")))][:4])


def test_moments_of_convolutions_are_those_of_the_whole_matrices(lokr_session):
    shapes = {name: delta.weight_shape for name, delta in lokr_session.adapter.layers.items()}
    kernels = [name for name, shape in shapes.items() if len(shape) == 4 and shape[2] == 3]
    strided = [name for name in kernels if "downsamplers" in name]
    assert strided, "one with a stride"
    assert_equal_moments(lokr_session, [kernels[0], strided[0], *(n for n, s in shapes.items() if s[2:] == (1, 1))][:3])


def test_a_gathering_leaves_the_pipeline_as_it_was(session):
    calls = session.calls("a photo of a zorbi", 0, "test")
    with torch.no_grad():
        before = torch.cat(outputs_of(session.how, calls))
    MomentGatherer(session.how, session.adapter, 0).add(calls, 0)
    with torch.no_grad():
        after = torch.cat(outputs_of(session.how, calls))
    assert torch.equal(before, after)
    assert not any(len(m._forward_hooks) for model in parts_of(session.how.pipe).values() for m in model.modules())


def test_equal_seeds_give_equal_moments_and_other_seeds_others():
    a, b, other = (gathered(session_with(seed=seed)) for seed in (0, 0, 1))
    for name in a.layers:
        assert torch.equal(a.layers[name].inputs, b.layers[name].inputs)
        assert torch.equal(a.layers[name].outputs, b.layers[name].outputs)
    assert any(not torch.equal(a.layers[name].inputs, other.layers[name].inputs) for name in a.layers)
    assert a.adapter == delta_digest(session_with().adapter) and a.record["samples"] == 24


def test_an_interrupted_calibration_continues_to_the_same_moments(tmp_path, monkeypatch):
    partial = tmp_path / "m.safetensors.partial"
    whole = gathered(session_with(samples=72))
    assert not partial.exists()
    seen = []

    class StopAfterTwo:
        requested = property(lambda self: len(seen) == 2)

    class Stopping:
        def __enter__(self):
            return StopAfterTwo()

        def __exit__(self, *_):
            return False

    with monkeypatch.context() as patch:
        patch.setattr("krona_hub.calibration.execute.stoppable", Stopping)
        with pytest.raises(StoppedError, match="Stopped after 24 of 72"):
            gathered(session_with(samples=72), partial, lambda done, _total: seen.append(done))
    assert partial.exists()
    again = gathered(session_with(samples=72), partial, lambda done, _total: seen.append(done))
    assert seen == [12, 24, 36, 48, 60, 72] and not partial.exists()
    for name in whole.layers:
        assert torch.equal(whole.layers[name].outputs, again.layers[name].outputs)


def test_the_state_of_another_calibration_is_not_used(session, tmp_path):
    partial = tmp_path / "m.safetensors.partial"
    other = session.adapter.with_layers(
        {n: replace(d, sums=tuple(s.scaled(0.5) for s in d.sums)) for n, d in session.adapter.layers.items()}
    )
    for changed in (
        replace(session, adapter=other),
        replace(session, request=replace(session.request, seed=1)),
        replace(session, request=replace(session.request, samples=36)),
        replace(session, trajectory=replace(session.trajectory, points=5)),
    ):
        write_partial(partial, {}, record_of(changed), 1)
        assert read_partial(partial, record_of(changed)) and not read_partial(partial, record_of(session))
    partial.write_bytes(b"\x08\x00\x00\x00\x00\x00\x00\x00{}      ")
    assert gathered(session_with(), partial).record["samples"] == 24


def test_dora_is_refused(tmp_path):
    adapter = read(LORA, base="tiny-scenes")
    name, delta = next(iter(adapter.layers.items()))
    dora = replace(delta, magnitude=torch.ones(delta.weight_shape[0]))
    with pytest.raises(UnsupportedError, match="1 DoRA layer"):
        open_session(request_with(), adapter.with_layers({**adapter.layers, name: dora}))


def test_moments_of_an_sdxl_lora_are_small():
    """At most 100 MB beside the model for 560 layers of rank 16, counted without weights."""
    base = load_base("sdxl")
    ends = ("to_q", "to_k", "to_v", "to_out.0")
    attention = [name for name in base.components["unet"] if ".attn" in name and name.endswith(ends)]
    assert len(attention) == 560
    assert len(attention) * 2 * 16 * 16 * 8 <= 3e6 < 100e6
