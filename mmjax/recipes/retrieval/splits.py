"""What the retrieval recipe learns from: prompts of items, splits of pictures, a tokenizer."""

import pathlib

import jax

from mmjax import sections
from mmjax.data import augment, clip_tokenizer, prepare, tokenizers
from mmjax.errors import UserError
from mmjax.recipes.retrieval import data as retrieval
from mmjax.recipes.retrieval import folder, prompts

POLICIES = ('raw', 'safe')
DESCRIPTIONS, PROMPTS = 'descriptions.json', 'prompts.json'


class Prompts:
    """Prompts of the items: as given or written from descriptions, then made to fit.

    raw: {item: text} (None until `write` for built-in items); final: what the model sees; cut:
    how many were cut by the tokenizer or made to fit; source: what the consistency report reads.
    """

    def __init__(self, spec):
        self.noun, self.template, self.plain = spec.noun, spec.template, spec.template_plain
        self.policy = spec.prompt_policy
        if self.policy not in POLICIES:
            raise UserError(f"data.prompt_policy '{self.policy}' is not {' or '.join(POLICIES)}")
        self.fallback = prompts.noun_alone(self.noun, self.plain)
        self.raw = self.source = None
        given = spec.prompts
        if given is None and spec.root:
            root = pathlib.Path(spec.root).expanduser()
            own = [root / PROMPTS, root / DESCRIPTIONS]
            found = [path for path in own if path.is_file()]
            if not found and root.is_dir():
                raise UserError(
                    f'{root} holds neither {PROMPTS} nor {DESCRIPTIONS}; data.prompts can name one'
                )
            given = found[0] if found else None
        if given is not None:
            self._read(pathlib.Path(given).expanduser())

    def _read(self, path):
        first = path.read_text('utf-8-sig', errors='replace').lstrip()[:1] if path.is_file() else ''
        if first == '[':
            self.source = prompts.read_descriptions(path, unique=False)
            self.write(prompts.read_descriptions(path))
        else:
            self.raw = self.source = prompts.read_prompts(path)

    def write(self, descriptions):
        """Writes the raw prompts from descriptions."""
        self.raw = prompts.generate(descriptions, self.template, self.noun, self.plain)

    def settle(self, tokenizer, limit):
        """Makes the final prompts of at most `limit` tokens, or counts those that will be cut."""
        self.limit, count = limit, clip_tokenizer.token_counter(tokenizer)
        if self.policy == 'safe':
            self.final, report = prompts.token_safe(self.raw, count, limit, fallback=self.fallback)
            self.cut = {f'prompts_{kind}': n for kind, n in report.counts.items() if kind != 'kept'}
        else:
            self.final = self.raw
            self.cut = {'prompts_truncated': sum(count(text) > limit for text in self.raw.values())}
        self.cut = {kind: number for kind, number in self.cut.items() if number}


def open_splits(config):
    """Prepares the items and opens every split that is there; val may be items of train."""
    spec = config.data
    names = ['train', 'val', 'query', 'gallery']
    if spec.root:
        there = folder.named_splits(spec.root)
        names = [name for name in names if name == 'train' or name in there]
    if spec.val_items:
        names = [name for name in names if name != 'val']
    elif spec.root and 'val' not in names:
        folder.open_folder(spec.root, ('train',))  # its own faults come first
        raise UserError(
            f"{spec.root} has no pictures of split 'val': data.val_items=.1 takes items of train"
        )
    prepared = retrieval.prepare_items(
        spec.root,
        prepare.cache_dir(spec.cache),
        splits=tuple(names),
        seed=config.seed,
        synthetic_sizes=spec.built_in.to_dict(),
        max_fault_share=spec.max_fault_share,
        max_pixels=spec.max_pixels,
        wait=jax.process_index() > 0,
    )
    augmentation = sections.parse(
        augment.Augmentation, spec.augmentation.to_dict(), 'data.augmentation'
    )
    options = {'image_size': spec.image_size, 'augmentation': augmentation}
    splits = {name: retrieval.ItemImages(prepared, name, **options) for name in names}
    if spec.val_items:
        splits |= splits['train'].hold_out(spec.val_items, config.seed)
    return splits


def choose_tokenizer(config, assets, texts):
    config.data.ignore('vocabulary', 'tokenizer')
    if assets is not None:
        return tokenizers.load_tokenizer(assets)
    named = config.data.tokenizer or config.model.pretrained
    if named:
        return clip_tokenizer.load_clip_tokenizer(named)
    return clip_tokenizer.train_clip_tokenizer(texts, config.data.vocabulary)
