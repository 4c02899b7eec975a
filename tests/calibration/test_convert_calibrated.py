"""Conversion by the effect: laws that need no long run, and the measured gain over a plain cut."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from krona_hub import convert, read
from krona_hub.calibration.api import calibrate, convert_calibrated
from krona_hub.calibration.execute import gathered, held_out
from krona_hub.calibration.measure_effect import measured
from krona_hub.calibration.moments_file import read_moments, write_moments
from krona_hub.cli.main import main
from krona_hub.conversion.convert_layers import apply_method
from krona_hub.conversion.methods import Budget, MaxError, Rank
from krona_hub.conversion.target import ConversionTarget
from krona_hub.conversion.weighted_layers import cut_by_moments
from krona_hub.errors import (
    BaseMismatchError,
    ConflictError,
    DataError,
    IntegrityError,
    KronaError,
    LossyError,
    UnknownBaseError,
    UnsupportedError,
    UsageError,
)
from krona_hub.formats.forms.normal_forms import is_lora
from tests.calibration.sessions import LOKR, LORA, session_with

LORA_SIZE = 118_784
TARGET = ConversionTarget("kohya-lora")
PROMPTS = [f"a photo of a zorbi on a {table} table" for table in ("white", "grey", "blue", "green", "wooden")]
OTHERS = [f"a photo of a {color} cube on a white table" for color in ("red", "green", "blue", "pink", "cyan")]
SHORT = {"prompts": PROMPTS, "other_prompts": OTHERS, "samples": 24, "steps": 6, "device": "cpu"}


@pytest.fixture(scope="module")
def moments(session):
    return gathered(session)


@pytest.fixture(scope="module")
def moments_file(moments, tmp_path_factory):
    path = tmp_path_factory.mktemp("moments") / "m.safetensors"
    write_moments(moments, path)
    return path


# --- the cut of a whole adapter --------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.9, 0.5, 0.25, 0.125, 0.0625, 0.01])
def test_a_budget_is_kept_and_more_of_it_keeps_more(session, moments, share):
    adapter = session.adapter
    kept = cut_by_moments(adapter.layers, Budget(share=share), TARGET, moments)
    size = sum(o.delta.parameters for o in kept.layers.values() if not o.is_left_out)
    assert size - sum(not o.is_left_out for o in kept.layers.values()) <= share * LORA_SIZE  # A = [[1]] is not stored
    more = cut_by_moments(adapter.layers, Budget(share=min(1.0, 1.2 * share)), TARGET, moments)
    assert 0 <= kept.predicted <= more.predicted <= 1


def test_the_whole_budget_returns_the_lora_itself(session, moments):
    kept = cut_by_moments(session.adapter.layers, Budget(share=1.0), TARGET, moments)
    assert kept.predicted == 1
    for name, outcome in kept.layers.items():
        assert outcome.delta.sums == session.adapter[name].sums


def test_the_prediction_is_the_share_of_the_loss(session, moments):
    """Σ tr(M_u · E M_d Eᵀ) over the layers, with the error E in the middle, against the loss without any layer."""
    adapter = session.adapter
    kept = cut_by_moments(adapter.layers, Budget(share=0.1), TARGET, moments)
    lost = whole = 0.0
    for name, outcome in kept.layers.items():
        own, delta = moments.layers[name], adapter[name].sums[0]
        up, down = delta.right.up[0].double(), delta.right.down[0].double()
        inside = torch.eye(len(down), dtype=torch.float64)
        if outcome.is_left_out:
            found = torch.zeros_like(inside)
        else:
            found = torch.linalg.pinv(up) @ outcome.delta.dense().double().flatten(1) @ torch.linalg.pinv(down)
        error = inside - found
        lost += float(torch.trace(own.outputs @ error @ own.inputs @ error.mT))
        whole += float(torch.trace(own.outputs @ own.inputs))
    assert kept.predicted == pytest.approx(1 - lost / whole, abs=1e-4)


@pytest.mark.parametrize("error", [0.05, 0.2, 0.5])
def test_a_limit_of_the_error_is_met_with_few_parameters(session, moments, error):
    adapter = session.adapter
    kept = cut_by_moments(adapter.layers, MaxError(error), TARGET, moments)
    assert (1 - kept.predicted) ** 0.5 <= error + 1e-9
    size = sum(o.delta.parameters for o in kept.layers.values() if not o.is_left_out)
    less = cut_by_moments(adapter.layers, Budget(parameters=int(0.95 * size)), TARGET, moments)
    assert (1 - less.predicted) ** 0.5 > error, "5 % fewer parameters do not suffice"


def test_a_rank_cuts_every_layer_alike(session, moments):
    kept = cut_by_moments(session.adapter.layers, Rank(2), TARGET, moments)
    assert {o.delta.sums[0].right.rank for o in kept.layers.values()} == {2}
    assert all(torch.equal(a.delta.sums[0].right.up, 2 * b.delta.sums[0].right.up) for a, b in zip(
        cut_by_moments(session.adapter.layers, Rank(2), TARGET, moments, gain=2.0).layers.values(),
        kept.layers.values(), strict=True,
    ))  # fmt: skip


def test_a_lokr_becomes_a_lora_or_stays(lokr_session):
    moments = gathered(lokr_session)
    adapter = lokr_session.adapter
    as_lora = cut_by_moments(adapter.layers, Rank(4), TARGET, moments)
    assert all(is_lora(o.delta) for o in as_lora.layers.values())
    whole = cut_by_moments(adapter.layers, Budget(share=1.0), ConversionTarget("krona"), moments)
    assert whole.predicted == 1 and all(o.delta.sums == adapter[n].sums for n, o in whole.layers.items())


def test_a_budget_below_one_rank_is_refused(session, moments):
    with pytest.raises(UsageError, match="too small") as refusal:
        cut_by_moments(session.adapter.layers, Budget(parameters=100), TARGET, moments)
    assert "160" in refusal.value.fix


# --- whole conversions -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_conversion_reports_the_effect_and_its_file_holds_the_result(tmp_path):
    out, again = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    done = convert_calibrated(LORA, out, base="tiny-scenes", budget="1/4", **SHORT)
    report = done.conversion
    assert report.written and report.parameters_after <= LORA_SIZE / 4 and report.layers_left_out
    assert 0.5 < report.effect.kept <= 1 and report.effect.kept_range[0] <= report.effect.kept
    assert report.effect.prompts == (PROMPTS[3],) and report.effect.other_prompts == (OTHERS[3],)
    assert 0.9 <= report.gain <= 1.5 and done.calibration.samples == 24
    assert any(note.startswith("24 samples are few") for note in report.notes)
    assert [text.split(",")[0] for text in report.alternatives] == ["a plain cut of the LoRA", "a Kronecker sum"]
    assert len(read(out, base="tiny-scenes").layers) == len(report.layers) - report.layers_left_out
    same = convert_calibrated(LORA, again, base="tiny-scenes", budget="1/4", compare=False, **SHORT).conversion
    assert out.read_bytes() == again.read_bytes() and same.effect.kept == report.effect.kept and not same.alternatives


def test_with_moments_alone_the_effect_is_predicted_not_measured(moments_file, tmp_path):
    report = convert_calibrated(
        LORA, tmp_path / "a.safetensors", moments=moments_file, budget="1/8", base="tiny-scenes"
    ).conversion
    assert report.effect is None and 0.5 < report.predicted_effect < 1
    assert report.verdict.startswith(f"Predicted to keep {100 * report.predicted_effect:.1f} % of the effect")
    same = convert(LORA, moments=read_moments(moments_file), budget="1/8", base="tiny-scenes", dry_run=True)
    assert same.predicted_effect == report.predicted_effect


@pytest.mark.slow
def test_moments_are_written_and_used_again(tmp_path):
    path = tmp_path / "m.safetensors"
    first = convert_calibrated(LORA, base="tiny-scenes", moments=path, budget="1/4", dry_run=True, **SHORT)
    assert path.exists() and first.calibration is not None
    again = convert_calibrated(LORA, base="tiny-scenes", moments=path, budget="1/4", dry_run=True, **SHORT)
    assert again.calibration is None and again.conversion.effect.kept == first.conversion.effect.kept
    with pytest.raises(ConflictError):
        calibrate(LORA, "tiny-scenes", path, **SHORT)


@pytest.mark.parametrize("target", [{"to": "lora"}, {"tool": "comfyui"}, {"to": "lokr"}, {"to": "peft-lora"}])
def test_every_kind_of_target_holds_the_cut(moments, tmp_path, target):
    out = tmp_path / "out"
    report = convert(LORA, out, base="tiny-scenes", moments=moments, budget="1/8", **target)
    assert report.written and report.checked.endswith(("no difference", "e-07", "e-08"))
    if target != {"to": "peft-lora"}:  # PEFT names no component: two folders
        assert len(read(out, base="tiny-scenes").layers) == len(report.layers) - report.layers_left_out


@pytest.mark.slow
def test_without_held_out_prompts_nothing_is_measured():
    few = {**SHORT, "prompts": PROMPTS[:2]}
    report = convert_calibrated(LORA, base="tiny-scenes", budget="1/2", dry_run=True, **few).conversion
    assert report.effect is None and any("predicted, not measured" in note for note in report.notes)


def test_less_than_half_of_the_effect_is_refused(moments, tmp_path):
    out = tmp_path / "a.safetensors"
    with pytest.raises(LossyError, match=r"would keep .* of the effect \(predicted by the moments\)") as refusal:
        convert(LORA, out, base="tiny-scenes", moments=moments, budget="0.2%")
    assert refusal.value.exit_code == 3 and refusal.value.report.predicted_effect < 0.5 and not out.exists()
    assert convert(LORA, out, base="tiny-scenes", moments=moments, budget="0.2%", allow_loss=True).written


# --- bad input -------------------------------------------------------------------------------------------------------


def test_prompts_with_the_subject_alone_raise_a_warning():
    report = calibrate(LORA, "tiny-scenes", **{**SHORT, "other_prompts": "none"})
    assert any(warning.startswith("only prompts with the subject") for warning in report.warnings)
    assert not any("only prompts" in warning for warning in calibrate(LORA, "tiny-scenes", **SHORT).warnings)


def test_moments_of_another_adapter_or_base_are_refused(moments, moments_file, tmp_path):
    with pytest.raises(IntegrityError, match="another adapter"):
        convert(LOKR, base="tiny-scenes", moments=moments, budget="1/8", to="lora", dry_run=True)
    other = tmp_path / "other.safetensors"
    changed = read_moments(moments_file)
    write_moments(type(changed)(changed.layers, changed.adapter, {**changed.record, "base": "0"}), other)
    with pytest.raises(IntegrityError, match="another base model"):
        convert_calibrated(LORA, base="tiny-scenes", moments=other, budget="1/8", **SHORT)


UNUSABLE = {
    "no method": ({}, UsageError, "--budget, --rank and --max-error"),
    "a shape": ({"shape": "8x8"}, UsageError, "--budget, --rank and --max-error"),
    "no base": ({"budget": "1/4", "base": None}, UsageError, "base model with weights"),
    "a base without weights": ({"budget": "1/4", "base": "sd15"}, UnknownBaseError, "weights"),
    "few samples": ({"budget": "1/4", "samples": 3}, UsageError, "samples 3"),
    "too long a prompt": ({"budget": "1/4", "prompts": ["a zorbi " * 90]}, DataError, "too long"),
    "no prompts": ({"budget": "1/4", "prompts": []}, DataError, "contains no prompt"),
}


@pytest.mark.parametrize("name", UNUSABLE)
def test_unusable_arguments_are_coded_errors(name, tmp_path):
    options, error, words = UNUSABLE[name]
    out = tmp_path / "a.safetensors"
    with pytest.raises(error, match=words) as refusal:
        convert_calibrated(LORA, out, **{"base": "tiny-scenes", **SHORT, **options})
    assert refusal.value.fix and not list(tmp_path.iterdir())


def test_options_of_a_calibration_have_no_silent_effect(capsys):
    for extra in (["--samples", "30"], ["--held-out", "x.txt"], ["--no-gain"], ["--guidance", "2"]):
        assert main(["convert", str(LORA), "--base", "tiny-scenes", "--budget", "1/8", *extra]) == 2
        assert f"{extra[0]} requires --calibrate" in capsys.readouterr().err
    assert main(["convert", str(LORA), "--base", "tiny-scenes", "--calibrate", "default"]) == 2
    assert main(["calibrate", str(LORA), "--base", "tiny-scenes"]) == 2
    assert main(["calibrate", str(LORA), "--base", "tiny-scenes", "-o", "m.st", "--offload", "sequential"]) == 2


def test_an_adapter_of_another_base_is_refused():
    sd15 = LORA.parent / "demo_lora.safetensors"
    with pytest.raises((BaseMismatchError, UnsupportedError, KronaError)) as refusal:
        calibrate(sd15, "tiny-scenes", **SHORT)
    assert refusal.value.exit_code == 5


@pytest.mark.slow
def test_ctrl_c_leaves_a_state_that_the_same_command_continues(tmp_path):
    out = tmp_path / "m.safetensors"
    command = [sys.executable, "-m", "krona_hub.cli", "calibrate", str(LORA), "--base", "tiny-scenes", "-o", str(out),
               "--samples", "288", "--device", "cpu"]  # fmt: skip
    run = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    time.sleep(15)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=120)
    assert run.returncode == 130 and "Run the same command again" in errors, errors
    assert not out.exists() and [path.name for path in tmp_path.iterdir()] == ["m.safetensors.partial"]
    assert subprocess.run(command, check=False, timeout=300, capture_output=True).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


# --- what it is worth ------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_moments_keep_more_of_the_effect_than_a_plain_cut_and_sham_moments_do_not():
    """At 1/16 of the size, .10 more than the plain cut, with a third of the default samples (docs/smaller.md)."""
    session = session_with(samples=384, steps=20)
    adapter, moments = session.adapter, gathered(session)
    known = held_out(session).subject

    def effect(outcomes):
        kept = {name: o.delta for name, o in outcomes.items() if not o.is_left_out}
        return measured(session.how, known, adapter.with_layers(kept)).effect

    method = Budget(share=1 / 16)
    cut = cut_by_moments(adapter.layers, method, TARGET, moments)
    names = list(moments.layers)
    turned = dict(zip(names, names[7:] + names[:7], strict=True))
    sham = type(moments)({name: moments.layers[turned[name]] for name in names}, moments.adapter)
    right, wrong = effect(cut.layers), effect(cut_by_moments(adapter.layers, method, TARGET, sham).layers)
    plain = effect(apply_method(adapter.layers, method, TARGET))
    assert right >= plain + 0.10, (right, plain)
    assert wrong < right - 0.10, (wrong, right)
    assert abs(cut.predicted - right) < 0.15
