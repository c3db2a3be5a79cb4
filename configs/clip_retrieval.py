"""CLIP for retrieval: an image or a text finds the images of the same item.

    python -m mmjax.main --config=configs/clip_retrieval.py            # v4, built-in items
    python -m mmjax.main --config=configs/clip_retrieval.py:v2,rn50 --config.data.root=FOLDER

Words after the colon:
  v1         InfoNCE, raw prompts, shuffled batches        v2  SupCon, PK batches
  v3         v2 continued at twice its rate: --init_from=RUN_OF_V2, or `staged` for both in one run
  v4         token-safe prompts, cosine schedule with warm-up (default)
  vit, rn50  the image tower (rn50; `smoke`: vit)          few  a shallow net for few items
  smoke      two tiny stages
  published  the original's sizes and settings, --config.model.pretrained=FOLDER; ours alone: v4's
             warm-up is a tenth of the run, images of one item are no negatives in v1

Results, versions compared, real products: docs/results/retrieval.md
"""

from mmjax.engine import config as config_lib
from mmjax.recipes.retrieval.config import Config

VERSIONS = ('v1', 'v2', 'v3', 'v4')
WORDS = ('vit', 'rn50', 'staged', 'few', 'smoke', 'published')


def get_config(argument: str = ''):
    words = config_lib.words(argument, (*VERSIONS, *WORDS))
    version = config_lib.one_of(words, VERSIONS, 'v4')
    vision = config_lib.one_of(words, ('vit', 'rn50'), 'vit' if 'smoke' in words else 'rn50')
    config = config_lib.default(Config)
    config.batch_size = 64
    config.model.vision = vision
    config.loss_weights = dict(supcon=1.0)
    config.sampler = dict(name='pk', by='identity', k=4)
    config.optimizer.update(learning_rate=1.5e-3, weight_decay=0.01, clip=5.0, schedule='constant')
    config.best.update(metric='val/map', mode='max')
    config.evaluate.every_epochs = 5.0
    epochs = 30.0
    v3_rate = 3e-3
    if version != 'v4':
        config.data.prompt_policy = 'raw'
    if version == 'v1':
        config.loss_weights = dict(infonce=1.0)
        config.sampler = dict(name='shuffle')

    if 'few' in words:
        config.model.rn50.update(stage_sizes=(1,), share=0.3)
        config.data.augmentation.update(
            min_area=0.6, ratio=1.2, brightness=0.1, contrast=0.1, saturation=0.1, tint=0.05
        )
        config.losses.temperature = 0.05 if version == 'v4' else 0.07
        config.optimizer.learning_rate = 3e-3
        v3_rate = 6e-3
        config.best.metric = ''  # val shows images of items that are learnt from
        epochs = 12.0
    if 'smoke' in words:
        config.quick_compile = True
        config.batch_size = 16
        config.data.image_size = 32
        config.data.built_in = dict(
            train_items=12, val_items=4, test_items=4, shots=4, query_shots=1, gallery_shots=2
        )
        config.model.rn50.update(stage_sizes=(1,), width=8, heads=4)
        config.model.vit.update(width=32, depth=2, heads=2, mlp_width=64)
        config.model.text.update(width=32, depth=1, heads=2, mlp_width=64)
        config.model.features = 32
        config.checkpoint.every_steps = 5
        config.log.every_steps = 1
        epochs = 1.0
    if 'published' in words:
        config.batch_size = 32
        if version != 'v1':
            config.sampler.k = 2
        config.data.update(image_size=224, vocabulary=49408, noun='clothing item')
        config.data.augmentation.update(
            min_area=1.0,
            ratio=1.0,
            mirror=0.0,
            brightness=0.0,
            contrast=0.0,
            saturation=0.0,
            tint=0.0,
        )
        config.model.features = 1024 if vision == 'rn50' else 512
        config.model.vit.update(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072)
        config.model.rn50.update(stage_sizes=(3, 4, 6, 3), width=64, heads=32, pooling='attention')
        config.model.text.update(width=512, depth=12, heads=8, mlp_width=2048)
        config.optimizer.learning_rate = 5e-5
        v3_rate = 1e-4
        config.losses.temperature = 0.05 if version == 'v4' and vision == 'vit' else 0.07
        config.evaluate.every_epochs = 1.0
        epochs = {'v1': 10.0, 'v2': 20.0, 'v3': 20.0, 'v4': 50.0}[version]
        config.best.update(metric='val/final_loss', mode='min')
        patience = 10 if version == 'v4' else 3
        config.early_stop.update(metric='val/final_loss', patience=patience)

    fixed = dict(temperature=0.0)  # learning rates: the temperature stays
    config.stages = ('tune',)
    config.stage.tune = dict(epochs=epochs, learning_rates=fixed)
    if version == 'v3':
        config.stage.tune.optimizer = dict(learning_rate=v3_rate)
        if not words & {'smoke', 'staged'}:
            config.needs_init_from = 'RUN_OF_V2'
    if version == 'v4':
        config.optimizer.update(schedule='cosine', span='run', warmup_fraction=0.1)
    if 'smoke' in words or 'staged' in words:
        config.stages = ('first', 'tune')
        config.stage.first = dict(epochs=epochs, learning_rates=fixed)
    return config.lock()
