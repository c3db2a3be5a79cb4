"""Published encoders in the ContraBin recipe: their folder decides sizes, positions and tokens."""

import shutil

import jax
import numpy as np
import pytest

from mmjax.engine import build
from mmjax.errors import UserError
from mmjax.models.bert import Bert
from mmjax.pretrained import bert
from tests.pretrained.test_roberta import CONFIG as ROBERTA
from tests.pretrained.test_roberta import _tensors as _roberta_tensors
from tests.pretrained.test_towers import BERT, _bert_tensors, _write
from tests.recipes.contrabin.test_modes import first_batch, tiny, write_functions

WORDS = (
    '<s>',
    '<pad>',
    '</s>',
    '<unk>',
    'int',
    'return',
    'x',
    '+',
    '(',
    ')',
    '{',
    '}',
    ';',
    'mov',
    'add',
    'ret',
    'eax',
    'edi',
    ',',
    'Adds',
    '.',
)
ROOM = dict(data__max_source=9, data__max_comment=9, data__max_binary=9)  # 11 − 2, and 9


def write_tokenizer(folder, words=WORDS):
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    model = Tokenizer(models.WordLevel({w: n for n, w in enumerate(words)}, unk_token='<unk>'))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    model.post_processor = processors.TemplateProcessing(
        single='<s> $A </s>', special_tokens=[('<s>', 0), ('</s>', 2)]
    )
    model.save(str(folder / 'tokenizer.json'))
    return str(folder)


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """Returns {'roberta', 'bert': a folder of random weights}."""
    root = tmp_path_factory.mktemp('weights')
    made = {'roberta': (_roberta_tensors(), ROBERTA), 'bert': (_bert_tensors(), BERT)}
    return {
        name: write_tokenizer(_write(root / name, tensors.tensors, config))
        for name, (tensors, config) in made.items()
    }


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    root = write_functions(tmp_path_factory.mktemp('rows'))
    return dict(ROOM, cache=tmp_path_factory.mktemp('cache'), data__root=root)


def built(data, anchor=None, binary=None, **changes):
    config = tiny(**{**data, **changes})
    for side, folder in (('anchor', anchor), ('binary', binary)):
        config.model.pretrained[side] = folder
        # Of RoBERTa, as `published` has it: what a folder says nothing of must not come from here.
        config.model[side].position_offset = 2
    return build.run(config)


@pytest.mark.parametrize('turned', [False, True])
def test_each_side_reads_its_folder_as_it_was_published(data, folders, turned):
    names = ('bert', 'roberta')[:: -1 if turned else 1]
    sides = {side: folders[name] for side, name in zip(('anchor', 'binary'), names, strict=True)}
    run = built(data, **sides, model__pooling='first')
    task, train = run.task, run.task.splits['train']
    batch = first_batch(run, run.stages[1])
    with jax.set_mesh(run.mesh):
        variables = run.init_variables()
        apply = jax.jit(
            lambda variables, text, tokens, mask: task.model.apply(
                variables, tokens, mask, text, False, method='encode'
            ),
            static_argnums=1,
        )
        for text in ('source' if turned else 'comment', 'binary'):
            folder = sides['binary' if text == 'binary' else 'anchor']
            row = int(np.flatnonzero(batch['has_comment'])[0])
            tokens, mask = batch[text][row : row + 1], batch[f'{text}_mask'][row : row + 1]
            assert tokens[0, 0] == WORDS.index('<s>') and mask.sum() > 3
            own = task.tokenizers[text].encode([train.record(batch['row'][row])[text]], 9)
            np.testing.assert_array_equal(own[0], tokens)
            encoder = Bert(**bert.fields(folder), dropout=0.0)
            alone = jax.jit(
                lambda params, *x, e=encoder: e.apply({'params': params}, *x, train=False)
            )
            states = alone(bert.load(folder)[0], tokens, mask)
            found = apply(variables, text, tokens, mask)
            np.testing.assert_allclose(found[0], states[0, 0], atol=1e-5)
    offsets = {side: getattr(task.model, side).position_offset for side in sides}
    assert offsets == {'anchor': 2 * turned, 'binary': 2 * (not turned)}


def test_weights_on_one_side_leave_the_other_as_the_config_says(data, folders):
    run = built(data, anchor=folders['roberta'])
    anchor, binary = run.task.model.anchor, run.task.model.binary
    assert (anchor.width, anchor.depth, anchor.max_length) == (12, 2, 11)
    assert (binary.width, binary.depth, binary.max_length) == (16, 1, 9 + 2)
    assert run.task.tokenizers['source'].size == len(WORDS) < run.task.tokenizers['binary'].size


def test_what_does_not_fit_the_folder_is_told_in_one_sentence(data, folders, tmp_path):
    with pytest.raises(UserError, match=r'has room for 9 tokens, data\.max_\* need 10'):
        built(data, anchor=folders['roberta'], data__max_comment=10)
    with pytest.raises(UserError, match=r'has room for 9 tokens, data\.max_\* need 10'):
        built(data, binary=folders['bert'], data__max_binary=10)
    larger = tmp_path / 'larger'
    shutil.copytree(folders['bert'], larger)
    write_tokenizer(larger, (*WORDS, *map(str, range(10))))
    with pytest.raises(UserError, match=r'larger: the encoder has vocabulary 30, the tokenizer 31'):
        built(data, binary=str(larger))
    (larger / 'tokenizer.json').unlink()
    with pytest.raises(UserError, match=r'larger/tokenizer\.json does not exist'):
        built(data, binary=str(larger))
