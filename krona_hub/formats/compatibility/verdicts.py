"""Whether an application loads a file, layer by layer: the answer of `inspect`, and what a written file must pass.

Torch-free. An answer looks at the format, the base model, the name of every module and what the application computes of
its tensors. No base model, or no fact about it: not known.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from krona_hub.bases.base import Base
from krona_hub.errors import counted, one_of
from krona_hub.formats.compatibility.applications import APPLICATIONS, NOT_KNOWN, Application, FamilySupport, Kind
from krona_hub.formats.compatibility.base_support import support_of
from krona_hub.formats.compatibility.described_file import DescribedFile
from krona_hub.formats.compatibility.file_checks import FILE_CHECKS
from krona_hub.formats.compatibility.naming import Names
from krona_hub.formats.compatibility.rules import RULES
from krona_hub.formats.forms.delta_form import LayerFactorization
from krona_hub.formats.forms.vector_kinds import Kinds
from krona_hub.formats.known.registry import by_name
from krona_hub.formats.reading.description import Description

UNKNOWN_BASE = "the base model is unknown, and which names an application finds depends on it"
OTHER_KINDS = {
    "dense": "it is a full matrix (.diff)",
    "value": "it replaces the weight (.set_weight)",
    "cdka": "it is a sum of Kronecker products (CDKA)",
    "loha": "it is a LoHa",
}
NO_MODULE = "no module of the file is known"


@dataclass(frozen=True)
class Verdict:
    """Whether an application loads a file correctly and completely, and why not."""

    answer: Literal["yes", "no", "not known"]
    why: str = ""  # as a clause; "" for yes
    loaded: int = 0  # layers that it would load correctly
    layers: int = 0  # of the file
    evidence: str = ""  # how the facts about this base model were found, with version and date

    @property
    def ok(self) -> bool:
        """Whether it loads every layer correctly, and everything beside the layers."""
        return self.answer == "yes"


def loads_in(description: Description) -> Mapping[str, Verdict]:
    """For every application, whether it loads the described file correctly.

    >>> from importlib.resources import files
    >>> from krona_hub.formats.reading.describe import describe
    >>> found = loads_in(describe(files("krona_hub.assets") / "demo_lora.safetensors"))
    >>> found["comfyui"].answer, found["nunchaku"].answer, found["nunchaku"].why
    ('yes', 'no', 'it does not run sd15')
    """
    file = DescribedFile(description)
    return {name: _verdict(application, file) for name, application in APPLICATIONS.items()}


def verdict(application: Application, description: Description) -> Verdict:
    """Whether an application loads the described file correctly."""
    return _verdict(application, DescribedFile(description))


def _verdict(application: Application, file: DescribedFile) -> Verdict:
    foreign = [base for base in file.bases if _is_foreign(application, base)]
    if foreign and len(foreign) == len(file.bases):
        return Verdict("no", f"it does not run {_called(foreign[0])}", evidence=str(application.evidence))
    rejected = next((why for name in file.formats if (why := application.rejection(name)) is not None), None)
    if rejected is not None:
        is_open = rejected.startswith(NOT_KNOWN)
        return Verdict("not known" if is_open else "no", rejected.removeprefix(f"{NOT_KNOWN}: "))
    if not file.bases:
        return Verdict("not known", UNKNOWN_BASE)
    if not file.layers and not file.description.vectors:
        return Verdict("not known", NO_MODULE)
    answers = {base.name: _for_base(application, file, base) for base in file.bases}
    if len({(v.answer, v.why) for v in answers.values()}) == 1:
        return next(iter(answers.values()))
    return _undecided(answers)


def _is_foreign(application: Application, base: Base) -> bool:
    """Whether the application is known not to run the base model."""
    is_complete = application.is_complete and not application.every_base and base.family is not None
    return is_complete and support_of(application, base) is None


def _called(base: Base) -> str:
    """The catalog name, if there is one: a folder of configurations has a name of its own."""
    return base.family or base.name


def _undecided(answers: Mapping[str, Verdict]) -> Verdict:
    """The verdict for base models in doubt with different answers."""
    groups: dict[str, list[str]] = {}
    for name, found in answers.items():
        groups.setdefault(found.answer, []).append(name)
    if len(groups) == 1:
        return next(iter(answers.values()))
    why = ", ".join(f"{answer} for {one_of(names)}" for answer, names in groups.items())
    return Verdict("not known", f"it depends on the base model, which is not certain: {why}")


def _for_base(application: Application, file: DescribedFile, base: Base) -> Verdict:
    support = support_of(application, base)
    refused = _not_supported(application, support, base, file)
    if refused is not None:
        return refused
    names = None
    if support is not None and file.own is not None:
        names = Names(file.own, support.names_for(file.variant), file.spellers)
    evidence = str(application.evidence if support is None else support.evidence)
    problems = dict(_problems(application, file, names))
    if support is not None and support.is_open and "" in problems.values():
        name = next(name for name, why in problems.items() if not why)
        return Verdict("not known", f"whether it finds names such as {name} is not known", evidence=evidence)
    lost = {layer for m in file.modules if m.info.name in problems for layer in m.info.layers}
    refusal = _of_whole_file(application, file, problems)
    loaded, total = (0 if refusal else len(file.layers - lost)), len(file.layers) + file.unread
    why = refusal or _lost_layers(problems, len(lost), total) or _ignored_vectors(application, file, names)
    if not why and (doubt := _unknown_parts(application, file)):
        return Verdict("not known", doubt, loaded, total, evidence)
    return Verdict("no" if why else "yes", why or "", loaded, total, evidence)


def _not_supported(
    application: Application, support: FamilySupport | None, base: Base, file: DescribedFile
) -> Verdict | None:
    """The verdict if the application does not run the base model or load such adapters of it; None if it does."""
    if application.every_base:
        return None
    if support is None and _is_foreign(application, base):
        return Verdict("no", f"it does not run {_called(base)}", evidence=str(application.evidence))
    if support is None:
        return Verdict("not known", f"whether it runs {_called(base)} is not known")
    if file.variant in support.rejected:
        return Verdict("no", support.rejected[file.variant], evidence=str(support.evidence))
    titles: Mapping[Kind, str] = {"lora": "LoRA", "lokr": "LoKr"}
    for kind, title in titles.items():
        if kind in file.kinds and not (loads := support.loads(kind)):
            why = support.note or f"it loads no {title} for {_called(base)}"
            if loads is None:
                return Verdict("not known", f"whether it loads {title} for {_called(base)} is not known")
            return Verdict("no", why, evidence=str(support.evidence))
    return None


def _problems(application: Application, file: DescribedFile, names: Names | None) -> Iterator[tuple[str, str]]:
    """Module -> why the application does not apply it correctly; "" if it does not find it."""
    rules = [RULES[name] for name in application.rules]
    forms = [rule.form for rule in rules if rule.form]
    checks = [rule.module for rule in rules if rule.module]
    found = None if names is None else file.found(names)
    answers: dict[LayerFactorization, str | None] = {}
    for module in file.modules:
        name, kind = module.info.name, module.info.kind
        if found is not None and name not in found:
            yield name, ""
            continue
        other = application.kinds is not None and kind not in application.kinds
        why = OTHER_KINDS.get(kind, f"it is {kind}") if other else None
        form = file.forms[name]
        if form not in answers:
            answers[form] = next((why for rule in forms if (why := rule(form))), None)
        why = why or answers[form] or next((why for check in checks if (why := check(module))), None)
        if why:
            yield name, why


def _of_whole_file(application: Application, file: DescribedFile, problems: Mapping[str, str]) -> str | None:
    """Why the application refuses the whole file, or changes all of it; None if it does not."""
    if application.unmatched is not None:
        unknown = [m for m in file.modules if problems.get(m.info.name) == ""]
        keys = sum(len(m.keys) for m in unknown)
        if keys > application.unmatched:
            return (
                f"it refuses a file with more than {application.unmatched} unknown keys, and {keys} are, such as those "
                f"of {unknown[0].info.name}"
            )
    rules, own = [RULES[name].file for name in application.rules], file.own
    why = next((why for rule in rules if rule and own and (why := rule(file.modules, own))), None)
    checks = FILE_CHECKS.get(application.name, ())
    return why or next((why for check in checks if (why := check(file.description))), None)


def _lost_layers(problems: Mapping[str, str], lost: int, total: int) -> str | None:
    """The clause for modules that are not found, or else for those that are computed wrongly."""
    if not problems:
        return None
    unknown = [name for name, why in problems.items() if not why]
    share = f"{lost:,} of {counted(total, 'layer')}"
    if unknown:
        return f"it does not find {share}, such as {unknown[0]}"
    name, why = next(iter(problems.items()))
    return f"it does not apply {share} correctly, such as {name}: {why}"


def held_vectors(format_name: str, application: Application | None) -> Kinds:
    """The kinds of vectors that a file of the format can hold, and that the application loads from it."""
    storage = by_name(format_name).storage
    held = storage.vectors if storage else ()
    return held if application is None or application.vectors is None else application.vectors


def _unknown_parts(application: Application, file: DescribedFile) -> str | None:
    """What the file holds that the application may not load: unmatched modules and embeddings; None if nothing."""
    if file.unread:
        return f"whether it loads {counted(file.unread, 'unmatched module')} of the file is not known"
    found = () if application.embeddings else file.description.extras
    if found:
        return f"whether it loads {counted(len(found), 'embedding')} of the file, such as {found[0]}, is not known"
    return None


def _ignored_vectors(application: Application, file: DescribedFile, names: Names | None) -> str | None:
    """Why the application does not apply all vectors of the file; None if it does, or if there are none."""
    if application.name == "peft":  # a PEFT folder holds only vectors that PEFT wrote, and loads
        return None
    description = file.description
    held = held_vectors(description.format, application)
    lost = [v.name for v in description.vectors if v.kind not in held]
    if names is not None:
        found = [vector for plan in description.plans for vector in plan.vectors if vector.key.key not in lost]
        lost += [v.key.key for v in found if not names.finds_vector(v.key.module, v.parameters[0])]
    return f"it ignores {counted(len(lost), 'vector')} (biases, norms), such as {lost[0]}" if lost else None
