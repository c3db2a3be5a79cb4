"""Captions of drawn shapes; `python -m mmjax.main --config=examples/captioning/config.py`."""

from examples.captioning.task import Config
from mmjax.engine import config as config_lib


def get_config(argument=None):
    smoke = 'smoke' in config_lib.words(argument, ('smoke',))
    config = config_lib.default(Config)
    config.images = 64 if smoke else 2000
    config.loss_weights = dict(caption=1.0)
    config.stages = ('all', 'decoder')
    config.stage.all = dict(epochs=1.0 if smoke else 12.0)
    config.stage.decoder = dict(epochs=1.0, learning_rates=dict(tower=0.0))
    config.optimizer.learning_rate = 3e-3
    config.evaluate.every_epochs = 2.0
    config.best = dict(metric='val/exact_match', mode='max')
    return config
