"""Embeddings and predictions on disk, in one format for every recipe.

embeddings.npy   float32 [rows, …], memory-mapped while it is written
mask.npy         bool, the leading axes of the embeddings; for padded ones only
index.jsonl      one JSON object per row: its number and what identifies it
"""

import json
from collections.abc import Mapping, Sequence
from types import TracebackType

import numpy as np
from etils import epath


class EmbeddingWriter:
    """Writes embeddings batch by batch, without holding them in memory.

    Args:
      output: the folder, made as needed.
      rows: how many rows there will be.
      shape: of a row; None takes that of the first batch.
      name, index: names of the array and of the index.
    """

    def __init__(
        self,
        output: epath.PathLike,
        rows: int,
        shape: tuple[int, ...] | None = None,
        *,
        name: str = 'embeddings',
        index: str = 'index',
    ):
        self.path = epath.Path(output) / f'{name}.npy'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.rows = 0
        self._total = rows
        self._shape = shape
        self._values: np.memmap | None = None
        self._mask: np.memmap | None = None
        self._index = (self.path.parent / f'{index}.jsonl').open('w')

    def __enter__(self) -> 'EmbeddingWriter':
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._index.close()
        for array in (self._values, self._mask):
            if array is not None:
                array.flush()

    def add(
        self,
        values: np.ndarray,
        entries: Sequence[Mapping[str, object]],
        mask: np.ndarray | None = None,
    ) -> None:
        """Appends rows.

        Args:
          values: [n, …]; a first axis of the row that is shorter than that of `shape` is padded.
          entries: n objects for the index; 'row' is added.
          mask: bool [n, …], True where `values` holds an embedding.
        """
        if self._values is None:
            shape = self._shape or values.shape[1:]
            self._values = self._open(self.path, (self._total, *shape), np.float32)
        rows = slice(self.rows, self.rows + len(values))
        self._values[rows, : values.shape[1]] = values
        if mask is not None:
            if self._mask is None:
                shape = (self._total, *self._values.shape[1 : mask.ndim])
                self._mask = self._open(self.path.parent / 'mask.npy', shape, bool)
            self._mask[rows, : mask.shape[1]] = mask
        for entry in entries:
            line = {'row': self.rows, **entry}
            self._index.write(json.dumps(line, ensure_ascii=False) + '\n')
            self.rows += 1

    def _open(self, path: epath.Path, shape: tuple[int, ...], dtype: type) -> np.memmap:
        return np.lib.format.open_memmap(path, 'w+', dtype=dtype, shape=shape)


def write_prediction(output: epath.PathLike, name: str, content: Mapping[str, object]) -> None:
    """Writes `content` as <output>/<name>.json, the folder made as needed."""
    folder = epath.Path(output)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (folder / f'{name}.json').write_text(text)
