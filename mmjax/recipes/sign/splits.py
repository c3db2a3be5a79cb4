"""What the sign-language recipe learns from: splits of sentences, a vocabulary, statistics."""

import pathlib

import jax

from mmjax.data.prepare import cache_dir
from mmjax.errors import UserError
from mmjax.recipes.sign import data as sign
from mmjax.recipes.sign import streams as sign_streams
from mmjax.recipes.sign.augment import Augmentation, Normalization
from mmjax.recipes.sign.folder import Vocabulary

VOCABULARY, NORMALIZATION = 'vocabulary.txt', 'normalization.npz'


class SignData:
    """splits: name → sentences, all in the words and on the scale of the training split.

    With `assets`, a workdir, words and scale are those of its run.
    """

    def __init__(self, config, assets=None):
        spec = config.data
        prepared = sign.prepare_sequences(
            spec.root,
            cache_dir(spec.cache),
            seed=spec.seed,
            streams=sign_streams.from_tuples(spec.streams, 'data.streams'),
            synthetic_sizes=spec.built_in.to_dict(),
            max_fault_share=spec.max_fault_share,
            wait=jax.process_index() > 0,
        )
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
                prepared,
                name,
                vocabulary=self.vocabulary,
                normalization=self.normalization,
                augmentation=augmentation,
                buckets=spec.buckets,
            )
            for name in prepared.splits
        }
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
            raise UserError(f'{where}={room} leaves no room for {longest}')
