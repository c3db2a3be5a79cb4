"""The config of the run that tests kill: a thaw, evaluations, a save every few updates."""

from tests.runs import toy


def get_config(argument=''):
    config = toy('Thaw', evaluate__every_steps=10, checkpoint__every_steps=7)
    config.seed = 3
    config.best.metric = 'val/mse'
    config.stages = ('head', 'all')
    config.stage = dict(
        head=dict(steps=60, learning_rates=dict(tower=0.0)),
        all=dict(steps=60, optimizer=dict(schedule='cosine')),
    )
    return config.lock()
