"""ContraBin: embeddings of binary code, anchored by source code and comments, in a curriculum.

    python -m mmjax.main --config=configs/contrabin.py                             # built-in
    python -m mmjax.main --config=configs/contrabin.py --config.data.root=FOLDER   # your JSONL
    python -m mmjax.main --config=configs/contrabin.py --mode=prepare --config.data.c_files=FOLDER

Words after the colon:
  smoke      tiny stages, to see that everything works
  published  GraphCodeBERT's sizes and the original's three stages; name the weights with
             --config.model.pretrained.anchor=FOLDER and .binary=FOLDER (model.safetensors,
             config.json, and tokenizer.json or vocab.json with merges.txt)

Results with the state of the code that they are of, real C, floors, the original's names of
settings: docs/results/contrabin.md
"""

from mmjax.engine import config as config_lib
from mmjax.recipes.contrabin.config import Config


def get_config(argument: str = ''):
    words = config_lib.words(argument, ('smoke', 'published'))
    config = config_lib.default(Config)
    config.batch_size = 64  # binaries
    config.loss_weights = dict(anchor=0.0, source_binary=1.0, comment_binary=1.0, intermediate=1.0)
    # No function twice in a batch. Once random ones are told apart, functions of one file are put
    # into a batch together: what tells these apart is not learnt from random ones.
    config.sampler = dict(name='pk', by='identity', k=1)
    near = dict(name='neighbours', by='identity', near='path', k=8)
    config.optimizer.update(b2=0.98, weight_decay=1e-3, warmup_steps=50)
    config.stages = ('anchor', 'near', 'naive', 'linear', 'nonlinear')
    anchor = dict(
        learning_rates=dict(encoder=0.0, binary_head=0.0, linear=0.0, nonlinear=0.0),
        loss_weights=dict(anchor=1.0, source_binary=0.0, comment_binary=0.0, intermediate=0.0),
    )
    # An epoch of pk shows every binary, one of neighbours every function once. What random batches
    # teach goes on among neighbours: their rates do not fall.
    config.stage.anchor = dict(anchor, epochs=0.3, optimizer=dict(schedule='constant'))
    config.stage.near = dict(anchor, epochs=2.0, sampler=near)
    config.stage.naive = dict(
        epochs=0.25,
        optimizer=dict(schedule='constant'),
        learning_rates=dict(anchor=0.0, linear=0.0, nonlinear=0.0),
        options=dict(interpolation='naive', cache_anchor=True),
    )
    config.stage.linear = dict(
        epochs=2.0,
        sampler=near,
        learning_rates=dict(anchor=0.0, nonlinear=0.0),
        options=dict(interpolation='linear', cache_anchor=True),
    )
    config.stage.nonlinear = dict(
        epochs=1.0,
        sampler=near,
        learning_rates=dict(anchor=0.0, linear=0.0),
        options=dict(interpolation='nonlinear', cache_anchor=True),
    )
    config.best.update(metric='val/source_binary_mrr', mode='max')

    if 'published' in words:
        config.batch_size = 32
        config.data.update(max_source=512, max_comment=64, max_binary=512)
        config.evaluate.every_steps = 500
        for side in ('anchor', 'binary'):
            config.model[side].update(
                width=768, depth=12, heads=12, mlp_width=3072, dropout=0.1, position_offset=2
            )
        config.model.pooling = 'first'
        config.losses.update(temperature=0.1, softness=1.0, normalize=False)
        config.optimizer.update(b2=0.999, warmup_steps=500, span='run')
        config.stages = ('naive', 'linear', 'nonlinear')
        del config.stage.anchor, config.stage.near, config.stage.naive.optimizer
        del config.stage.linear.sampler, config.stage.nonlinear.sampler
        for name, epochs in (('naive', 10.0), ('linear', 5.0), ('nonlinear', 5.0)):
            config.stage[name].epochs = epochs
            config.stage[name].learning_rates.encoder = 0.01  # 1e-5
    if 'smoke' in words:  # after `published`: its sizes win
        config.quick_compile = True
        config.batch_size = 16
        config.evaluate_pool = 16
        config.data.update(
            max_source=64, max_comment=24, max_binary=48, vocabulary=400, binary_vocabulary=400
        )
        config.data.built_in.update(train=24, val=16, test=16)
        for side in ('anchor', 'binary'):
            config.model[side].update(width=16, depth=1, heads=2, mlp_width=32)
        config.model.features = 16
        config.optimizer.warmup_steps = 2
        config.stages = tuple(name for name in config.stages if name != 'near')
        if 'near' in config.stage:
            del config.stage.near
        for name in config.stages:
            config.stage[name].update(epochs=None, steps=4)
        config.checkpoint.every_steps = 5
        config.log.every_steps = 1
    return config.lock()
