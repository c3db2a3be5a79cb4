"""What the sign-language recipe learns from: splits of sentences, a vocabulary, statistics."""

import pathlib

import jax

from mmjax.data import builders, sign, sign_prepare, sign_streams
from mmjax.data.dataset import DataError
from mmjax.data.sign_augment import Augmentation, Normalization
from mmjax.data.sign_folder import Vocabulary

VOCABULARY, NORMALIZATION = 'vocabulary.txt', 'normalization.npz'


class SignData:
    """splits: name → sentences, all in the words and on the scale of the training split.

    With `assets`, a workdir, words and scale are those of its run.
    """

    def __init__(self, config, assets=None):
        spec = config.data
        prepared = sign_prepare.prepare_sequences(
            spec.root, builders.cache_dir(spec.cache), seed=spec.seed,
            streams=sign_streams.told(spec.streams, 'data.streams'),
            synthetic_sizes=spec.built_in.to_dict(), max_fault_share=spec.max_fault_share,
            wait=jax.process_index() > 0,
        )  # fmt: skip
        told = spec.missing, spec.differences, spec.around
        if assets is None:
            self.vocabulary = prepared.vocabulary()
            self.normalization = prepared.normalization(*told)
        else:
            self.vocabulary = Vocabulary.load(pathlib.Path(assets) / VOCABULARY)
            self.normalization = Normalization.load(pathlib.Path(assets) / NORMALIZATION)
        augmentation = Augmentation(**spec.augmentation.to_dict())
        _check_room(config, augmentation.stretch)
        self.splits = {
            name: sign.SignSequences(
                prepared, name, vocabulary=self.vocabulary, normalization=self.normalization,
                augmentation=augmentation, buckets=spec.buckets,
            )
            for name in prepared.splits
        }  # fmt: skip
        train = self.splits['train']
        train.skipped['infeasible'] = train.counts['unalignable_rows']

    def save(self, workdir):
        self.vocabulary.save(pathlib.Path(workdir) / VOCABULARY)
        self.normalization.save(pathlib.Path(workdir) / NORMALIZATION)


def _check_room(config, stretch):
    """Raises where buckets, as a stage's sampler has them, do not fit what augmentation makes."""
    for name in config.stages:
        stage = config.stage[name].to_dict()
        own = stage.get('sampler', {})
        sampler = own if 'name' in own else {**config.sampler.to_dict(), **own}
        room = sampler.get('stretch', 1.0)
        if sampler['name'] == 'bucketed' and room < stretch[1]:
            where = f'stage.{name}.sampler.stretch' if 'stretch' in own else 'sampler.stretch'
            longest = f'data.augmentation.stretch={stretch}'
            raise DataError(f'{where}={room} leaves no room for {longest}')
