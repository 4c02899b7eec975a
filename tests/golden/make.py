"""How the golden files were made: `python tests/golden/make.py VERSION`. It refuses to touch a file that exists.

Golden files are never edited. A new version of the schema gets a folder of its own. Beside each file lies what it
means, `<name>.delta.safetensors`: the dense ΔW of every layer, computed here entry by entry from the definition, and
the base weight of every DoRA layer as `base.<layer>`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

from krona_hub.adapters.adapter import Adapter, BaseModel, LayerDelta, Provenance
from krona_hub.checkpoints.writer import write_tensors
from krona_hub.kron.terms import KronTerms, LowRank
from krona_hub.schema.native_tensors import to_tensors

HERE = Path(__file__).parent
RANDOM = torch.Generator().manual_seed(20240229)
TYPES = {"f64": torch.float64, "f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def numbers(dtype, *shape):
    return torch.randn(shape, generator=RANDOM).to(TYPES[dtype])


def kron(terms, a1, a2, b1, b2, dtype="f32", rows="kron", a_rank=None, b_rank=None):
    """A sum with dense factors, or with factors of the given ranks."""

    def factor(p, q, rank):
        if rank is None:
            return numbers(dtype, terms, p, q)
        return LowRank(numbers(dtype, terms, p, rank), numbers("f32", terms, rank, q))

    return KronTerms(factor(a1, a2, a_rank), factor(b1, b2, b_rank), rows)


def layer(*sums, weight=None, axis=None):
    weight = weight or sums[0].shape.full
    magnitude = None if axis is None else numbers("f32", weight[0 if axis == "out" else 1]).abs()
    return LayerDelta(sums, weight, magnitude, axis or "out")


LAYERS = {
    "linear": {"unet.mid_block.attentions.0.proj_in": layer(kron(1, 4, 2, 3, 5))},
    "terms": {
        "transformer.transformer_blocks.0.attn.to_q": layer(kron(3, 2, 3, 5, 2, "bf16")),
        "text_encoder.encoder.layers.0.mlp.fc1": layer(kron(2, 4, 1, 2, 6, "f16")),
        "text_encoder_2.encoder.layers.1.self_attn.q_proj": layer(kron(1, 3, 3, 2, 2, "f64")),
    },
    "sums": {
        "unet.a.lora": layer(kron(1, 1, 1, 8, 6, b_rank=2)),
        "unet.b.both_low_rank": layer(kron(2, 4, 3, 3, 4, "bf16", a_rank=1, b_rank=2)),
        "unet.c.three_shapes": layer(kron(1, 2, 3, 6, 2), kron(2, 4, 1, 3, 6, "f16"), kron(1, 12, 1, 1, 6, a_rank=3)),
    },
    "shuffled": {
        "unet.down_blocks.0.attn1.to_q": layer(kron(1, 4, 2, 3, 5, rows="shuffled")),
        "unet.down_blocks.0.attn1.to_k": layer(kron(2, 2, 3, 5, 2, rows="shuffled"), kron(1, 5, 2, 2, 3)),
    },
    "conv": {
        "unet.conv_in": layer(kron(2, 2, 2, 3, 18), weight=(6, 4, 3, 3)),
        "unet.conv_out": layer(kron(1, 3, 6, 2, 6), weight=(6, 4, 3, 3)),  # a2 = 6 does not divide in = 4
        "unet.temporal": layer(kron(1, 2, 1, 2, 9, "f16"), weight=(4, 3, 3)),
        "unet.video": layer(kron(1, 2, 2, 2, 12, b_rank=1), weight=(4, 3, 2, 2, 2)),
    },
    "dora": {
        "unet.out_axis": layer(kron(1, 4, 2, 2, 5), axis="out"),
        "unet.in_axis": layer(kron(2, 4, 2, 2, 5), axis="in"),
        "unet.conv_in_axis": layer(kron(1, 2, 2, 3, 18), weight=(6, 4, 3, 3), axis="in"),
    },
    "record": {"unet.x.to_q": layer(kron(1, 4, 2, 3, 5)), "unet.y.to_q": layer(kron(1, 4, 2, 3, 5))},
}
RECORD = Provenance(
    created_by="krona-hub 0.1.0",
    source_format="lycoris-lokr",
    source_sha256="0123456789abcdef" * 4,
    method="nearest-kron",
    relative_error=0.0125,
    layer_errors={"unet.y.to_q": 0.025},
    training={"steps": 1000, "learning_rate": 1e-4, "photos": ["a.jpg", "ü.jpg"]},
    licence="CC-BY-4.0",
    trigger_words=("sks", "a photo of sks"),
    metadata={"ss_network_dim": "8", "modelspec.title": "A sks cat"},
    unknown={"rating": {"stars": 5}, "layers": {"unet.x.to_q": {"temper": 0.5}}, "provenance": {"seal": None}},
)


def dense(factor):
    """(terms, p, q) in float64."""
    if isinstance(factor, LowRank):
        return np.einsum("kpr,krq->kpq", factor.up.double().numpy(), factor.down.double().numpy())
    return factor.double().numpy()


def delta_of(s):
    """Σ A ⊗ B entry by entry, from the definition of each order of rows."""
    a, b = dense(s.left), dense(s.right)
    a1, a2, b1, b2 = s.shape
    delta = np.zeros((a1 * b1, a2 * b2))
    for i1 in range(a1):
        for j1 in range(a2):
            for i2 in range(b1):
                for j2 in range(b2):
                    row = i1 * b1 + i2 if s.rows == "kron" else i2 * a1 + i1
                    delta[row, j1 * b2 + j2] = sum(a[k, i1, j1] * b[k, i2, j2] for k in range(len(a)))
    return delta


def meaning_of(name, delta):
    """The dense ΔW of a layer, and its base weight where it needs one."""
    directed = sum(map(delta_of, delta.sums)).reshape(delta.weight_shape)
    if delta.magnitude is None:
        return {name: torch.from_numpy(directed)}
    base = numbers("f64", *delta.weight_shape).numpy()
    moved, magnitude = base + directed, delta.magnitude.double().numpy()
    for i, m in enumerate(magnitude):
        part = (i,) if delta.magnitude_axis == "out" else (slice(None), i)
        moved[part] *= m / np.sqrt((moved[part] ** 2).sum())
    return {name: torch.from_numpy(moved - base), f"base.{name}": torch.from_numpy(base)}


VECTORS = {  # of 2.0: parameter -> what is added to it
    "unet.mid_block.attentions.0.proj_in.bias": ("f32", 8),
    "unet.conv_norm_out.weight": ("f16", 5),
    "transformer.blocks.0.scale_shift_table": ("bf16", 1, 6, 4),
    "text_encoder.final_layer_norm.bias": ("f64", 3),
}


def main_2_0():
    """The files of 2.0: vectors beside a layer, and vectors alone."""
    folder = HERE / "2.0"
    folder.mkdir(exist_ok=True)
    for name, layers in {"vectors": LAYERS["linear"], "only_vectors": {}}.items():
        vectors = {parameter: numbers(*description) for parameter, description in VECTORS.items()}
        adapter = Adapter(layers, vectors=vectors)
        write_tensors(folder / f"{name}.safetensors", *to_tensors(adapter))
        meaning = {k: t for layer_name, delta in layers.items() for k, t in meaning_of(layer_name, delta).items()}
        write_tensors(folder / f"{name}.delta.safetensors", meaning | {k: v.double() for k, v in vectors.items()})


def main():
    folder = HERE / "1.0"
    folder.mkdir(exist_ok=True)
    for name, layers in LAYERS.items():
        provenance = RECORD if name == "record" else Provenance()
        extras = {"<s1>": numbers("f32", 8), "norm.bias": numbers("f16", 3)} if name == "record" else {}
        base = BaseModel("sd15", "org/model", "main", "ab" * 32) if name == "record" else None
        write_tensors(folder / f"{name}.safetensors", *to_tensors(Adapter(layers, base, provenance, extras)))
        meaning = {k: t for layer_name, delta in layers.items() for k, t in meaning_of(layer_name, delta).items()}
        write_tensors(folder / f"{name}.delta.safetensors", meaning)


if __name__ == "__main__":
    {"1.0": main, "2.0": main_2_0}[sys.argv[1]]()
