"""Every example of every --help runs, and every --json prints one document of the documented shape."""

import json
import os
import shlex
import shutil

import jsonschema
import pytest

from krona_hub.cli.main import COMMANDS, load, main
from scripts.make_docs import examples

TEXT, NUMBER, FLAG = {"type": "string"}, {"type": "number"}, {"type": "boolean"}
COUNT = {"type": "integer", "minimum": 0}
MAYBE_TEXT = {"type": ["string", "null"]}


def obj(**properties):
    return {"type": "object", "required": list(properties), "properties": properties}


def many(item, least=0):
    return {"type": "array", "items": item, "minItems": least}


def each(item):
    return {"type": "object", "additionalProperties": item, "minProperties": 1}


VERDICT = obj(ok=FLAG, answer={"enum": ["yes", "no", "not known"]}, why=TEXT, loaded=COUNT, layers=COUNT, evidence=TEXT)
VERDICT["additionalProperties"] = False
MODULE = obj(name=TEXT, parameters=COUNT, kind=TEXT)
LAYER = obj(layer=TEXT, before=TEXT, after=TEXT, parameters_before=COUNT, parameters_after=COUNT, relative_error=NUMBER)
CONVERSION = obj(
    source_format=TEXT,
    target_format=TEXT,
    tool=MAYBE_TEXT,
    out=TEXT,
    layers=many(LAYER, 1),
    parameters_before=COUNT,
    parameters_after=COUNT,
    bytes_before=COUNT,
    bytes_after=COUNT,
    layers_left_out=COUNT,
    relative_error=NUMBER,
    energy_kept=NUMBER,
    verdict=TEXT,
    checked=TEXT,
    notes=many(TEXT),
    alternatives=many(TEXT),
    written=FLAG,
)
CALIBRATED = obj(
    predicted_effect=NUMBER,
    gain=NUMBER,
    alternatives=many(TEXT, 2),
    effect=obj(
        kept=NUMBER,
        kept_range=many(NUMBER, 2),
        strength=NUMBER,
        other_kept=NUMBER,
        drift=NUMBER,
        prompts=many(TEXT, 1),
        other_prompts=many(TEXT, 1),
        samples=COUNT,
        other_samples=COUNT,
        seed=COUNT,
    ),
)
INSPECTION = obj(
    file=TEXT,
    format=TEXT,
    bytes=COUNT,
    parameters=COUNT,
    modules=many(MODULE, 1),
    base=MAYBE_TEXT,
    candidates=many(TEXT),
    unmatched={"type": "object"},
    warnings=many(TEXT),
    loads_in=each(VERDICT),
    sha256=MAYBE_TEXT,
)
PART = obj(source=TEXT, weight=NUMBER, format=MAYBE_TEXT, layers=COUNT, parameters=COUNT, sha256=MAYBE_TEXT)
BASE = obj(
    name=TEXT,
    title=TEXT,
    aliases=many(TEXT),
    hub_ids=many(TEXT),
    same_layers=many(TEXT),
    variant_of=MAYBE_TEXT,
    uncovered=many(TEXT),
    spellings=many(TEXT),
    components=many(obj(component=TEXT, class_name=TEXT, layers=COUNT, parameters=COUNT, checked=TEXT), 1),
)
COMBINATION = obj(
    parts=many(PART, 2),
    target_format=TEXT,
    out=MAYBE_TEXT,
    layers=many(LAYER, 1),
    parameters_before=COUNT,
    parameters_after=COUNT,
    relative_error=NUMBER,
    energy_kept=NUMBER,
    verdict=TEXT,
    checked=TEXT,
    notes=many(TEXT),
    written=FLAG,
)
FITTED = obj(source=TEXT, format=MAYBE_TEXT, weight=NUMBER, matched=COUNT, total=COUNT, missing={"type": "object"})
MERGED_TENSOR = obj(
    file=TEXT, tensor=TEXT, layers=many(TEXT, 1), dtype=TEXT, wanted=NUMBER, lost=NUMBER, share_lost=NUMBER
)
MERGE = obj(
    base=TEXT,
    out=TEXT,
    adapters=many(FITTED, 1),
    tensors=many(MERGED_TENSOR, 1),
    files=many(TEXT, 1),
    copied=COUNT,
    left_out=many(TEXT),
    bytes_written=COUNT,
    bytes_touched=COUNT,
    seconds=NUMBER,
    undo=MAYBE_TEXT,
    base_sha256=MAYBE_TEXT,
    share_lost=NUMBER,
    verdict=TEXT,
    notes=many(TEXT),
    written={"const": True},
)
MERGE_PLAN = obj(
    base=TEXT,
    adapters=many(FITTED, 1),
    out_dtype=TEXT,
    files=many(obj(path=TEXT, tensors=many(obj(name=TEXT, dtype=TEXT, out_dtype=TEXT, layers=many(TEXT)), 1)), 1),
    bytes_to_touch=COUNT,
    bytes_of_weights=COUNT,
    memory=COUNT,
    seconds=NUMBER,
    notes=many(TEXT),
    written={"const": False},
)
UNMERGE = obj(out=TEXT, restored=many(TEXT, 1), unchanged=many(TEXT), copied=many(TEXT), nbytes=COUNT, seconds=NUMBER)
EXTRACTED = obj(
    layer=TEXT,
    form=TEXT,
    terms=COUNT,
    parameters=COUNT,
    norm=NUMBER,
    relative_norm=NUMBER,
    relative_error=NUMBER,
    beyond_rounding=NUMBER,
)
EXTRACTION = obj(
    base=TEXT,
    tuned=TEXT,
    target_format=TEXT,
    out=TEXT,
    method=TEXT,
    layers=many(EXTRACTED, 1),
    unchanged=COUNT,
    at_rounding=many(TEXT),
    others=many(obj(name=TEXT, kind=TEXT, kept=FLAG)),
    parameters=COUNT,
    relative_error=NUMBER,
    beyond_rounding=NUMBER,
    verdict=TEXT,
    checked=TEXT,
    written=FLAG,
)
CHECKED_TENSOR = obj(
    tensor=TEXT, file=TEXT, state=TEXT, touched=FLAG, elements=COUNT, unequal=COUNT, strengths=many(NUMBER)
)
MERGE_CHECK = obj(
    question={"const": "merge"},
    same=FLAG,
    exit_code=COUNT,
    states=each(COUNT),
    adapters=many(TEXT, 1),
    weights=many(NUMBER, 1),
    matched=many(TEXT, 1),
    tensors=many(CHECKED_TENSOR, 1),
    strengths=many(NUMBER),
)
DELTA_CHECK = obj(
    question={"const": "delta"},
    same=FLAG,
    exit_code=COUNT,
    relative_difference=NUMBER,
    only_first=many(TEXT),
    only_second=many(TEXT),
    layers=many(obj(layer=TEXT, first=MAYBE_TEXT, second=MAYBE_TEXT, relative_difference=NUMBER, same=FLAG), 1),
)
FIT_CHECK = obj(
    question={"const": "fit"},
    same=FLAG,
    exit_code=COUNT,
    base=TEXT,
    matched=COUNT,
    total=COUNT,
    problems={"type": "object"},
    coverage=each(many(COUNT, 2)),
    fits_instead=many(TEXT),
)
PUSH = obj(
    plan=obj(repo=TEXT, rows=many(obj(file=TEXT, size=COUNT, action={"enum": ["add", "update", "same", "delete"]}), 4)),
    url=TEXT,
    commit=MAYBE_TEXT,
    up_to_date=FLAG,
    bytes_to_send=COUNT,
    verified=COUNT,
)
PULL = obj(repo=TEXT, commit=TEXT, out=TEXT, files=many(TEXT, 1), bytes=COUNT, written=FLAG, native=FLAG)
USED = obj(name=TEXT, source=TEXT, weight=NUMBER, sha256=TEXT)
PICTURE = obj(file=TEXT, prompt=TEXT, seed=COUNT, column=TEXT, base=TEXT, adapters={"type": "object"}, pixels=TEXT)
RECORD = obj(
    krona_generate=COUNT,
    base=obj(source=TEXT, pipeline=MAYBE_TEXT, fingerprint=MAYBE_TEXT, digest=TEXT, files={"type": "object"}),
    adapters=many(USED),
    prompts=many(TEXT, 1),
    negative=MAYBE_TEXT,
    seed=COUNT,
    device=TEXT,
    dtype=TEXT,
    versions=each(MAYBE_TEXT),
)
GENERATION = obj(
    out=TEXT,
    pictures=many(PICTURE, 1),
    columns=many(TEXT, 1),
    rows=COUNT,
    grid=MAYBE_TEXT,
    record=RECORD,
    seconds=NUMBER,
    written=FLAG,
    notes=many(TEXT),
)
TRAINING_PLAN = obj(
    family=TEXT,
    pictures=COUNT,
    layers=COUNT,
    forms=many({"type": "array"}, 1),
    parameters=COUNT,
    steps=COUNT,
    epochs=NUMBER,
    memory=COUNT,
    seconds_per_step=NUMBER,
)
KNOWN, EVIDENCE = {"enum": ["yes", "no", "not known"]}, {"type": "string", "pattern": "^(run|read): .+, 20[0-9-]{8}$"}
FAMILY = obj(
    bases=many(TEXT, 1),
    lora=KNOWN,
    lokr=KNOWN,
    names={"type": "object", "additionalProperties": many(TEXT, 1)},
    missing={"type": "object", "additionalProperties": many(TEXT)},
    note=TEXT,
    evidence=EVIDENCE,
)
APPLICATION = obj(
    name=TEXT,
    title=TEXT,
    kind={"enum": ["interface", "engine", "library", "trainer"]},
    aliases=many(TEXT),
    evidence=EVIDENCE,
    writes=obj(**{"lora": MAYBE_TEXT, "lora with DoRA": MAYBE_TEXT, "lokr": MAYBE_TEXT}),
    reads=many(TEXT, 1),
    other_bases={"enum": ["yes, every base model", "no", "not known"]},
    handling=each(TEXT),
    families=many(FAMILY),
)
SHAPES = {
    "tools": obj(applications=many(APPLICATION, 17)),
    "tools SwarmUI": APPLICATION,
    "tools --base flux2-klein-4b": obj(base=TEXT, applications=each({"anyOf": [FAMILY, KNOWN]})),
    "inspect lora.safetensors": INSPECTION,
    "inspect krona.safetensors --sha256": INSPECTION,
    "convert lokr.safetensors --to lora --rank 4": CONVERSION,
    "convert lora.safetensors --exact --dry-run": CONVERSION,
    "convert zorbi-lora.safetensors --base tiny-scenes --budget 1/4 --calibrate default --samples 24 --dry-run": {
        "allOf": [CONVERSION, CALIBRATED]
    },
    "calibrate zorbi-lora.safetensors --base tiny-scenes --samples 24 -o m.safetensors": obj(
        layers=COUNT,
        samples=COUNT,
        prompts=many(TEXT, 1),
        other_prompts=many(TEXT),
        seed=COUNT,
        steps=COUNT,
        guidance=NUMBER,
        other_change=NUMBER,
        nbytes=COUNT,
        seconds=NUMBER,
        warnings=many(TEXT, 1),
        out=TEXT,
    ),
    "validate krona.safetensors": obj(path=TEXT, valid=FLAG, findings=many({"type": "object"})),
    "combine lora.safetensors lokr.safetensors:-0.5 -o sum.safetensors": COMBINATION,
    "combine lora.safetensors:2 krona.safetensors --dry-run": COMBINATION,
    "merge base lora.safetensors:0.8 -o new": MERGE,
    "merge base lora.safetensors lokr.safetensors:-1 --in-place --undo back.safetensors --out-dtype bf16": MERGE,
    "merge base lora.safetensors:0.8 --dry-run": MERGE_PLAN,
    "unmerge merged --undo undo.safetensors -o restored": UNMERGE,
    "extract base merged --shape 8x8 --terms 2 --allow-loss -o found.safetensors": EXTRACTION,
    "verify merged --base base --adapter lora.safetensors:0.8": MERGE_CHECK,
    "verify lokr.safetensors krona.safetensors": DELTA_CHECK,
    "verify lokr.safetensors --base sd15": FIT_CHECK,
    "push krona.safetensors ana/style": PUSH,
    "push krona.safetensors ana/style --dry-run": PUSH,
    "pull ana/style": PULL,
    "hub info ana/style": obj(
        repo=TEXT,
        commit=TEXT,
        private=FLAG,
        gated=FLAG,
        base_model=MAYBE_TEXT,
        licence=MAYBE_TEXT,
        tags=many(TEXT),
        files=many(obj(name=TEXT, size=COUNT), 1),
        adapter=obj(format=MAYBE_TEXT, loads_in=many(TEXT)),
    ),
    "hub search": many(obj(repo=TEXT, base_models=many(TEXT)), 1),
    "hub ls": many(obj(repo=TEXT, commit=TEXT, files=many(TEXT, 1), bytes=COUNT)),
    "generate base --prompt x --adapter lora.safetensors --strengths 0,1 --dry-run": GENERATION,
    "train config.toml --check": TRAINING_PLAN,
    "evaluate photos --like photos": obj(
        pictures=many(TEXT), references=many(TEXT), measures=many(obj(name=TEXT)), columns=each(each(NUMBER))
    ),
    "migrate krona.safetensors --to 1.0 -o same.safetensors": obj(**{"path": TEXT, "from": TEXT, "to": TEXT}),
    "params --base sdxl --shape 64x8 --rank 4": {"type": "object"},
    "bases wan": obj(bases=many(BASE, 10)),
    "bases flux1-dev": BASE,
    "formats": obj(
        formats=many(obj(name=TEXT, reads=FLAG, writes=FLAG, summary=TEXT), 10),
        loads_in=each(each(obj(mark={"enum": ["yes", "some", "?", "–"]}, why=TEXT))),
    ),
    "completion fish": obj(shell=TEXT, file=TEXT, script=TEXT),
    "demo": obj(folder=TEXT, note=TEXT, steps=many(obj(command=TEXT, result={"type": "object"}), 5), files=many(obj())),
}


@pytest.fixture
def here(adapters, tmp_path, monkeypatch):
    """A separate working directory with the files of the examples. No command edits a file."""
    shutil.copytree(adapters, tmp_path, copy_function=os.link, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def online(request, here):
    """A fake Hub for commands that need one, with the adapter of the `pull` and `hub` examples."""
    line = request.node.callspec.params["line"].removeprefix("krona ")
    if line.split()[0] in ("push", "pull", "hub"):
        request.getfixturevalue("hub")
    if line.split()[0] in ("pull", "hub"):
        from krona_hub import push

        push("krona.safetensors", "ana/style", private=False, tag="v1")


LONG = {  # they search all shapes of every layer, or run the whole demo
    "krona extract base merged -o found.safetensors",
    "krona combine lora.safetensors lokr.safetensors:-0.5 --max-error 0.05 -o small.safetensors",
    "krona convert lora.safetensors --budget 50% -o half.safetensors --report half.html",
    "krona convert zorbi-lora.safetensors --base tiny-scenes --budget 1/8 --calibrate default -o out.safetensors",
    "convert zorbi-lora.safetensors --base tiny-scenes --budget 1/4 --calibrate default --samples 24 --dry-run",
    "krona demo",
    "demo",
}


def with_marks(line, *values):
    return pytest.param(*values, marks=[pytest.mark.slow] if line in LONG else [])


EXAMPLES = [with_marks(line, command, line) for command, line in examples()]


@pytest.mark.parametrize(("command", "line"), EXAMPLES, ids=lambda value: value)
def test_the_examples_of_the_help_run(command, line, here, online, capsys):
    assert line.startswith(f"krona {command}")
    status = main(shlex.split(line)[1:])
    shown = capsys.readouterr()
    assert status == 0, shown.err
    assert shown.out.strip()


@pytest.mark.parametrize("line", [with_marks(line, line) for line in SHAPES])
def test_json_is_one_document_of_the_promised_shape(line, here, online, capsys):
    assert main([*line.split(), "--json"]) == 0
    out, err = capsys.readouterr()
    jsonschema.validate(json.loads(out), SHAPES[line])
    assert not err


def test_every_command_has_an_example_and_a_json_shape():
    assert {line.split()[0] for line in SHAPES} == set(COMMANDS)
    assert {command for command, _ in examples()} == set(COMMANDS)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_keeps_its_name_and_the_summary_of_the_table(name):
    command = load(name)
    assert command.name == name
    assert command.help.split("\n")[0].rstrip(".") and {"json", "quiet"} <= {p.name for p in command.params}
