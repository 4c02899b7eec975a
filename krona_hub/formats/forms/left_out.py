"""What a result does not have of its source. Torch-free."""

from __future__ import annotations

from dataclasses import dataclass

from krona_hub.errors import counted


@dataclass(frozen=True)
class LeftOut:
    """Names of what was left out; empty if the result is complete.

    >>> str(LeftOut(vectors=("unet.conv_in.bias", "unet.conv_norm_out.weight"), embeddings=("bundle_emb.sks",)))
    '2 vectors (biases, norms) and 1 embedding'
    >>> bool(LeftOut())
    False
    """

    modules: tuple[str, ...] = ()  # that were not read, and layers without a name for the application
    vectors: tuple[str, ...] = ()  # parameters
    embeddings: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        return (*self.modules, *self.vectors, *self.embeddings)

    def __bool__(self) -> bool:
        return bool(self.names)

    def __str__(self) -> str:
        """Counts in words, such as "1 module, 64 vectors (biases, norms)"."""
        found = [counted(len(self.modules), "module")] if self.modules else []
        found += [f"{counted(len(self.vectors), 'vector')} (biases, norms)"] if self.vectors else []
        found += [counted(len(self.embeddings), "embedding")] if self.embeddings else []
        return " and ".join(found)


COMPLETE = LeftOut()
