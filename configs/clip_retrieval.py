"""CLIP for retrieval: an image or a text finds the images of the same item.

    python -m mmjax.main --config=configs/clip_retrieval.py            # v4, built-in items
    python -m mmjax.main --config=configs/clip_retrieval.py:v2,rn50 --config.data.root=FOLDER

Words after the colon:
  v1         InfoNCE, raw prompts, shuffled batches        v2  SupCon, PK batches
  v3         v2 continued at twice its rate: --init_from=RUN_OF_V2, or `staged` for both in one run
  v4         token-safe prompts, cosine schedule with warm-up (default)
  vit, rn50  the image tower (rn50; `smoke`: vit)          few  a shallow net for few items
  smoke      two tiny stages; published: ViT-B/16 or RN50, --config.model.pretrained=FOLDER

Result: Rank-1 .833, mAP .776 on 60 unseen built-in items (best floor .233, .153).
Versions compared, real products: docs/results/retrieval.md
"""

from ml_collections import config_dict

from mmjax.engine import config as mmjax_config

VERSIONS = ('v1', 'v2', 'v3', 'v4')
WORDS = ('vit', 'rn50', 'staged', 'few', 'smoke', 'published')


def get_config(argument: str = ''):
    words = mmjax_config.words(argument, (*VERSIONS, *WORDS))
    version = mmjax_config.one_of(words, VERSIONS, 'v4')
    config = mmjax_config.default()
    config.task = 'retrieval'
    config.batch_size = 64

    config.data.image_size = 64
    config.data.max_tokens = 77
    config.data.vocabulary = 1500  # of the tokenizer trained on the prompts, without weights
    config.data.tokenizer = config_dict.placeholder(str)  # a folder with CLIP's, without weights
    config.data.prompts = config_dict.placeholder(str)  # JSON; none: of the root, or descriptions
    config.data.noun = 'product'
    config.data.template = 'A {noun} in {color}. {description}'
    config.data.template_plain = 'A {noun}. {description}'
    config.data.prompt_policy = 'safe' if version == 'v4' else 'raw'
    config.data.val_items = 0.0  # share of train's items held out as val, in place of a split val
    config.data.max_fault_share = 0.01
    config.data.max_pixels = 50_000_000
    config.data.augmentation = dict(
        min_area=0.8,
        ratio=1.1,
        mirror=0.5,
        rotation=0.0,
        brightness=0.25,
        contrast=0.15,
        saturation=0.15,
        hue=0.0,
        tint=0.1,
        grey=0.0,
        erase=0.0,
    )
    config.data.built_in = dict(
        train_items=480, val_items=40, test_items=60, shots=8, query_shots=2, gallery_shots=4
    )

    config.model = dict(
        vision=mmjax_config.one_of(words, ('vit', 'rn50'), 'vit' if 'smoke' in words else 'rn50'),
        features=128,
        vit=dict(patch_size=8, width=128, depth=4, heads=4, mlp_width=512),
        rn50=dict(stage_sizes=(1, 1, 1, 1), width=16, heads=8, pooling='statistics', share=1.0),
        text=dict(width=96, depth=1, heads=3, mlp_width=384),
        pretrained=config_dict.placeholder(str),  # CLIP in Hugging Face, open_clip, OpenAI form
    )
    # temperature 0 keeps the published one; the group `temperature` decides whether it learns.
    config.losses = dict(temperature=0.1, chunk='auto', mask_same_item=True, bias=-10.0)
    config.loss_weights = dict(infonce=1.0) if version == 'v1' else dict(supcon=1.0)

    config.sampler = (
        dict(name='shuffle') if version == 'v1' else dict(name='pk', by='identity', k=4)
    )
    config.optimizer.update(learning_rate=1.5e-3, weight_decay=0.01, clip=5.0)
    config.optimizer.schedule = 'constant'
    config.best = dict(metric='val/map', mode='max')
    epochs = 30.0
    if 'few' in words:
        config.model.rn50.update(stage_sizes=(1,), share=0.3)
        config.data.augmentation.update(
            min_area=0.6, ratio=1.2, brightness=0.1, contrast=0.1, saturation=0.1, tint=0.05
        )
        config.losses.temperature = 0.05 if version == 'v4' else 0.07
        config.optimizer.learning_rate = 3e-3
        config.best.metric = ''  # val shows pictures of items that are learnt from
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
        config.data.update(image_size=224, vocabulary=49408)
        config.data.noun = 'clothing item'
        config.data.augmentation.update(min_area=0.8, ratio=1.1)
        config.model.features = 1024 if config.model.vision == 'rn50' else 512
        config.model.vit.update(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072)
        config.model.rn50.update(stage_sizes=(3, 4, 6, 3), width=64, heads=32, pooling='attention')
        config.model.text.update(width=512, depth=12, heads=8, mlp_width=2048)
        config.optimizer.learning_rate = 5e-5
        config.losses.temperature = 0.05 if version == 'v4' else 0.07
        epochs = {'v1': 10.0, 'v2': 20.0, 'v3': 20.0, 'v4': 50.0}[version]
        if version == 'v4':
            config.early_stop = dict(metric='val/loss', mode='min', patience=10, min_delta=0.0)
    config.evaluate.every_epochs = 1.0 if 'published' in words else 5.0

    fixed = dict(temperature=0.0)  # learning rates: the temperature stays
    config.stages = ('tune',)
    config.stage.tune = dict(epochs=epochs, learning_rates=fixed)
    if version == 'v3':
        rate = 2 * config.optimizer.learning_rate
        config.stage.tune.optimizer = dict(learning_rate=rate)
    if 'smoke' in words or 'staged' in words:
        config.stages = ('first', 'tune')
        config.stage.first = dict(epochs=epochs, learning_rates=fixed)
    if version == 'v4':
        config.optimizer.update(schedule='cosine', span='run', warmup_fraction=0.1)
    return config.lock()
