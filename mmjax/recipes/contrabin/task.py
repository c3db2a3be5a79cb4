"""ContraBin: embeddings of binary code, anchored by source and comment, in a curriculum."""

import dataclasses
import functools
import os
import pathlib
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from mmjax.data import prepare, tokenizers
from mmjax.data.faults import Progress
from mmjax.engine import stages
from mmjax.engine.outputs import EmbeddingWriter, write_prediction
from mmjax.engine.task import Cached, Task, gather, join_padded, tower_output
from mmjax.errors import UserError
from mmjax.evals import gallery
from mmjax.losses import contrastive, interpolation
from mmjax.losses.term import Term
from mmjax.pretrained import bert as bert_weights
from mmjax.pretrained import files
from mmjax.recipes.contrabin import data as code
from mmjax.recipes.contrabin.config import Config
from mmjax.recipes.contrabin.model import ENCODERS, TOWERS, build
from mmjax.recipes.contrabin.scores import VERDICTS, CodeScores

PRIMARY = ('source_binary', 'comment_binary')  # losses that every stage of the curriculum has
EVALUATION = dict.fromkeys(TOWERS, False)
SUFFIXES = {'.c': 'source', '.h': 'source', '.s': 'binary', '.asm': 'binary', '.ll': 'binary'}
BINARY = 'binary'  # folder, in a run's, of the tokenizer of listings
TOKENIZER_ROWS = 5_000  # training functions, or listings, that a tokenizer is trained on
PROGRESS_SECONDS = 5.0  # between two lines of progress


class ContraBinTask(Task):
    """The task of `configs/contrabin.py`.

    Groups of parameters: `anchor` (the encoder of source and comment) and `heads` (theirs),
    `encoder` and `binary_head` (of binaries), and the two interpolations `linear` and `nonlinear`.
    A stage's option `interpolation` says which acts.

    Losses: `anchor` (InfoNCE of source and comment), `source_binary` and `comment_binary` (the
    primary ones), `intermediate` (the interpolation against the binary; none in a naive stage).

    With weights in `model.pretrained.anchor`, a stage `anchor` before the others trains these on;
    `--config.stages="('naive','linear','nonlinear')"` leaves them as they are.
    """

    Config = Config
    verdicts = VERDICTS
    towers = {name: f'{name}/.*' for name in TOWERS}

    def __init__(self, config: Config, assets: epath.Path | None = None):
        splits, self.compiled = open_splits(config)
        self.tokenizers = choose_tokenizers(config, assets, splits['train'])
        self.lengths = {text: getattr(config.data, f'max_{text}') for text in code.TEXTS}
        self.splits = {
            name: split.with_tokens(self.tokenizers, self.lengths) for name, split in splits.items()
        }
        # Over several devices packed tokens would be computed by each, all of them.
        pack = config.model.pack and jax.device_count() == 1
        rows = config.batch_size // config.accumulation
        self.packed_lengths = self.splits['train'].packed_lengths(rows) if pack else {}
        self.model = build(config, {text: t.size for text, t in self.tokenizers.items()})
        self.config = config
        final = stages.final_weights(config)
        self.weights = {name: weight for name, weight in final.items() if name in PRIMARY}

    def dataset(self, split):
        return self.splits[split]

    def rules(self):
        return (
            ('anchor', 'anchor/.*'),
            ('heads', '(source|comment)_head/.*'),
            # Groups apart: what gets no gradient in a stage must not age Adam's count of the rest.
            ('encoder', 'binary/.*'),
            ('binary_head', 'binary_head/.*'),
            ('linear', 'interpolation_linear/.*'),
            ('nonlinear', 'interpolation_nonlinear/.*'),
        )

    def save_assets(self, workdir):
        self.tokenizers['source'].save(workdir)
        self.tokenizers['binary'].save(pathlib.Path(workdir) / BINARY)

    # Model -----------------------------------------------------------------------------------

    def init(self, key, batch):
        inputs = [batch[name] for text in code.TEXTS for name in (text, f'{text}_mask')]
        return self.model.init({'params': key, 'dropout': key}, *inputs)

    def pretrained(self, variables):
        sides = dataclasses.asdict(self.config.model.pretrained)
        folders = {side: folder for side, folder in sides.items() if folder}
        params = dict(variables['params'])
        for side, folder in folders.items():
            loaded, _ = bert_weights.load(folder)
            params[side] = files.graft(params[side], loaded, folder)
        return {**variables, 'params': params} if folders else variables

    def forward(self, variables, batch, stage, *, train, key):
        losses = set(stage.losses)
        embed = functools.partial(self._embed, variables, batch, train, key)
        outputs = {text: embed(text) for text in ('source', 'comment')}
        if key is None or losses - {'anchor'}:
            outputs['binary'] = embed('binary')
        kind = stage.options.interpolation
        if kind != 'naive' and 'intermediate' in losses:
            inputs = outputs['source'], outputs['comment'], kind, train[f'interpolation_{kind}']
            outputs['interpolated'], weight = self._apply(variables, key, 'interpolated', *inputs)
            # Per row, so that mean and spread over rows and coordinates follow from them.
            outputs |= {'lambda': weight.mean(-1), 'lambda_variance': weight.var(-1)}
        return outputs, {}

    def _embed(self, variables, batch, train, key, text):
        trains = train[ENCODERS[text]]
        if f'cached_{text}' in batch and not trains:
            hidden = batch[f'cached_{text}']
        else:
            hidden = self._encode(variables, batch, trains, key, text)
        return self._apply(variables, key, 'project', hidden, text, train[f'{text}_head'])

    def _encode(self, variables, batch, trains, key, text):
        inputs = batch[text], batch[f'{text}_mask'], text, trains, self.packed_lengths.get(text)
        return tower_output(self._apply(variables, key, 'encode', *inputs), trains)

    def _apply(self, variables, key, method, *inputs):
        rngs = None if key is None else {'dropout': key}
        return self.model.apply(variables, *inputs, method=method, rngs=rngs)

    def cache(self, stage, train):
        if train['anchor'] or not stage.options.cache_anchor:
            return None
        functions = self.splits['train']
        rows, positions = functions.pairs()
        return Cached('encode_anchor', functions.subset(rows), positions)

    def encode_anchor(self, variables, batch):
        """Runs the anchor on source and comment: float32 [batch, width] each."""
        texts = [text for text, encoder in ENCODERS.items() if encoder == 'anchor']
        return {text: self._encode(variables, batch, False, None, text) for text in texts}

    def terms(self, variables, outputs, batch, stage):
        mask = batch['mask']
        both = mask & batch['has_comment']
        comment_id = batch['comment_id']
        losses = self.config.losses
        options = {'temperature': losses.temperature, 'chunk': losses.chunk}
        primary = functools.partial(
            interpolation.primary,
            softness=losses.softness,
            normalize=losses.normalize,
            **options,
        )
        # Functions of one comment are no wrong answers to it; of one source there is one per batch.
        source, comment = outputs['source'], outputs['comment']
        terms = {'anchor': contrastive.infonce(source, comment, both, labels=comment_id, **options)}
        if 'binary' in outputs:
            binary = outputs['binary']
            terms['source_binary'] = primary(source, binary, mask)
            terms['comment_binary'] = primary(comment, binary, both, labels=comment_id)
            terms['intermediate'] = Term(jnp.float32(0), jnp.float32(0))
        if 'interpolated' in outputs:
            mixed = outputs['interpolated']
            terms['intermediate'] = contrastive.infonce(mixed, binary, both, **options)
            terms |= _lambda_statistics(outputs['lambda'], outputs['lambda_variance'], both)
        return terms

    # Evaluation ------------------------------------------------------------------------------

    def encode(self, variables, batch):
        """Embeds all three texts: {text: float32 [batch, features]}, see `embed_text`."""
        return {text: self.embed_text(text, variables, batch) for text in code.TEXTS}

    def embed_binary(self, variables, batch):
        """Embeds binaries only, as `encode` does: float32 [batch, features]."""
        return self.embed_text('binary', variables, batch)

    def embed_text(self, text, variables, batch):
        """Embeds one of 'source', 'comment', 'binary': float32 [batch, features].

        They have length 1 where the losses normalize.
        """
        x = self._embed(variables, batch, EVALUATION, None, text)
        if self.config.losses.normalize:
            x = x / jnp.maximum(jnp.linalg.norm(x, axis=-1, keepdims=True), 1e-9)
        return x

    def evaluators(self):
        train = self.splits['train']
        options = (
            self.weights,
            self.config.batch_size,
            self.config.evaluate_pool,
            self.config.losses.normalize,
        )
        return {
            name: CodeScores(functions, train, *options)
            for name, functions in self.splits.items()
            if name != 'train'
        }

    def predict(self, predict, inputs, output, question=None):
        """Names the ten functions nearest to a listing, a C file (by its suffix) or a sentence.

        inputs: a file; or a sentence, which names no file: with white space in it, or without the
        suffix of code or of a text.
        """
        kind, text = _read_query(inputs)
        tokens, mask = self.tokenizers[kind].encode([code.as_read(kind, text)], self.lengths[kind])
        embed = jax.jit(functools.partial(self.embed_text, kind))
        query = np.asarray(embed(predict.variables, {kind: tokens, f'{kind}_mask': mask}))
        split = self.splits.get('test', self.splits['val'])
        functions = split.subset(split.one_each())
        other = 'source' if kind == 'binary' else 'binary'
        embeddings, _ = gather(predict, 'encode', functions, self.config.batch_size)
        (cosines,), (rows,) = gallery.search(query, embeddings[other], 10)
        nearest = []
        lines = [f'nearest to this {kind}, by {other}, in split {split.split}:']
        for row, cosine in zip(rows.tolist(), cosines.tolist(), strict=True):
            record = functions.record(row)
            entry = {key: record[key] for key in ('name', 'path', 'comment')}
            nearest.append({**entry, 'cosine': cosine})
            comment = ' '.join(record['comment'].split())
            lines.append(f'{len(nearest):2d}  {cosine:.3f}  {record["name"]}  {comment:.70}')
        write_prediction(output, 'nearest', {'query': inputs, 'nearest': nearest})
        return '\n'.join(lines)

    def embed(self, predict, output):
        """Writes embeddings of binaries, and embeddings.npz with those of all three texts."""
        parts = []
        keys = ('opt_level', 'name', 'path', 'label')
        with EmbeddingWriter(output, sum(map(len, self.splits.values()))) as writer:
            for name, split in self.splits.items():
                outputs, _ = gather(predict, 'encode', split, self.config.batch_size)
                records = map(split.record, range(len(split)))
                entries = [{'split': name, **{k: record[k] for k in keys}} for record in records]
                writer.add(outputs['binary'], entries)
                parts.append(outputs)
        path = epath.Path(output) / 'embeddings.npz'
        with path.open('wb') as file:
            np.savez(file, **jax.tree.map(join_padded, *parts))
        return f'{writer.rows} binaries with source and comment: {path}'

    def prepare(self, output):
        """Copies the rows compiled from data.c_files, if any, and their report."""
        if not self.compiled:
            return ''
        folder, table = self.compiled
        output.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            (output / path.name).write_bytes(path.read_bytes())
        return f'{table}\n\nwritten: {output}'


def _lambda_statistics(means, variances, mask):
    """Returns mean and standard deviation of λ over the rows of `mask` and their coordinates.

    means, variances: float32 [batch], of a row's λ over its coordinates.
    """
    means, variances = jax.lax.stop_gradient((means, variances))
    count = jnp.maximum(mask.sum(), 1)
    mean = jnp.where(mask, means, 0).sum() / count
    square = jnp.where(mask, variances + (means - mean) ** 2, 0).sum() / count
    return {'lambda_mean': mean, 'lambda_spread': jnp.sqrt(square)}


def _read_query(inputs: str) -> tuple[str, str]:
    """Returns (which of source, comment and binary, the text) of `--input`."""
    suffix = pathlib.Path(inputs).suffix.lower()
    kind = SUFFIXES.get(suffix, 'comment')
    text = inputs
    if os.path.isfile(inputs):  # Path.is_file raises where a sentence is too long for a name
        try:
            text = pathlib.Path(inputs).read_text('utf-8', errors='replace')
        except OSError as error:
            raise UserError(f'{inputs} cannot be read: {error.strerror}') from error
    elif any(map(str.isspace, inputs)):
        kind = 'comment'
    elif suffix in (*SUFFIXES, '.txt'):
        raise UserError(f'{inputs} does not exist')
    if not text.strip():
        raise UserError(f"--input='{inputs}' holds no text")
    return kind, text


# Data -----------------------------------------------------------------------------------------


def open_splits(
    config: Config,
) -> tuple[dict[str, code.CodeFunctions], tuple[pathlib.Path, str] | None]:
    """Prepares the functions and opens every split.

    Returns:
      ({split: functions}, (folder, report) of the rows compiled from data.c_files or None).
    """
    spec = config.data
    cache = prepare.cache_dir(spec.cache)
    wait = jax.process_index() > 0
    root = spec.root
    compiled = None
    available = code.SPLITS
    if spec.c_files:
        from mmjax.recipes.contrabin.c_projects import prepare as c_projects

        options = {'seed': spec.seed, 'wait': wait, **dataclasses.asdict(spec.compile)}
        progress = progress_lines('compiling', 'files')
        root, report = c_projects.compile_once(spec.c_files, cache, progress=progress, **options)
        compiled = root, c_projects.table(report)
        available = report['rows']
        for name in ('train', 'val'):
            if name not in available:
                raise UserError(
                    f'{spec.c_files}: split {name} has no row; see data.compile.val and .test'
                )
    elif root:
        available = code.split_files(root)
    names = tuple(name for name in code.SPLITS if name != 'test' or name in available)
    prepared = code.prepare_code(
        root,
        cache,
        splits=names,
        seed=spec.seed,
        synthetic_sizes=dataclasses.asdict(spec.built_in),
        registers=spec.compile.registers,
        max_fault_share=spec.max_fault_share,
        wait=wait,
        progress=progress_lines('preparing', 'rows'),
    )
    return {name: code.CodeFunctions(prepared, name) for name in names}, compiled


def progress_lines(action: str, unit: str) -> Progress:
    """Returns what prints a line of progress to standard error every few seconds."""
    last = time.monotonic()

    def progress(split: str, done: int, total: int) -> None:
        nonlocal last
        if time.monotonic() - last >= PROGRESS_SECONDS:
            last = time.monotonic()
            print(f'{action} {split}: {done:,} of {total:,} {unit}', file=sys.stderr, flush=True)

    return progress


def choose_tokenizers(
    config: Config, assets: epath.Path | None, train: code.CodeFunctions
) -> dict[str, tokenizers.Tokenizer]:
    """Returns {text: tokenizer}: the run's own, those of the pretrained folders, or trained ones.

    Source and comment share the anchor's. Trained ones read functions, and listings, drawn by
    `data.seed`: a table is often in the order of its projects.
    """
    spec = config.data
    folders = dataclasses.asdict(config.model.pretrained)
    if assets is not None:
        folders = {'anchor': assets, 'binary': pathlib.Path(assets) / BINARY}
    chosen = {side: tokenizers.load_tokenizer(path) for side, path in folders.items() if path}
    make = functools.partial(tokenizers.train_tokenizer, lower_case=False)
    if 'anchor' not in chosen:
        rows = train.one_each()
        drawn = rows[code.sample(len(rows), TOKENIZER_ROWS, spec.seed)]
        pairs = ((text, train.record(row)) for row in drawn for text in ('source', 'comment'))
        texts = (code.as_read(text, record[text]) for text, record in pairs)
        chosen['anchor'] = make(texts, spec.vocabulary)
    if 'binary' not in chosen:
        rows = code.sample(len(train), TOKENIZER_ROWS, spec.seed)
        listings = (train.record(row)['binary'] for row in rows)
        chosen['binary'] = make(listings, spec.binary_vocabulary, pieces=spec.binary_pieces)
    return {text: chosen[encoder] for text, encoder in ENCODERS.items()}
