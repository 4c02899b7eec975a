"""The settings under which a trainer continues from a file that was written for it.

Trainers build their own modules from settings and then demand exactly the tensors of the file, so the settings follow
from the modules. Sources: the tables of `formats/compatibility/applications/`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from krona_hub.formats.compatibility.applications import Application
from krona_hub.formats.compatibility.form_rules import lycoris_settings
from krona_hub.formats.compatibility.format_limits import common_peft_factor
from krona_hub.formats.forms.delta_form import LayerFactorization, channel_split
from krona_hub.formats.forms.normal_forms import form_of
from krona_hub.formats.writing.packing import FileModule, full_alpha

Forms = Sequence[LayerFactorization]
EXACT_LAYERS = "the layer filter must select exactly the layers of the file, and text encoders that it lacks are off"


def settings_of(application: Application | None, modules: Sequence[FileModule]) -> tuple[str, ...]:
    """The settings to enter, as one note; () for an application that is not a trainer or needs none."""
    describe = SETTINGS.get(application.name) if application is not None else None
    forms = [form_of(module.delta) for module in modules]
    if application is None or describe is None or not forms:
        return ()
    return (f"{application.title} settings: {describe(modules, forms)}",)


def _ranks(forms: Forms) -> list[int]:
    """The ranks of the LoRAs, or of the factored matrices of the LoKrs."""
    found = [form.lora_rank for form in forms if form.lora_rank is not None]
    lokrs = [s for form in forms if form.lora_rank is None for s in form.sums]
    return found + [r for s in lokrs for r in (s.left_rank, s.right_rank) if r is not None]


def _onetrainer(modules: Sequence[FileModule], forms: Forms) -> str:
    axis = next((form.dora for form in forms if form.dora), None)
    if all(form.lora_rank is not None for form in forms):
        words = [f"peft_type LORA, lora_rank {max(_ranks(forms), default=1)}"]
        words += [f"lora_decompose on, lora_decompose_output_axis {_switch(axis == 'out')}"] if axis else []
    else:
        ranks = _ranks(forms)
        words = [f"peft_type LOKR, lokr_dim {ranks[0] if ranks else full_alpha(modules):g}"]
        words += [f"lokr_decompose_factor {next(iter(lycoris_settings(forms)), -1)}"]
        words += ["lokr_full_matrix on"] if not ranks else []
        words += ["lokr_decompose_both on"] if any(s.left_rank for form in forms for s in form.sums) else []
        words += [f"lokr_weight_decompose on, lokr_dora_on_output {_switch(axis == 'out')}"] if axis else []
    return f"{', '.join(words)}; {EXACT_LAYERS}"


def _switch(on: bool) -> str:
    return "on" if on else "off"


def _ai_toolkit(modules: Sequence[FileModule], forms: Forms) -> str:
    ranks = _ranks(forms)
    if all(form.lora_rank is not None for form in forms):
        return f"network type lora, linear {max(ranks, default=1)}"
    factor = common_peft_factor([channel_split(form) for form in forms if form.lora_rank is None])
    full = "lokr_full_rank true" if not ranks else f"lokr_full_rank false, linear {ranks[0]}"
    return f"network type lokr, lokr_factor {factor}, {full}"


def _musubi(modules: Sequence[FileModule], forms: Forms) -> str:
    ranks = sorted(set(_ranks(forms)))
    if len(ranks) > 1:
        return f"for inference and merging only: to resume, all layers need one rank, and the file has {len(ranks)}"
    dim = ranks[0] if ranks else 1
    if all(form.lora_rank is not None for form in forms):
        return f"to resume, --network_dim {dim} --network_alpha {dim}"
    factor = next(iter(lycoris_settings(forms)), None)
    if factor is None:
        return "for inference and merging only: to resume, one factor has to give the shapes of all layers"
    return f"to resume, --network_module networks.lokr --network_dim {dim} --network_args factor={factor}"


SETTINGS: Mapping[str, Callable[[Sequence[FileModule], Forms], str]] = {
    "onetrainer": _onetrainer,
    "ai-toolkit": _ai_toolkit,
    "musubi": _musubi,
}
