"""Comic panels: one 512-d embedding per panel from its image, its text and its place on the page.

    python -m mmjax.main --config=configs/stage3.py                             # built-in pages
    python -m mmjax.main --config=configs/stage3.py --config.data.root=FOLDER   # your own

Words after the colon:
  smoke      two tiny stages, to see that everything works
  published  SigLIP-base, ResNet-50 and MiniLM-L6 at 224 px; name their weights with
             --config.model.pretrained.siglip=FOLDER, .resnet=FOLDER and .bert=FOLDER

Result: image→text R@1 within the page .959 on built-in pages (chance .207). Real pages, floors,
and what differs from the original: docs/results/comic.md
"""

from ml_collections import config_dict

from mmjax.engine import config as mmjax_config


def get_config(argument: str = ''):
    words = mmjax_config.words(argument, ('smoke', 'published'))
    config = mmjax_config.default()
    config.task = 'comic'
    config.batch_size = 16  # pages

    config.data.image_size = 128  # of a panel, pixels
    config.data.max_panels = 16  # the published N; later panels are cut and counted
    config.data.buckets = (9, 16)  # panels a page may be padded to, for the bucketed sampler
    config.data.max_tokens = 32
    config.data.vocabulary = 2048  # of the tokenizer that is trained on the pages' text
    config.data.hidden_tokens = 0.0  # share of the tokens hidden in training
    config.data.hidden_texts = 0.0  # share of the panels whose text is hidden in training
    config.data.hidden_places = 0.0  # share of the panels whose composition is hidden in training
    config.data.use_composition = True
    config.data.max_fault_share = 0.01
    config.data.max_pixels = 50_000_000
    config.data.augmentation = dict(shift=0.04, scale=0.06, brightness=0.1, contrast=0.15)
    config.data.built_in = dict(train=1536, val=128)  # pages, without data.root

    config.model = dict(
        visual_backbone='resnet',  # siglip | resnet | both
        pack=True,  # run the towers on the panels that are there, not on padding
        visual_fusion='attention',  # of both: attention | gate | concat
        siglip=dict(patch_size=8, width=128, depth=4, heads=4, mlp_width=512, dropout=0.0),
        resnet=dict(
            stage_sizes=(1, 1, 1),
            width=32,
            bottleneck=False,
            stem_kernel=11,
            stem_stride=8,
            stem_pool=False,
            statistics=False,
        ),
        bert=dict(width=96, depth=1, heads=3, mlp_width=192, max_length=128, dropout=0.1),
        heads=dict(
            features=512,
            siglip_hidden=384,
            resnet_hidden=512,
            composition_hidden=256,
            gate_hidden=512,
            reconstruction_hidden=1024,
            dropout=0.1,
        ),
        pretrained=dict(
            siglip=config_dict.placeholder(str),
            resnet=config_dict.placeholder(str),
            bert=config_dict.placeholder(str),
        ),
    )
    config.losses = dict(temperature=0.07, chunk='auto', stop_context=False)
    config.loss_weights = dict(contrastive=1.0, reconstruction=0.5, alignment=1.0)  # published: .3

    config.sampler = dict(name='stratified', by=dict(n_panels=2, n_text=2))
    config.optimizer.learning_rate = 1e-3
    config.optimizer.weight_decay = 0.01
    config.optimizer.warmup_steps = 50
    config.optimizer.span = 'run'
    config.stages = ('align', 'pages')
    config.stage.align = dict(epochs=6.0, loss_weights=dict(contrastive=0.0, alignment=1.0))
    config.stage.pages = dict(epochs=5.0)
    config.evaluate.every_epochs = 3.0
    config.best = dict(metric='val/loss', mode='min')

    if 'smoke' in words:
        config.quick_compile = True
        config.batch_size = 8
        config.data.image_size = 32
        config.data.built_in = dict(train=48, val=16)
        config.data.buckets = (9,)
        config.model.bert.update(width=32, depth=1, heads=2, mlp_width=64)
        config.model.resnet.update(width=8, stage_sizes=(1, 1))
        config.model.heads.update(features=64, resnet_hidden=64)
        config.stage.align = dict(steps=8, learning_rates=dict(text=0.0))
        config.stage.pages = dict(steps=8)
        config.checkpoint.every_steps = 5
        config.log.every_steps = 1
    if 'published' in words:
        config.batch_size = 64
        config.precision = 'bfloat16'
        config.loss_weights.alignment = 0.3
        config.data.update(image_size=224, max_tokens=128, vocabulary=30522, buckets=(16,))
        config.model.visual_backbone = 'both'
        config.model.siglip.update(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072)
        config.model.resnet.update(
            stage_sizes=(3, 4, 6, 3), width=64, bottleneck=True, stem_kernel=7, stem_pool=True
        )
        config.model.bert.update(width=384, depth=6, heads=12, mlp_width=1536, max_length=512)
        config.model.heads.resnet_hidden = 1024
        config.optimizer.learning_rate = 1e-4
        config.stages = ('pages',)
        config.stage.pages = dict(epochs=9.0, learning_rates=dict(vision=0.0, text=0.0))
    return config.lock()
