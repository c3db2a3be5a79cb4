"""CLIP fine-tuned for retrieval: a query picture finds other pictures of the same item.

    python -m mmjax.main --config=configs/clip_retrieval.py                  # v4, built-in items
    python -m mmjax.main --config=configs/clip_retrieval.py:v2,rn50 --config.data.root=FOLDER

Versions: `v1` InfoNCE, raw prompts, shuffled batches, constant rate; `v2` SupCon over pictures and
texts, PK batches; `v3` goes on from v2's best with twice the rate (`--init_from=RUN_OF_V2`; or
`v3,staged`: both stages in one run); `v4` (default) token-safe prompts, cosine with warm-up.
Towers: `vit` or `rn50` (default; `smoke`: `vit`). `few`: a shallow net of colours and textures,
for few items and no weights.
`published` takes ViT-B/16 or RN50 at 224 px, to be given weights with
--config.model.pretrained=FOLDER; `smoke` shows that all works.

Small models start from scratch with T = .1 in all versions (`published` and `few`: .07, v4 .05).
They pool a colour histogram and statistics of all maps (`models/statistics.py`).

Built-in items, default (1,800 updates, 9 min on 2 CPU cores, drawing included), 60 unseen items:
Rank-1 .833, Rank-5 .967, mAP .776, mINP .611, text→image R@1 .267; chance .017. Floors of
`benchmarks/retrieval_floors.py`, Rank-1: pixels .133, colour histogram .075, gradients .233.

Versions at equal numbers of pictures, 19,200 (`benchmarks/retrieval_versions.py --steps=300`), mAP
of three seeds with items of their own: v1 .495 .460 .364, v2 .476 .491 .442, v4 .420 .417 .420.
Paired differences: v2 − v1 +.030 (standard error .028), v4 − v1 −.021 (.040), v4 − v2 −.051 (.016).
v4 differs from v2 in schedule and prompts; which of them costs it in so short a run is not known.

Real products (Grocery Store Dataset: 46 items to learn from, 15 unseen ones, 75 queries, 500 in the
gallery), `:vN,few --config.data.root=FOLDER`, a minute of training each; settings chosen on items
held out inside train. mAP, Rank-1 and the gain in mAP over a colour histogram (.537, .680) with its
95 % bootstrap interval: v1 .601 .667 +.064 [.025, .102]; v2 .601 .720 +.064 [.020, .111]; v3 (from
v2) .575 .720 +.037 [−.001, .077]; v4 .583 .720 +.045 [.004, .087].
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
        config.precision = 'bfloat16'
        config.data.update(image_size=224, vocabulary=49408, noun='clothing item')
        config.data.augmentation.update(min_area=0.8, ratio=1.1)
        config.model.features = 1024 if vision == 'rn50' else 512
        config.model.vit.update(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072)
        config.model.rn50.update(stage_sizes=(3, 4, 6, 3), width=64, heads=32, pooling='attention')
        config.model.text.update(width=512, depth=12, heads=8, mlp_width=2048)
        config.optimizer.learning_rate = 5e-5
        v3_rate = 1e-4
        config.losses.temperature = 0.05 if version == 'v4' else 0.07
        config.evaluate.every_epochs = 1.0
        epochs = {'v1': 10.0, 'v2': 20.0, 'v3': 20.0, 'v4': 50.0}[version]
        if version == 'v4':
            config.early_stop.update(metric='val/final_loss', patience=10)

    fixed = dict(temperature=0.0)  # learning rates: the temperature stays
    config.stages = ('tune',)
    config.stage.tune = dict(epochs=epochs, learning_rates=fixed)
    if version == 'v3':
        config.stage.tune.optimizer = dict(learning_rate=v3_rate)
    if version == 'v4':
        config.optimizer.update(schedule='cosine', span='run', warmup_fraction=0.1)
    if 'smoke' in words or 'staged' in words:
        config.stages = ('first', 'tune')
        config.stage.first = dict(epochs=epochs, learning_rates=fixed)
    return config.lock()
