"""Sign language: sequences of landmarks to sequences of glosses, by CTC.

    python -m mmjax.main --config=configs/sign_ctc.py                             # built-in signing
    python -m mmjax.main --config=configs/sign_ctc.py --config.data.root=FOLDER   # your own
    python -m mmjax.main --config=configs/sign_ctc.py --mode=predict --input=FILE.npz

Words after the colon:
  smoke      two tiny stages, to see that everything works
  distill    a teacher with two LSTM layers, then a student that follows it
  published  the original's sizes, for its streams pose, hands, face, temporal

Result: WER .075 (seed 0) and .123 (seed 2) on unseen signers (nearest neighbour .412).
Real signing, distillation, a teacher from another run: docs/results/sign.md
"""

from mmjax.engine import config as mmjax_config


def get_config(argument: str = ''):
    words = mmjax_config.words(argument, ('smoke', 'distill', 'published'))
    config = mmjax_config.default()
    config.task = 'sign'
    config.batch_size = 16  # sentences

    config.data.seed = 0  # of the built-in signing; `seed` is training's
    # (name, start, end) columns or (name, start, end, numbers of a landmark); (): streams.json
    config.data.streams = ()
    config.data.missing = 'zero'  # 'zero': a stream that is all zeros in a frame was not seen
    config.data.differences = True  # adds each feature's change since the frame before
    config.data.around = True  # tells the landmarks of a stream around their mean point
    config.data.buckets = 3  # lengths that batches are padded to, at most
    config.data.frame_rate = 25.0  # frames a second, for the times that predict prints
    config.data.max_fault_share = 0.01
    # A time mask may hide a sign whole, which CTC then has to read from nothing: off.
    config.data.augmentation = dict(
        stretch=(0.9, 1.1),
        noise=0.03,
        gain=0.0,
        offset=0.0,
        stream_dropout=0.05,
        feature_dropout=0.0,
        time_masks=0,
        time_mask_share=0.1,
    )
    config.data.built_in = dict(train=3000, dev=100, test=200, signers=64, held_out_signers=4)

    model = dict(
        stream_width=64,
        # (name, width) pairs that differ; names that the data lack are left out, but not all names
        stream_widths=(),
        stem=16,
        width=128,
        lstm_features=128,  # a direction
        lstm_layers=1,
        dropout=0.1,
        cross_attention=False,
        attention_width=64,
        attention_heads=4,
    )
    config.model = dict(
        student=model,
        teacher=dict(model, lstm_layers=2),
        distill=False,
        # On one device: encode the frames that are there, with other dropout than on several.
        pack=True,
    )
    config.losses = dict(
        distillation_temperature=3.0,
        distillation_blank_weight=1.0,  # of frames where the teacher is sure of the blank
        blank_penalty=0.0,
    )
    config.loss_weights = dict(ctc=1.0, smoothing=0.0)
    config.decode = dict(
        beam=16,
        language_model=0.0,  # weight of a bigram model of the glosses; 0 is none
        length_bonus=0.0,
    )

    config.sampler = dict(name='bucketed', by='length', stretch=1.1)
    config.optimizer.learning_rate = 2e-3
    config.optimizer.weight_decay = 1e-4
    config.optimizer.clip = 1.0
    config.optimizer.warmup_epochs = 1.0
    config.optimizer.warmup_init = 0.1
    config.stages = ('train',)
    config.stage.train = dict(epochs=13.0)
    config.evaluate.every_epochs = 6.5
    config.best = dict(metric='dev/wer', mode='min')

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
        del config.stage.train
    if 'published' in words:
        config.batch_size = 4
        config.data.differences = False
        config.data.around = False
        config.data.augmentation.update(feature_dropout=0.05, time_masks=2)
        config.losses.distillation_blank_weight = 1.0
        for model in (config.model.student, config.model.teacher):
            model.stream_width = 64
            model.dropout = 0.3
            # Hands are one stream in the original's data and two in the built-in ones.
            model.stream_widths = (('hands', 128), ('left', 128), ('right', 128), ('temporal', 128))
        config.optimizer.learning_rate = 3e-4
        config.optimizer.schedule = 'cosine_restarts'
        config.optimizer.period_epochs = 10.0
        config.optimizer.period_factor = 2.0
        config.optimizer.warmup_epochs = 5.0
        for name in config.stages:
            config.stage[name].epochs = 100.0
            metric = 'dev/teacher_wer' if name == 'teacher' else 'dev/wer'
            config.stage[name].early_stop = dict(metric=metric, mode='min', patience=15)
        config.evaluate.every_epochs = 1.0
    if 'smoke' in words:  # after the others: its sizes win
        config.quick_compile = True
        config.batch_size = 4
        config.data.buckets = 1
        config.data.built_in = dict(train=16, dev=4, test=4, signers=4, held_out_signers=2)
        for model in (config.model.student, config.model.teacher):
            model.update(stream_width=16, stream_widths=(), width=16, lstm_features=16)
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
