"""Sign language: sequences of landmarks to sequences of glosses, by CTC.

    python -m mmjax.main --config=configs/sign_ctc.py                             # built-in signing
    python -m mmjax.main --config=configs/sign_ctc.py --config.data.root=FOLDER   # your own
    python -m mmjax.main --config=configs/sign_ctc.py --mode=predict --input=FILE.npz

Words after the colon: `smoke`, `distill` (a teacher with two LSTM layers, then a student that
follows it), `published` (the original's sizes, for its streams pose, hands, face, temporal). A
teacher from another run: :distill --init_from=RUN:student→teacher --config.stages="('student',)"
--config.init.allow_fresh="('.*student/.*',)" --config.model.teacher.lstm_layers=1.

Measured on the built-in signing (3,000 sentences of 64 signers, 2,457 updates in three padded
lengths, a compiled step each; 200 test sentences of 905 glosses, signers unseen), on one CPU core,
9 min each with data and compiled programs at hand: WER .075 greedily and .071 by a beam of 16 with
seed 0 (dev .145, .137), .123 and .123 with seed 2 (dev .152, .150). Chance of dropout and rounding
is as wide as that: just before, with other bits, seed 0 had .060 (dev .101), in 8 min on 2 cores,
installation, data and compilation included, and after 15 epochs seeds 0 to 2 .070, .069 and .102;
with the time masks and the feature dropout of `published` .086, .155 and .101: a mask may hide a
sign whole. A nearest
neighbour that is given the signs cut out errs in .412 of them, around the shoulders in .346
(`benchmarks/sign_floors.py`).

Distillation helps short trainings (`benchmarks/sign_distillation.py`: students of 4 epochs, seeds 0
to 2, a teacher of 15 epochs and WER .070, with those other bits): WER .305 with it (.301, .314,
.301) and .486 alone (.389, .601, .467). Frames where the teacher is sure of the blank weigh .05
for that; where all weigh alike, as published, it hurts: .617 (.494, .714, .643). A teacher by CTC
says blank in nearly all frames, so that a mean over them hardly tells of glosses.

Measured on folders of real signing, each on one core:

boston104, 137 sentences of 601 glosses as two hands and a nose, 8 min: WER on the 24 sentences of
dev .606 and .642 greedily with seeds 0 and 1, .596 and .642 by the beam (standard error .045), the
best of ten evaluations on dev itself; with other rounding and dropout .633 and .587: 60 % is met by
chance. It is hardly better than the glosses of the nearest training sentence (.624; the most common
one .872; `benchmarks/sign_floors.py --root`): nine of the 24 stand in training word for word, by
the same signers. Training loss a label of seed 0 around epoch 10 3.7, 25 2.9, 50 2.4, 100 1.4, 200
.49, 300 .14, always finite. It lacks examples: 33 of the 109 words of dev occur in training at most
three times, two of them never. Of what was tried since nothing helps: no time masks and feature
dropout (.688, .596), batches of 4 (.651), a language model, a student of the same size taught by
such a run (.633 of a teacher's .633) or, in 200 epochs, two dropouts of a sentence held to agree
(.661), places told from the nose alone (.706, ended at 160) or with angles and distances (.633).
The mean of four models has .578.
Learning is not the limit: on a folder whose dev is its training split, without augmentation, at a
rate of 1e-3, with dropout .1 and no EMA, WER is 0 after 100 epochs and after 150.

    --config.data.streams="(('points',0,6,2),)" --config.batch_size=8
    --config.stage.train.epochs=300. --config.evaluate.every_epochs=30. --config.ema=0.998
    --config.optimizer.learning_rate=3e-3 --config.optimizer.warmup_epochs=5.
    --config.data.augmentation.stretch="(0.8,1.25)" --config.sampler.stretch=1.25
    --config.data.augmentation.noise=0.1 --config.data.augmentation.stream_dropout=0.
    --config.data.augmentation.time_masks=2 --config.data.augmentation.feature_dropout=0.05
    --config.model.student.dropout=0.3

asl50_sentences, 400 sentences joined of 267 single signs, 7 min: WER on the 60 of dev, joined of 50
others, .718 greedily and .714 by the beam (the most common sentence .962), the best of four
evaluations; by chance of dropout .657 to .812 (without packing). It lacks examples too: 267 of 50
signs.

    --config.data.streams="(('pose',0,44,4),('left_hand',44,107,3),('right_hand',107,170,3))"
    --config.batch_size=16 --config.stage.train.epochs=60. --config.evaluate.every_epochs=15.
    --config.optimizer.learning_rate=3e-3 --config.optimizer.warmup_epochs=3. --config.ema=0.99
    --config.data.augmentation.stretch="(0.8,1.25)" --config.sampler.stretch=1.25
    --config.data.augmentation.noise=0.1 --config.data.augmentation.gain=0.1
    --config.data.augmentation.time_masks=2 --config.data.augmentation.feature_dropout=0.05
    --config.model.student.dropout=0.3
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
