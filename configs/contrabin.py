"""ContraBin: embeddings of binary code, anchored by source and comments, in a curriculum.

    python -m mmjax.main --config=configs/contrabin.py                             # built-in
    python -m mmjax.main --config=configs/contrabin.py --config.data.root=FOLDER   # your JSONL
    python -m mmjax.main --config=configs/contrabin.py --mode=prepare --config.data.c_files=FOLDER

Words after the colon: `smoke`, `published` (GraphCodeBERT's sizes and the original's stages; name
its weights with --config.model.pretrained.anchor=FOLDER and .binary=FOLDER: model.safetensors,
config.json, and tokenizer.json or vocab.json with merges.txt). By default an anchor is trained
first, stages are short and one rate serves all groups; naive 10, linear 5 and nonlinear 5 epochs at
1e-5 and 1e-3 are those of `published`. The original's names: its encoder rate is the group
`encoder`, max_grad_norm `optimizer.clip`, save_every_n_steps `checkpoint.every_steps`, mixed
precision `precision`, accumulation `accumulation`.

Measured on the built-in functions (12,000, 1,348 updates, 9 min 15 s on 2 CPU cores of an AVX2
machine, data and compilation included): source→binary R@1 .816 among 256 unseen functions, R@10
.996, comment→binary R@1 .824, chance .004; O0→O2 mAP .921. On val .836, 1, .875 and .921. Seeds 1
and 2, on one core each: source→binary R@1 .816 and .824, comment→binary .816 and .816.

What the interpolations add, in stages of 3 and 2 epochs (`benchmarks/code_curriculum.py
--config.stage.linear.epochs=3. --config.stage.nonlinear.epochs=2.`: as many updates from one
anchor, seeds 0 to 2, on one core each): nothing that shows. Source→binary R@1 on test is .814 ±
.030 of naive stages alone, .820 ± .010 with the linear one, .816 ± .010 with the linear, then the
nonlinear one; comment→binary .842, .840, .837; O0→O2 mAP .930, .926, .927. By seed the last has
.820, .824, .805.

Floors of `benchmarks/code_floors.py` for source→binary R@1 among functions that share a plan:
length .004, bag of tokens .062; linear models of bags, fitted on as many functions, .469, scaled
.438, whitened .570. Where listings name registers instead of telling their kind: .004, .148, .309,
.371, .543.

Real C: 17 packages of Debian 12 (bzip2, cjson, expat, giflib, jansson, libjpeg-turbo, libpng1.6,
libsodium, libtommath, libyaml, libzstd, lua5.4, lz4, mbedtls, tre, xz-utils, zlib), unpacked, three
of them configured: 2,969 functions, gcc 12 at four levels. Trained from scratch on 2,182 of them,
17 min 45 s with compiling: in pools of 256 functions of two projects that training has not seen,
almost all Lua's, source→binary R@10 .090 and comment→binary .059 (chance .039).

    --config.data.c_files=FOLDER --config.data.seed=7 --config.data.max_source=192
    --config.data.max_binary=192 --config.stage.anchor.epochs=2. --config.stage.near.epochs=6.
    --config.stage.naive.epochs=2. --config.stage.linear.epochs=6.
    --config.stage.nonlinear.epochs=4. --config.optimizer.learning_rate=2e-3
    --config.optimizer.b2=0.999
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
        config.data.update(max_source=512, max_comment=128, max_binary=512)
        for side in ('anchor', 'binary'):
            config.model[side].update(
                width=768, depth=12, heads=12, mlp_width=3072, dropout=0.1, position_offset=2
            )
        config.model.pooling = 'first'
        config.losses.update(softness=1.0, normalize=False)
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
