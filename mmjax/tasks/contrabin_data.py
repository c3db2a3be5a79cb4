"""What the ContraBin recipe learns from: splits of functions, and a tokenizer for each side."""

import pathlib

import jax

from mmjax.data import builders, code, tokenizers
from mmjax.data.dataset import DataError

BINARY = 'binary'  # folder, in a run's, of the tokenizer of listings
_READ = 5_000  # training rows that a tokenizer is trained on


def open_splits(config) -> tuple[dict[str, code.CodeFunctions], str]:
    """Prepares the functions and opens every split; also returns a report on C files compiled."""
    spec = config.data
    cache, root, told = builders.cache_dir(spec.cache), spec.root, ''
    compiled = spec.compile.to_dict()
    if spec.c_files:
        from mmjax.data import code_prepare

        if root:
            raise DataError('data.root and data.c_files exclude each other')
        root, told = code_prepare.prepare_cached(
            spec.c_files, cache, seed=config.seed, wait=jax.process_index() > 0, **compiled
        )
    names = code.SPLITS
    if root:
        there = code.split_files(root)
        names = tuple(name for name in code.SPLITS if name != 'test' or name in there)
    prepared = code.prepare_code(
        root, cache, splits=names, seed=config.seed, synthetic_sizes=spec.built_in.to_dict(),
        max_fault_share=spec.max_fault_share, wait=jax.process_index() > 0,
    )  # fmt: skip
    return {name: code.CodeFunctions(prepared, name) for name in names}, told


def choose_tokenizers(config, assets, train: code.CodeFunctions):
    """Returns {text: tokenizer}: the run's own, the pretrained folders', or trained ones.

    Source and comment share the anchor's.
    """
    spec = config.data
    sizes = {'anchor': spec.vocabulary, 'binary': spec.binary_vocabulary}
    named = config.model.pretrained.to_dict()
    if assets is not None:
        found = {
            'anchor': tokenizers.load_tokenizer(assets),
            'binary': tokenizers.load_tokenizer(pathlib.Path(assets) / BINARY),
        }
    else:
        given = {side: tokenizers.load_tokenizer(path) for side, path in named.items() if path}
        rows = train.one_each()[:_READ]
        texts = {
            'anchor': (
                code.as_read(text, train.record(row)[text])
                for row in rows
                for text in ('source', 'comment')
            ),
            'binary': (train.record(row)['binary'] for row in range(min(len(train), _READ))),
        }
        found = {
            side: given[side]
            if side in given
            else tokenizers.train_tokenizer(
                texts[side], size, lower_case=False, lines=side == 'binary'
            )
            for side, size in sizes.items()
        }
    return {'source': found['anchor'], 'comment': found['anchor'], 'binary': found['binary']}


def save_tokenizers(folder, chosen) -> None:
    chosen['source'].save(folder)
    chosen['binary'].save(pathlib.Path(folder) / BINARY)
