"""Sign language: sequences of landmarks to sequences of glosses, by CTC.

    python -m mmjax.main --config=configs/sign_ctc.py                             # built-in signing
    python -m mmjax.main --config=configs/sign_ctc.py --config.data.root=FOLDER   # your own
    python -m mmjax.main --config=configs/sign_ctc.py --mode=predict --input=FILE.npz

Words after the colon:
  smoke      two tiny stages, to see that everything works
  distill    a teacher with two LSTM layers, then a student that follows it
  published  the original's sizes, for its streams pose, hands, face, temporal

Results with the state of the code that they are of, real signing, distillation, a teacher from
another run: docs/results/sign.md
"""

from mmjax.engine import config as config_lib
from mmjax.recipes.sign.config import Config


def get_config(argument: str = ''):
    words = config_lib.words(argument, ('smoke', 'distill', 'published'))
    config = config_lib.default(Config)
    config.batch_size = 16  # sentences
    config.loss_weights = dict(ctc=1.0, smoothing=0.0)
    config.sampler = dict(name='bucketed', by='length', stretch=1.1)
    config.optimizer.update(
        learning_rate=2e-3, weight_decay=1e-4, warmup_epochs=1.0, warmup_init=0.1
    )
    config.evaluate.every_epochs = 6.5
    config.best.metric = 'dev/wer'
    if 'distill' in words:
        config.model.distill = True
        config.losses.distillation_blank_weight = 0.05
        config.loss_weights = dict(ctc=0.3, distillation=0.7, teacher_ctc=0.0, smoothing=0.0)
        config.stages = ('teacher', 'student')
        config.stage.teacher = dict(
            epochs=8.0,
            learning_rates=dict(student=0.0),
            loss_weights=dict(ctc=0.0, distillation=0.0, teacher_ctc=1.0, smoothing=0.0),
        )
        config.stage.student = dict(epochs=8.0, learning_rates=dict(teacher=0.0))
    else:
        config.stages = ('train',)
        config.stage.train = dict(epochs=13.0)

    if 'published' in words:
        config.batch_size = 4
        config.data.update(differences=False, around=False)
        config.data.augmentation.update(feature_dropout=0.05, time_masks=2)
        config.losses.distillation_blank_weight = 1.0
        for model in (config.model.student, config.model.teacher):
            model.dropout = 0.3
            # Hands are one stream in the original's data and two in the built-in ones.
            model.stream_widths = dict(hands=128, left=128, right=128, temporal=128)
        config.optimizer.update(
            learning_rate=3e-4,
            schedule='cosine_restarts',
            period_epochs=10.0,
            period_factor=2.0,
            warmup_epochs=5.0,
        )
        config.early_stop.update(metric='dev/wer', patience=15)
        for name in config.stages:
            config.stage[name].epochs = 100.0
        if 'distill' in words:
            config.stage.teacher.early_stop = dict(metric='dev/teacher_wer')
        config.evaluate.every_epochs = 1.0
    if 'smoke' in words:  # after the others: its sizes win
        config.quick_compile = True
        config.batch_size = 4
        config.data.buckets = 1
        config.data.built_in = dict(train=16, dev=4, test=4, signers=4, held_out_signers=2)
        for model in (config.model.student, config.model.teacher):
            model.update(stream_width=16, width=16, lstm_features=16)
            model.stream_widths = {}
        config.decode.beam = 4
        for name in config.stages:
            del config.stage[name].epochs
            config.stage[name].steps = 6
        if 'distill' not in words:
            config.stages = ('train', 'finetune')
            config.stage.finetune = dict(steps=4, optimizer=dict(learning_rate=2e-4))
        config.optimizer.warmup_epochs = 0.5
        config.evaluate.every_epochs = 0.0
        config.checkpoint.every_steps = 4
        config.log.every_steps = 1
    return config.lock()
