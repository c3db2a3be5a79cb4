"""Holds `published` to the numbers of the originals, one by one.

Sources: the originals' own documents and commands; where these say nothing, their default configs.
"""

import pytest

from mmjax.engine import config as config_lib
from mmjax.engine import stages

COMIC = {
    'batch_size': 4,  # pages
    'precision': 'float32',
    'loss_weights.contrastive': 1.0,
    'loss_weights.reconstruction': 0.5,
    'loss_weights.alignment': 0.3,
    'loss_weights.unimodal': 0.0,  # ours alone
    'losses.temperature': 0.07,
    'optimizer.name': 'adamw',
    'optimizer.learning_rate': 1e-4,
    'optimizer.weight_decay': 0.01,
    'optimizer.clip': 1.0,
    'optimizer.schedule': 'cosine',
    'optimizer.end': 0.01,
    'optimizer.warmup_steps': 0,
    'optimizer.warmup_epochs': 0.0,
    'optimizer.warmup_fraction': 0.0,
    'sampler.name': 'shuffle',
    'evaluate.every_epochs': 1.0,
    'stages': ('pages',),
    'stage.pages.epochs': 9.0,
    'stage.pages.learning_rates': {'vision': 0.0, 'text': 0.0},
    'data.max_panels': 16,
    'data.augmentation.shift': 0.0,
    'data.augmentation.scale': 0.0,
    'data.augmentation.brightness': 0.0,
    'data.augmentation.contrast': 0.0,
    'data.image_size': 224,
    'data.max_tokens': 128,
    'model.visual_backbone': 'both',
    'model.visual_fusion': 'attention',
    'model.siglip.width': 768,
    'model.siglip.depth': 12,
    'model.siglip.heads': 12,
    'model.siglip.mlp_width': 3072,
    'model.siglip.patch_size': 16,
    'model.resnet.stage_sizes': (3, 4, 6, 3),
    'model.resnet.width': 64,
    'model.resnet.bottleneck': True,
    'model.bert.width': 384,
    'model.bert.depth': 6,
    'model.bert.heads': 12,
    'model.bert.mlp_width': 1536,
    'losses.stop_context': False,
    'model.resnet.stem_kernel': 7,
    'model.resnet.stem_stride': 2,
    'model.resnet.stem_pool': True,
    'model.heads.features': 512,
    'model.heads.siglip_hidden': 384,
    'model.heads.resnet_hidden': 1024,
    'model.heads.composition_hidden': 256,
    'model.heads.gate_hidden': 512,
    'model.heads.fusion_projection': False,  # ours alone
    'model.heads.gate_floor': 0.0,  # ours alone
    'model.heads.reconstruction_hidden': 1024,
    'model.heads.dropout': 0.1,
}
RECEIPTS = {
    'batch_size': 16,
    'precision': 'float32',
    'loss_weights': {'classification': 1.0, 'language': 1.0},
    'optimizer.learning_rate': 2e-5,
    'optimizer.weight_decay': 1e-4,
    'optimizer.clip': 1.0,
    'optimizer.schedule': 'cosine',
    'optimizer.span': 'run',
    'optimizer.end': 0.1,
    'optimizer.warmup_steps': 500,
    'stages': ('heads', 'top', 'all'),
    'stage.heads.epochs': 5.0,
    'stage.top.epochs': 5.0,
    'stage.all.epochs': 5.0,
    'stage.heads.learning_rates.vision': 0.0,
    'stage.heads.learning_rates.vision_top': 0.0,
    'stage.heads.learning_rates.language': 0.1,
    'stage.top.learning_rates.vision': 0.0,
    'stage.top.learning_rates.vision_top': 0.01,
    'stage.top.learning_rates.language': 0.1,
    'stage.all.learning_rates.vision': 0.1,
    'stage.all.learning_rates.language': 0.1,
    'early_stop.metric': 'val/final_loss',
    'early_stop.patience': 5,
    'early_stop.min_delta': 0.01,
    'early_stop.scope': 'run',
    'evaluate.every_epochs': 1.0,
    'data.image_size': 448,
    'data.built_in_side': 448,
    'data.augmentation.shift': 0.0,
    'data.augmentation.scale': 0.0,
    'data.augmentation.brightness': 0.0,
    'data.augmentation.contrast': 0.0,
    'data.built_in_max_receipts': 5,
    'data.classes': 3,
    'model.vision.width': 1024,
    'model.vision.depth': 24,
    'model.vision.heads': 16,
    'model.vision.mlp_width': 4096,
    'model.vision.patch_size': 14,
    'model.language.width': 896,
    'model.language.depth': 24,
    'model.language.heads': 14,
    'model.language.kv_heads': 2,
    'model.language.mlp_width': 4864,
    'model.cross_attention.heads': 8,
    'model.cross_attention.dropout': 0.1,
    'decode.running.method': 'sample',
    'decode.running.temperature': 0.7,
    'decode.running.top_k': 50,
    'decode.running.top_p': 0.9,
    'decode.final.method': 'beam',
}
RETRIEVAL = {
    'batch_size': 32,
    'precision': 'float32',
    'optimizer.weight_decay': 0.01,
    'optimizer.clip': 5.0,
    'best.metric': 'val/final_loss',
    'best.mode': 'min',
    'early_stop.metric': 'val/final_loss',
    'evaluate.every_epochs': 1.0,
    'data.image_size': 224,
    'data.max_tokens': 77,
    # CLIP's own preparation: the centre crop, and nothing drawn at random.
    'data.augmentation.min_area': 1.0,
    'data.augmentation.ratio': 1.0,
    'data.augmentation.mirror': 0.0,
    'data.augmentation.rotation': 0.0,
    'data.augmentation.brightness': 0.0,
    'data.augmentation.contrast': 0.0,
    'data.augmentation.saturation': 0.0,
    'data.augmentation.hue': 0.0,
    'data.augmentation.tint': 0.0,
    'data.augmentation.grey': 0.0,
    'data.augmentation.erase': 0.0,
}
PK = {'loss_weights': {'supcon': 1.0}, 'sampler.name': 'pk', 'sampler.k': 2}
VERSIONS = {
    'v1': {
        'loss_weights': {'infonce': 1.0},
        'sampler.name': 'shuffle',
        'data.prompt_policy': 'raw',
        'optimizer.learning_rate': 5e-5,
        'optimizer.schedule': 'constant',
        'losses.temperature': 0.07,
        'stage.tune.epochs': 10.0,
        'early_stop.patience': 3,
    },
    'v2': {
        **PK,
        'data.prompt_policy': 'raw',  # of identities with two images or more
        'optimizer.learning_rate': 5e-5,
        'optimizer.schedule': 'constant',
        'losses.temperature': 0.07,
        'stage.tune.epochs': 20.0,
        'early_stop.patience': 3,
    },
    'v3': {
        **PK,
        'data.prompt_policy': 'raw',
        'needs_init_from': 'RUN_OF_V2',
        'stage.tune.optimizer.learning_rate': 1e-4,
        'optimizer.schedule': 'constant',
        'losses.temperature': 0.07,
        'stage.tune.epochs': 20.0,
        'early_stop.patience': 3,
    },
    'v4': {
        **PK,
        'data.prompt_policy': 'safe',
        'optimizer.learning_rate': 5e-5,
        'optimizer.schedule': 'cosine',
        'optimizer.warmup_fraction': 0.1,  # the original says that there is one, not how long
        'losses.temperature': 0.05,
        'stage.tune.epochs': 50.0,
        'early_stop.patience': 10,
    },
}
CONTRABIN = {
    'losses.temperature': 0.1,
    'losses.softness': 1.0,
    'losses.normalize': False,
    'data.max_comment': 64,
    'evaluate.every_steps': 500,
    'optimizer.learning_rate': 1e-3,
    'optimizer.weight_decay': 1e-3,
    'optimizer.schedule': 'cosine',
    'optimizer.span': 'run',
    'optimizer.warmup_steps': 500,
    'stages': ('naive', 'linear', 'nonlinear'),
    'stage.naive.epochs': 10.0,
    'stage.linear.epochs': 5.0,
    'stage.nonlinear.epochs': 5.0,
    'stage.naive.learning_rates.encoder': 0.01,  # 1e-5
    'stage.linear.learning_rates.encoder': 0.01,
    'stage.nonlinear.learning_rates.encoder': 0.01,
    'stage.naive.learning_rates.anchor': 0.0,
    'model.anchor.width': 768,
    'model.anchor.depth': 12,
    'model.anchor.heads': 12,
    'model.binary.width': 768,
    'model.pooling': 'first',
    'model.features': 256,
}
SIGN = {
    'batch_size': 4,
    'optimizer.learning_rate': 3e-4,
    'optimizer.weight_decay': 1e-4,
    'optimizer.clip': 1.0,
    'optimizer.schedule': 'cosine_restarts',
    'optimizer.period_epochs': 10.0,
    'optimizer.period_factor': 2.0,
    'optimizer.warmup_epochs': 5.0,
    'optimizer.warmup_init': 0.1,
    'model.student.dropout': 0.3,
    'stage.train.epochs': 100.0,
    'early_stop.metric': 'dev/wer',
    'early_stop.patience': 15,
    'evaluate.every_epochs': 1.0,
    'losses.distillation_temperature': 3.0,
}
ALL = [
    ('stage3:published', COMIC),
    ('receipts:published', RECEIPTS),
    *((f'clip_retrieval:{v},vit,published', {**RETRIEVAL, **only}) for v, only in VERSIONS.items()),
    *(
        (f'clip_retrieval:{v},rn50,published', {**RETRIEVAL, **only, 'losses.temperature': 0.07})
        for v, only in VERSIONS.items()
    ),
    ('contrabin:published', CONTRABIN),
    ('sign_ctc:published', SIGN),
    ('sign_ctc:distill,published', {'loss_weights.distillation': 0.7, 'loss_weights.ctc': 0.3}),
]


@pytest.mark.parametrize(
    ('spec', 'key', 'value'), [(spec, *item) for spec, numbers in ALL for item in numbers.items()]
)
def test_published_has_the_numbers_of_the_original(spec, key, value):
    config = config_lib.load(spec)
    config_lib.resolve(config)
    where = config
    for name in key.split('.'):
        where = where[name]
    found = where.to_dict() if hasattr(where, 'to_dict') else where
    assert found == value


@pytest.mark.parametrize(('spec', 'numbers'), ALL)
def test_no_stage_of_published_overrides_a_number_unseen(spec, numbers):
    resolved = config_lib.resolve(config_lib.load(spec))
    for stage, _ in stages.parse(resolved):
        for key, value in numbers.items():
            section, _, leaf = key.partition('.')
            if section in ('optimizer', 'early_stop'):
                own = f'stage.{stage.name}.{key}'
                assert getattr(getattr(stage, section), leaf) == numbers.get(own, value), own
