"""Noise, targets and weights against the schedulers of diffusers, and the families of pipelines."""

import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler, FluxPipeline

from krona_hub.errors import UnsupportedError
from krona_hub.training.configuration import checked
from krona_hub.training.model.model_families import FAMILIES, family_of, packed
from krona_hub.training.model.noise_processes import Flow, diffusion_of, flow_of, loss_weights, sample_times


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("schedule", ["scaled_linear", "squaredcos_cap_v2"])
def test_noise_and_targets_of_diffusion_are_those_of_the_scheduler(prediction, schedule):
    scheduler = DDPMScheduler(prediction_type=prediction, beta_schedule=schedule, num_train_timesteps=500)
    latents, noise, u = torch.randn(5, 4, 3, 3), torch.randn(5, 4, 3, 3), torch.tensor([0, 0.1, 0.5, 0.7, 0.9999])
    got = diffusion_of(scheduler).noised(latents, noise, u)
    assert got.timesteps.tolist() == [0, 50, 250, 350, 499]
    assert torch.allclose(got.noisy, scheduler.add_noise(latents, noise, got.timesteps), atol=1e-6)
    velocity = scheduler.get_velocity(latents, noise, got.timesteps)
    assert torch.allclose(got.target, velocity if prediction == "v_prediction" else noise, atol=1e-6)


def test_an_unknown_prediction_is_refused():
    scheduler = DDPMScheduler()
    scheduler.register_to_config(prediction_type="something")
    with pytest.raises(UnsupportedError):
        diffusion_of(scheduler)


def test_the_levels_of_flow_matching_are_the_schedulers():
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    flow = flow_of(scheduler)
    for index in (0, 300, 999):
        u = torch.tensor([1 - index / 1000])
        got = flow.noised(torch.zeros(1, 1, 1, 1), torch.ones(1, 1, 1, 1), u)
        assert float(got.noisy) == pytest.approx(float(scheduler.sigmas[index]), abs=1e-4)
        assert float(got.timesteps) == pytest.approx(float(scheduler.timesteps[index]), abs=0.1)
        assert float(got.target) == 1.0


def test_a_size_dependent_shift_is_left_to_drawing():
    assert flow_of(FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)).shift == 1.0


def test_min_snr_is_that_of_the_paper():
    snr = torch.tensor([0.01, 5.0, 50.0])
    assert torch.allclose(loss_weights(snr, "epsilon", 5.0), torch.tensor([1.0, 1.0, 0.1]))
    assert torch.allclose(loss_weights(snr, "v_prediction", 5.0), torch.tensor([0.01 / 1.01, 5 / 6, 5 / 51]))
    assert loss_weights(None, "flow", 5.0) == loss_weights(snr, "epsilon", 0.0) == 1.0


def test_times_are_drawn_evenly_or_around_the_middle():
    many = tuple(range(2000))
    even = sample_times(checked({"timesteps": "uniform"}), Flow(), 0, many)
    middle = sample_times(checked({}), Flow(), 0, many)
    assert abs(float(even.std()) - 12**-0.5) < 0.02 and abs(float(even.mean()) - 0.5) < 0.03
    assert abs(float(torch.logit(middle).std()) - 1) < 0.06 and float(even.min()) >= 0 and float(middle.max()) < 1
    assert torch.equal(sample_times(checked({}), Flow(), 0, (5,)), middle[5:6])


def test_packing_for_flux_is_that_of_diffusers():
    latents = torch.randn(2, 4, 6, 8)
    assert torch.equal(packed(latents), FluxPipeline._pack_latents(latents, 2, 4, 6, 8))


@pytest.mark.parametrize("family", FAMILIES, ids=lambda f: f.name)
def test_every_family_knows_the_pipeline_that_it_is_for(family):
    assert family_of(type(family.pipelines[0], (), {})()) is family


def test_other_pipelines_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="WanPipeline"):
        family_of(type("WanPipeline", (), {})())
