"""Comic panels: one 512-d embedding per panel from its image, its text and its place on the page.

    python -m mmjax.main --config=configs/stage3.py                             # built-in pages
    python -m mmjax.main --config=configs/stage3.py --config.data.root=FOLDER   # your own

Words after the colon:
  smoke      two tiny stages, to see that everything works
  published  the original's sizes and settings, its defects mended; name the weights with
             --config.model.pretrained.siglip=FOLDER, .resnet=FOLDER and .bert=FOLDER

Results on built-in and real pages, floors, what differs from the original: docs/results/comic.md
"""

from mmjax.engine import config as config_lib
from mmjax.recipes.comic.config import Config


def get_config(argument: str = ''):
    words = config_lib.words(argument, ('smoke', 'published'))
    config = config_lib.default(Config)
    config.batch_size = 16  # pages
    config.loss_weights = dict(
        contrastive=1.0,
        reconstruction=0.5,
        alignment=1.0,  # published: .3
        unimodal=0.5,  # the original has no such loss
    )
    config.sampler = dict(name='stratified', by=dict(n_panels=2, n_text=2))
    config.optimizer.update(weight_decay=0.01, warmup_steps=50, span='run')
    config.stages = ('align', 'pages')
    config.stage.align = dict(epochs=6.0, loss_weights=dict(contrastive=0.0))
    config.stage.pages = dict(epochs=5.0)
    config.evaluate.every_epochs = 3.0
    config.best.metric = 'val/final_loss'

    if 'smoke' in words:
        config.quick_compile = True
        config.batch_size = 8
        config.data.update(image_size=32, built_in=dict(train=48, val=16), buckets=(9,))
        config.model.bert.update(width=32, depth=1, heads=2, mlp_width=64)
        config.model.resnet.update(width=8, stage_sizes=(1, 1))
        config.model.heads.update(features=64, resnet_hidden=64)
        config.stage.align = dict(steps=8, learning_rates=dict(text=0.0))
        config.stage.pages = dict(steps=8)
        config.checkpoint.every_steps = 5
        config.log.every_steps = 1
    if 'published' in words:
        config.batch_size = 4
        config.data.augmentation.update(shift=0.0, scale=0.0, brightness=0.0, contrast=0.0)
        config.sampler = dict(name='shuffle')
        config.loss_weights.update(alignment=0.3, unimodal=0.0)
        config.data.update(image_size=224, max_tokens=128, vocabulary=30522, buckets=(16,))
        config.model.visual_backbone = 'both'
        config.model.siglip.update(patch_size=16, width=768, depth=12, heads=12, mlp_width=3072)
        config.model.resnet.update(
            stage_sizes=(3, 4, 6, 3),
            width=64,
            bottleneck=True,
            stem_kernel=7,
            stem_stride=2,
            stem_pool=True,
        )
        config.model.bert.update(width=384, depth=6, heads=12, mlp_width=1536, max_length=512)
        config.model.heads.update(resnet_hidden=1024, fusion_projection=False, gate_floor=0.0)
        config.optimizer.update(learning_rate=1e-4, warmup_steps=0, end=0.01)
        config.evaluate.every_epochs = 1.0
        config.stages = ('pages',)
        config.stage.pages = dict(epochs=9.0, learning_rates=dict(vision=0.0, text=0.0))
    return config.lock()
