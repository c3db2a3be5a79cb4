"""Receipts: how many an image shows, and answers in words, by a vision-language model in stages.

    python -m mmjax.main --config=configs/receipts.py                             # built-in
    python -m mmjax.main --config=configs/receipts.py --config.data.root=FOLDER   # your own
    python -m mmjax.main --config=configs/receipts.py --mode=predict --input=IMAGE \\
        --question="How many receipts do you see?"

Words after the colon:
  smoke      two tiny stages, to see that everything works
  published  InternVL2.5-1B's sizes, three stages; --config.model.pretrained.language=FOLDER

Result: counting accuracy .993, BLEU-4 .883 on built-in receipts (question only: .365, .433).
Real receipts, where the tower's weights come from: docs/results/receipts.md
"""

from ml_collections import config_dict

from mmjax.engine import config as mmjax_config


def get_config(argument: str = ''):
    words = mmjax_config.words(argument, ('smoke', 'published'))
    config = mmjax_config.default()
    config.task = 'receipts'
    config.batch_size = 32  # questions

    config.data.image_size = 112  # side of a picture, pixels
    config.data.classes = 3  # 0, 1, 2+: the last takes all above
    config.data.buckets = (16, 32, 48)  # tokens that questions and answers are padded to
    config.data.vocabulary = 512  # of the tokenizer trained on questions and answers
    config.data.max_fault_share = 0.01
    config.data.max_pixels = 50_000_000
    config.data.augmentation = dict(shift=0.04, scale=0.06, brightness=0.1, contrast=0.1)
    config.data.built_in = dict(train=6000, val=300, test=600)  # pictures, three questions each
    config.data.built_in_side = 112

    config.model = dict(
        vision=dict(
            patch_size=16,
            width=128,
            depth=4,
            heads=4,
            mlp_width=256,
            norm='layer',
            layer_scale=0.1,
            stem='convolutions',
            dropout=0.0,
        ),
        shuffle=1,  # so many picture tokens, squared, become one of the decoder's
        language=dict(
            width=128,
            depth=2,
            heads=4,
            kv_heads=2,
            mlp_width=256,
            theta=1e4,
            qkv_bias=True,
            tied=True,
            dropout=0.0,
            epsilon=1e-6,
        ),
        cross_attention=dict(heads=8, dropout=0.1),
        thaw_blocks=1,  # last blocks of the tower that the second stage thaws
        attention='auto',  # xla | cudnn | auto
        remat=False,  # blocks are computed again in the backward pass: slower, in less memory
        pretrained=dict(language=config_dict.placeholder(str)),
    )
    config.losses = dict(smoothing=0.0)  # of the classes
    config.loss_weights = dict(classification=1.0, language=1.0)
    decode = dict(beams=1, length_penalty=1.0, temperature=0.7, top_k=50, top_p=0.9)
    config.decode = dict(
        running=dict(decode, method='greedy'),  # in evaluations while training
        final=dict(decode, method='beam', beams=4),
    )

    config.sampler = dict(name='bucketed', by='length')
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.span = 'run'
    config.optimizer.end = 0.1
    config.optimizer.warmup_steps = 100
    config.stages = ('scratch', 'heads', 'top', 'all')
    config.stage.scratch = dict(epochs=1.75)
    config.stage.heads = dict(
        epochs=0.25, learning_rates=dict(vision=0.0, vision_top=0.0, language=0.1)
    )
    config.stage.top = dict(
        epochs=0.25, learning_rates=dict(vision=0.0, vision_top=0.01, language=0.1)
    )
    config.stage.all = dict(
        epochs=0.5, learning_rates=dict(vision=0.1, vision_top=0.1, language=0.1)
    )
    config.best = dict(metric='val/loss', mode='min')

    if 'published' in words:
        config.batch_size = 16
        config.precision = 'bfloat16'
        config.data.update(image_size=448, built_in_side=448)
        config.model.shuffle = 2
        config.model.vision.update(
            patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096, stem='patch'
        )
        config.model.language.update(
            width=896, depth=24, heads=14, kv_heads=2, mlp_width=4864, theta=1e6, tied=False
        )
        config.model.update(thaw_blocks=4, remat=True)
        config.optimizer.learning_rate = 2e-5
        config.evaluate.every_epochs = 0.5  # more often in a stage than the patience
        config.stages = ('heads', 'top', 'all')
        for name in config.stages:
            config.stage[name].epochs = 5.0
            config.stage[name].early_stop = dict(
                metric='val/loss', mode='min', patience=5, min_delta=0.01
            )
    if 'smoke' in words:
        config.quick_compile = True
        config.batch_size = 8
        config.data.update(image_size=32, built_in_side=32, buckets=(24,))
        config.data.built_in = dict(train=16, val=8, test=8)
        config.model.thaw_blocks = 1
        config.model.vision.update(patch_size=8, width=16, depth=2, heads=2, mlp_width=32)
        config.model.language.update(width=16, depth=1, heads=2, kv_heads=1, mlp_width=32)
        config.optimizer.warmup_steps = 2
        config.stages = ('top', 'all')
        for name in config.stages:
            del config.stage[name].epochs
            config.stage[name].steps = 4
        config.checkpoint.every_steps = 3
        config.log.every_steps = 1
    return config.lock()
