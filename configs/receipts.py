"""Receipts: how many a picture shows, and answers in words, by a vision-language model in stages.

    python -m mmjax.main --config=configs/receipts.py                             # built-in
    python -m mmjax.main --config=configs/receipts.py --config.data.root=FOLDER   # your own
    python -m mmjax.main --config=configs/receipts.py --mode=predict --input=PICTURE \\
        --question="How many receipts do you see?"

Words after the colon: `smoke`, which wins over the other, and `published`: InternVL2.5-1B's sizes
and three stages. The decoder's weights are named with --config.model.pretrained.language=FOLDER.
For the tower there are none to load: it comes from a run of these sizes, by --init_from=DIR, or is
trained first, by --config.stages="('scratch', 'heads', 'top', 'all')".

Measured on the built-in receipts (6,000 pictures with three questions each, 1,550 updates, 12.7
minutes on 2 CPU cores; test: 600 pictures): counting accuracy .993 (.983 to .997; majority .365),
BLEU-4 .883, ROUGE-L .883, exact match .783, perplexity 1.12. Who sees only the question
(`benchmarks/receipts_floors.py`) has .365, .433 and .462; who sees only 16 × 16 pixels .505, .055
and .137. Right by content: counts .990, whether there is any .998, payment .378, items .229, totals
.121, stores .025; the last four are near what the question alone gives (.315, .239, .129, .017):
print of 112 pixels is too small to be read. A step takes .51 of the time and .37 of the memory
where the tower is frozen (`benchmarks/stage_cost.py`). On pictures of one receipt the question's
words look at it 3.3 times as much as its area would have; at least twice in all of 200, and in 12
% where the receipt is taken from another picture (`benchmarks/receipts_attention.py`).

Measured on a folder of collages of real receipts (420 pictures with 1,260 questions, 90 for
validation; 1,189 updates, 23 minutes beside other work; --config.stage.scratch.epochs=20.
.heads.epochs=2. .top.epochs=2. .all.epochs=5. --config.evaluate.every_epochs=4.): accuracy on val
.967 (.907 to .989; majority .411, 16 × 16 pixels .878), BLEU-4 .341, ROUGE-L .498, content .807;
the question alone has .285, .445 and .422. The best epoch was picked on the same val. Names, dates
and totals are never right.
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
        config.precision = 'bfloat16'
        config.data.update(image_size=448, built_in_side=448)
        config.model.update(shuffle=2, thaw_blocks=4, remat=True)
        config.model.vision.update(
            patch_size=14, width=1024, depth=24, heads=16, mlp_width=4096, stem='patch'
        )
        config.model.language.update(
            width=896, depth=24, heads=14, kv_heads=2, mlp_width=4864, theta=1e6, tied=False
        )
        config.optimizer.learning_rate = 2e-5
        config.evaluate.every_epochs = 0.5  # more often in a stage than the patience
        config.early_stop.update(metric='val/final_loss', patience=5, min_delta=0.01)
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
