"""What the ContraBin recipe writes: the nearest functions, embeddings, and compiled rows."""

import functools
import json
import os
import pathlib
import shutil

import jax
import numpy as np

from mmjax.engine.task import gather
from mmjax.errors import UserError
from mmjax.evals import gallery
from mmjax.recipes.contrabin import data as code

SUFFIXES = {'.c': 'source', '.h': 'source', '.s': 'binary', '.asm': 'binary', '.ll': 'binary'}


def predict(task, apply, inputs, output):
    """Names the ten functions nearest to a listing, a C file (by its suffix) or a sentence.

    inputs: a file; or a sentence, which names no file: with a blank in it, or without the suffix of
    code or of a text.
    """
    path = pathlib.Path(inputs)
    suffix = path.suffix.lower()
    kind, text = SUFFIXES.get(suffix, 'comment'), inputs
    if os.path.isfile(inputs):  # Path.is_file raises where a sentence is too long for a name
        try:
            text = path.read_text('utf-8', errors='replace')
        except OSError as error:
            raise UserError(f'{inputs} cannot be read: {error.strerror}') from error
    elif any(map(str.isspace, inputs)):
        kind = 'comment'
    elif suffix in (*SUFFIXES, '.txt'):
        raise UserError(f'{inputs} does not exist')
    if not text.strip():
        raise UserError(f"--input='{inputs}' holds no text")
    told = [code.as_read(kind, text)]
    tokens, mask = task.tokenizers[kind].encode(told, task.lengths[kind])
    batch = {kind: tokens, f'{kind}_mask': mask}
    alone = jax.jit(functools.partial(task.embed_text, kind))
    found = np.asarray(alone(apply.variables, batch))
    split = task.splits['test' if 'test' in task.splits else 'val']
    asked = split.subset(split.one_each())
    other = 'source' if kind == 'binary' else 'binary'
    encoded, _ = gather(apply, 'encode', asked, task.batch_size)
    (cosines,), (nearest,) = gallery.search(found, encoded[other], 10)
    lines, hits = [f'nearest to this {kind}, by {other}, in split {split.split}:'], []
    for place, (row, cosine) in enumerate(zip(nearest, cosines, strict=True), start=1):
        record = asked.record(int(row))
        hits.append(
            {
                'name': record['name'],
                'path': record['path'],
                'comment': record['comment'],
                'cosine': float(cosine),
            }
        )
        told = ' '.join(record['comment'].split())
        lines.append(f'{place:2d}  {cosine:.3f}  {record["name"]}  {told:.70}')
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    (output / 'nearest.json').write_text(json.dumps({'query': inputs, 'nearest': hits}, indent=1))
    return '\n'.join(lines)


def embed(task, apply, output):
    """Writes embeddings.npz (source, comment, binary: [rows, features]) and index.jsonl."""
    output.mkdir(parents=True, exist_ok=True)
    rows, at = {name: [] for name in ('source', 'comment', 'binary')}, 0
    with (output / 'index.jsonl').open('w') as index:
        for split in task.splits.values():
            for outputs, batch in apply('encode', split, task.batch_size):
                for name, parts in rows.items():
                    parts.append(outputs[name])
                for row in batch['row']:
                    record = split.record(int(row))
                    entry = {'row': at, 'split': split.split, 'opt_level': record['opt_level']}
                    entry |= {key: record[key] for key in ('name', 'path', 'label')}
                    index.write(json.dumps(entry) + '\n')
                    at += 1
    arrays = {name: np.concatenate(parts) for name, parts in rows.items()}
    with (output / 'embeddings.npz').open('wb') as file:
        np.savez(file, **arrays)
    with (output / 'embeddings.npy').open('wb') as file:
        np.save(file, arrays['binary'])
    return f'{at} binaries with source and comment: {output / "embeddings.npz"}'


def copy_rows(compiled, output):
    """Copies the rows compiled from C files, and their report, to `output`.

    compiled: as `contrabin_data.open_splits` returns it.
    """
    folder, told = compiled
    output = pathlib.Path(output)
    output.mkdir(parents=True, exist_ok=True)
    for path in sorted(pathlib.Path(folder).iterdir()):
        if not path.name.startswith('.'):  # what a killed preparation left
            shutil.copy(path, output / path.name)
    return f'{told}\n\nwritten: {output}'
