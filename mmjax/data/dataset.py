"""Random access to the examples of one split. Free of jax."""

import abc
from collections.abc import Mapping, Sequence

import numpy as np


class Dataset(abc.ABC):
    """One split: examples by row, and an index of small arrays that samplers read.

    It is pickled into loader processes, so it holds paths and numbers, opens files lazily and
    never imports jax. `example` must be a pure function of (row, rng, train).
    """

    split: str
    index: Mapping[str, np.ndarray]  # each [len(self)], for samplers: identity, length, page, ...
    skipped: Mapping[str, int] = {}  # reason → records left out while preparing
    lengths: Sequence[int] = ()  # bucket lengths that `collate` knows; empty: one shape
    length_key: str | None = None  # the index array that holds a row's length

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def example(self, row: int, rng: np.random.Generator, train: bool) -> dict[str, np.ndarray]:
        """Decodes, augments (when `train`) and tokenizes one record."""

    def collate(self, examples: Sequence[dict], bucket: int) -> dict[str, np.ndarray]:
        """Stacks examples to a batch; `bucket` is the length to pad to, 0 for a single shape."""
        return {key: np.stack([example[key] for example in examples]) for key in examples[0]}

    @abc.abstractmethod
    def fingerprint(self) -> dict[str, str | int]:
        """What identifies the data: name, version, split, size, digest of its tables."""
