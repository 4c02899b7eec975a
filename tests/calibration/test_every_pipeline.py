"""Recorded calls of every family of pipelines: repeated, they give the outputs that the pipeline itself saw."""

import pytest
import torch

from krona_hub import Adapter, LayerDelta
from krona_hub.calibration.denoiser_calls import RepeatedCall, Trajectory, denoiser_of, outputs_of, record_calls
from krona_hub.calibration.gather_moments import MomentGatherer
from krona_hub.images.request import Settings
from krona_hub.kron.terms import as_lora
from krona_hub.layers import attach, set_scales
from tests import tiny
from tests.images import whole

PIPELINES = ("sd15", "sdxl", "sd3", "flux")
ROUNDING = 1e-5


def lora_for(pipe, *endings):
    shapes = tiny.layers(pipe, *endings)
    generator = torch.Generator().manual_seed(0)
    factors = {
        n: (torch.randn(s[0], 2, generator=generator), torch.randn(2, s[1], generator=generator))
        for n, s in shapes.items()
    }
    return Adapter({n: LayerDelta((as_lora(up, 0.3 * down),), shapes[n]) for n, (up, down) in factors.items()})


@pytest.fixture(scope="module", params=PIPELINES)
def recorded(request):
    """A pipeline with a LoRA in the denoiser and the text encoders, its calls, and the outputs that it saw."""
    pipe = getattr(whole, request.param)()
    pipe.set_progress_bar_config(disable=True)
    pipe.tokenizer_max_length = 16  # as the tiny text encoders; the pipeline was made without a tokenizer
    adapter = lora_for(pipe, "to_q", "to_v", "q_proj", ".q")
    attach(pipe, adapter, "source")
    seen = []
    model = denoiser_of(pipe)
    handle = model.register_forward_hook(
        lambda _module, _args, out: seen.append(out[0] if isinstance(out, tuple) else out.sample)
    )
    how = Trajectory(Settings(steps=4, guidance=3.0, size=(16, 16)), seed=0, points=3, renoised=2)
    calls = record_calls(pipe, "a small toy", 0, "test", how, empty=False)
    handle.remove()
    return pipe, adapter, calls, seen


def repeated(pipe, **options):
    return RepeatedCall(pipe, torch.device("cpu"), torch.float32, **options)


@pytest.mark.parametrize("text", [False, True], ids=["stored conditions", "encoded again"])
def test_a_repeated_call_gives_the_output_of_the_pipeline(recorded, text):
    pipe, _adapter, calls, seen = recorded
    assert len(calls) == 5 and len(seen) == 4
    with torch.no_grad():
        outputs = outputs_of(repeated(pipe, text=text), calls[:3])
    for call, out in zip(calls, outputs, strict=False):
        own = seen[call.step][-1:]
        assert torch.allclose(out, own, atol=ROUNDING * float(own.abs().max())), call.step


def test_noised_results_differ_from_the_trajectory_and_from_each_other(recorded):
    _pipe, _adapter, calls, _seen = recorded
    latents = [call.arguments[call.latents] for call in calls]
    assert len({tuple(x.flatten().tolist()) for x in latents}) == len(latents)
    assert all(bool(x.isfinite().all()) for x in latents)


def test_conditions_follow_the_text_encoders(recorded):
    """With the adapter at strength 0, stored conditions stay and encoded ones change."""
    pipe, _adapter, calls, _seen = recorded
    with torch.no_grad():
        set_scales(pipe, {"source": 0.0})
        stored = torch.cat([y.flatten() for y in outputs_of(repeated(pipe), calls)])
        encoded = torch.cat([y.flatten() for y in outputs_of(repeated(pipe, text=True), calls)])
        set_scales(pipe, {"source": 1.0})
    assert not torch.allclose(stored, encoded)


def test_every_layer_has_moments(recorded):
    pipe, adapter, calls, _seen = recorded
    gatherer = MomentGatherer(repeated(pipe, text=True), adapter, 0)
    gatherer.add(calls, 0)
    moments = gatherer.moments()
    felt = {name for name, layer in moments.items() if float(layer.outputs.trace()) > 0}
    for name, layer in moments.items():
        assert layer.inputs.shape == layer.outputs.shape == (2, 2)
        assert float(layer.inputs.trace()) > 0 or name not in felt, name
    unfelt = {name for name in moments if name not in felt and not name.startswith("text_encoder")}
    assert unfelt <= {"transformer.transformer_blocks.1.attn.add_q_proj"}, "what SD3 discards after its last block"
    assert {name.partition(".")[0] for name in felt} == set(adapter.components)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_calls_with_the_empty_prompt_are_those_of_guidance(name):
    pipe = getattr(whole, name)()
    pipe.set_progress_bar_config(disable=True)
    how = Trajectory(Settings(steps=2, guidance=3.0, size=(16, 16)), seed=0, points=1, renoised=0)
    with_prompt, empty = (record_calls(pipe, "a small toy", 0, "test", how, empty=e)[0] for e in (False, True))
    assert torch.equal(with_prompt.arguments[with_prompt.latents], empty.arguments[empty.latents])
    assert not torch.equal(with_prompt.arguments["encoder_hidden_states"], empty.arguments["encoder_hidden_states"])
