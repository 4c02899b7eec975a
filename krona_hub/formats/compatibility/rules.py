"""The rules of applications by name: which deltas they apply wrongly or not at all. Torch-free.

The tables of `applications/` refer to them. A rule looks at one factorization (so that the writer knows it before it
writes), at one stored module, or at all modules of a file.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from krona_hub.bases.base import Base
from krona_hub.formats.compatibility.file_rules import (
    invokeai_probe,
    one_dora,
    one_kind,
    one_lokr_dim,
    one_peft_factor,
    one_rank,
    one_spelling,
    some_denoiser,
    whole_fused,
    whole_qkv,
    whole_text_encoders,
)
from krona_hub.formats.compatibility.form_rules import (
    no_conv,
    no_conv3d,
    no_dora_of_one_row,
    no_kernel,
    no_lokr_dora,
    no_output_dora,
    only_lycoris_splits,
    only_peft_splits,
    only_sorted_splits,
)
from krona_hub.formats.compatibility.module_rules import (
    StoredModule,
    bare_magnitude,
    deep_w2,
    even_products,
    factored_w1,
    flat_w2,
    foreign_magnitude,
    kohya_dora,
    locon_tucker,
    lokr_tucker,
    lokr_without_alpha,
    missing_alpha,
    other_names,
    other_scale,
    runtime_lokr,
    scale_outside,
    tucker,
    two_dtypes,
    unequal_dtypes,
    uneven_w1_rank,
    unit_rank,
    whole_kernel,
)
from krona_hub.formats.forms.limits import Limit, no_dora, no_input_dora

ModuleRule = Callable[[StoredModule], str | None]
FileRule = Callable[[Sequence[StoredModule], Base], str | None]


class ApplicationRule(NamedTuple):
    """A rule by what it looks at; the other two are None."""

    form: Limit | None = None
    module: ModuleRule | None = None
    file: FileRule | None = None


RULES: Mapping[str, ApplicationRule] = {
    "no-dora": ApplicationRule(no_dora),
    "no-output-dora": ApplicationRule(no_output_dora),
    "no-dora-of-one-row": ApplicationRule(no_dora_of_one_row),
    "no-input-dora": ApplicationRule(no_input_dora),
    "no-lokr-dora": ApplicationRule(no_lokr_dora),
    "linear": ApplicationRule(no_conv),
    "small-kernel": ApplicationRule(no_kernel),
    "no-conv3d": ApplicationRule(no_conv3d),
    "lycoris-splits": ApplicationRule(only_lycoris_splits),
    "sorted-splits": ApplicationRule(only_sorted_splits),
    "peft-splits": ApplicationRule(only_peft_splits),
    "no-lokr-tucker": ApplicationRule(module=lokr_tucker),
    "no-tucker": ApplicationRule(module=tucker),
    "flat-conv3d": ApplicationRule(module=deep_w2),
    "dense-w1": ApplicationRule(module=factored_w1),
    "one-dtype": ApplicationRule(module=two_dtypes),
    "equal-dtypes": ApplicationRule(module=unequal_dtypes),
    "metadata-alpha": ApplicationRule(module=scale_outside),
    "no-magnitude": ApplicationRule(module=bare_magnitude),
    "lost-dora": ApplicationRule(module=kohya_dora),
    "runtime-lokr": ApplicationRule(module=runtime_lokr),
    "unit-rank": ApplicationRule(module=unit_rank),
    "w1-rank": ApplicationRule(module=uneven_w1_rank),
    "own-magnitude": ApplicationRule(module=foreign_magnitude),
    "no-mid": ApplicationRule(module=locon_tucker),
    "lokr-alpha": ApplicationRule(module=lokr_without_alpha),
    "deep-conv": ApplicationRule(module=flat_w2),
    "stored-alpha-needed": ApplicationRule(module=missing_alpha),
    "unit-scale": ApplicationRule(module=other_scale),
    "lycoris-names": ApplicationRule(module=other_names),
    "even-products": ApplicationRule(module=even_products),
    "whole-kernel": ApplicationRule(module=whole_kernel),
    "one-peft-factor": ApplicationRule(file=one_peft_factor),
    "whole-fused": ApplicationRule(file=whole_fused),
    "whole-qkv": ApplicationRule(file=whole_qkv),
    "one-spelling": ApplicationRule(file=one_spelling),
    "denoiser": ApplicationRule(file=some_denoiser),
    "invokeai-probe": ApplicationRule(file=invokeai_probe),
    "one-kind": ApplicationRule(file=one_kind),
    "one-rank": ApplicationRule(file=one_rank),
    "one-lokr-dim": ApplicationRule(file=one_lokr_dim),
    "one-dora": ApplicationRule(file=one_dora),
    "whole-text": ApplicationRule(file=whole_text_encoders),
}
