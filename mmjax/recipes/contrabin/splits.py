"""What the ContraBin recipe learns from: splits of functions, and a tokenizer for each side."""

import contextlib
import hashlib
import json
import pathlib
import sys
import time

import jax
import tqdm

from mmjax.data import prepare, tokenizers
from mmjax.data.tables import file_stamp
from mmjax.errors import UserError
from mmjax.recipes.contrabin import data as code

COMPILED_BY = ('recipes/contrabin/c_projects/*.py',)
BINARY = 'binary'  # folder, in a run's, of the tokenizer of listings
_READ = 5_000  # training functions, or listings, that a tokenizer is trained on
_EVERY = 5.0  # seconds between two lines of progress


def open_splits(config) -> tuple[dict[str, code.CodeFunctions], tuple[pathlib.Path, str] | None]:
    """Prepares the functions and opens every split.

    Also returns the folder of the rows compiled from `data.c_files` with a report on them, or None.
    """
    spec = config.data
    cache, root, compiled = prepare.cache_dir(spec.cache), spec.root, None
    options, there = spec.compile.to_dict(), code.SPLITS
    if spec.c_files:
        from mmjax.recipes.contrabin.c_projects import prepare as code_prepare

        if root:
            raise UserError('data.root and data.c_files exclude each other')
        root, report = _compile(
            spec.c_files, cache, wait=jax.process_index() > 0, seed=spec.seed, **options
        )
        compiled, there = (root, code_prepare.table(report)), report['rows']
        for name in ('train', 'val'):
            if name not in there:
                raise UserError(
                    f'{spec.c_files}: split {name} has no row; see data.compile.val and .test'
                )
    elif root:
        there = code.split_files(root)
    names = tuple(name for name in code.SPLITS if name != 'test' or name in there)
    with _teller('preparing', 'rows') as tell:
        prepared = code.prepare_code(
            root,
            cache,
            splits=names,
            seed=spec.seed,
            synthetic_sizes=spec.built_in.to_dict(),
            registers=options['registers'],
            max_fault_share=spec.max_fault_share,
            wait=jax.process_index() > 0,
            progress=tell,
        )
    return {name: code.CodeFunctions(prepared, name) for name in names}, compiled


@contextlib.contextmanager
def _teller(what: str, unit: str):
    """Yields a `ledger.Progress` for standard error: a bar a split, lines where no one watches."""
    told, bars = time.monotonic(), {}

    def tell(split: str, done: int, whole: int) -> None:
        nonlocal told
        if sys.stderr.isatty():
            if split not in bars:
                bars[split] = tqdm.tqdm(
                    desc=f'{what} {split}', total=whole, unit=f' {unit}', file=sys.stderr
                )
            bars[split].update(done - bars[split].n)
            if done >= whole:
                bars[split].close()
        elif time.monotonic() - told >= _EVERY:
            told = time.monotonic()
            print(f'{what} {split}: {done:,} of {whole:,} {unit}', file=sys.stderr, flush=True)

    try:
        yield tell
    finally:
        for bar in bars.values():
            bar.close()


def _compile(
    folder: str,
    cache: pathlib.Path,
    *,
    wait: bool,
    timeout: float = 600.0,
    workers: int = 2,
    compiler: str = 'auto',
    **options,
) -> tuple[pathlib.Path, dict]:
    """Compiles the C files of a folder once; returns (folder of the rows under `cache`, report).

    What changes the rows names their folder: the options, path, size and time of change of every C
    file and header, the compiler and the code that prepares. `workers` changes none. `wait`: leave
    it to another host, which has the same compiler, and poll until report.json is there.
    """
    from mmjax.recipes.contrabin.c_projects import build
    from mmjax.recipes.contrabin.c_projects import prepare as code_prepare

    root = pathlib.Path(folder).expanduser()
    if not root.is_dir():
        raise UserError(f'the folder of C code {root} is not a folder')
    files = sorted(path for path in root.rglob('*') if path.suffix in ('.c', '.h'))
    stamps = [[str(path.relative_to(root)), *file_stamp(path)] for path in files]
    by = [
        build.find_compiler(compiler).identity,
        prepare.source_digest(*COMPILED_BY),
    ]
    settings = json.dumps([code.VERSION, sorted(options.items()), stamps, by])
    made = cache / f'code-c-{hashlib.sha256(settings.encode()).hexdigest()[:16]}'
    report, beat = made / 'report.json', cache / f'.{made.name}.heartbeat'
    if wait:
        prepare.await_file(report, beat, f'{made}: the process that compiles it', timeout, beat)
    elif not report.is_file():
        cache.mkdir(parents=True, exist_ok=True)
        with _teller('compiling', 'files') as tell:

            def progress(split: str, done: int, whole: int) -> None:
                beat.touch()
                tell(split, done, whole)

            options |= {'workers': workers, 'compiler': compiler, 'progress': progress}
            try:
                code_prepare.prepare(root, made, **options)
            finally:
                beat.unlink(missing_ok=True)
    return made, json.loads(report.read_text())


def choose_tokenizers(config, assets, train: code.CodeFunctions):
    """Returns {text: tokenizer}: the run's own, the pretrained folders', or trained ones.

    Source and comment share the anchor's. Trained ones read functions, and listings, drawn by
    `data.seed`: a table often stands in the order of its projects.
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
        rows = train.one_each()
        rows = rows[code.sample(len(rows), _READ, spec.seed)]
        listings = code.sample(len(train), _READ, spec.seed)
        texts = {
            'anchor': (
                code.as_read(text, train.record(row)[text])
                for row in rows
                for text in ('source', 'comment')
            ),
            'binary': (train.record(row)['binary'] for row in listings),
        }
        found = {
            side: given[side]
            if side in given
            else tokenizers.train_tokenizer(
                texts[side],
                size,
                lower_case=False,
                pieces=spec.binary_pieces if side == 'binary' else 'text',
            )
            for side, size in sizes.items()
        }
    return {'source': found['anchor'], 'comment': found['anchor'], 'binary': found['binary']}


def save_tokenizers(folder, chosen) -> None:
    chosen['source'].save(folder)
    chosen['binary'].save(pathlib.Path(folder) / BINARY)
