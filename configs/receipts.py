"""Receipts: how many an image shows, and answers in words, by a vision-language model in stages.

    python -m mmjax.main --config=configs/receipts.py                             # built-in
    python -m mmjax.main --config=configs/receipts.py --config.data.root=FOLDER   # your own
    python -m mmjax.main --config=configs/receipts.py --mode=predict --input=IMAGE \\
        --question="How many receipts do you see?"

Words after the colon:
  smoke      two tiny stages, to see that everything works
  published  InternVL2.5-1B's sizes, the original's settings (ours alone: 4 beams, a decoder that
             sees the image); --config.model.pretrained.language=FOLDER

Results with the state of the code that they are of, real receipts, where the tower's weights come
from: docs/results/receipts.md
"""

from mmjax.engine import config as config_lib
from mmjax.recipes.receipts.config import Config


def get_config(argument: str = ''):
    words = config_lib.words(argument, ('smoke', 'published'))
    config = config_lib.default(Config)
    config.loss_weights = dict(classification=1.0, language=1.0)
    config.sampler = dict(name='bucketed', by='length')
    config.optimizer.update(weight_decay=1e-4, span='run', end=0.1, warmup_steps=100)
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
    config.best.metric = 'val/final_loss'

    if 'published' in words:
        config.batch_size = 16  # questions
        config.data.update(image_size=448, built_in_side=448, built_in_max_receipts=5)
        config.model.update(shuffle=2, thaw_blocks=4, remat=True)
        config.model.vision.update(
            patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096, stem='patch'
        )
        config.model.language.update(
            width=896, depth=24, heads=14, kv_heads=2, mlp_width=4864, theta=1e6, tied=False
        )
        config.optimizer.update(learning_rate=2e-5, warmup_steps=500)
        config.decode.running.method = 'sample'
        config.data.augmentation.update(shift=0.0, scale=0.0, brightness=0.0, contrast=0.0)
        config.evaluate.every_epochs = 1.0
        config.early_stop.update(metric='val/final_loss', patience=5, min_delta=0.01, scope='run')
        config.stages = ('heads', 'top', 'all')
        for name in config.stages:
            config.stage[name].epochs = 5.0
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
