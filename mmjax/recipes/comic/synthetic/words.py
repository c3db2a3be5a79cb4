"""Says in words what is drawn in a comic panel: a small grammar, several words for most things."""

import re

from mmjax.data.drawing import pick
from mmjax.recipes.comic.synthetic.drawing import Happening, Scene
from mmjax.recipes.comic.synthetic.figures import SPECIES, Character

NAMES = dict(
    zip(
        SPECIES,
        ('Mina', 'Rufus', 'Clover', 'Bruno', 'Bolt', 'Waddle', 'Lily', 'Zorg'),
        strict=True,
    )
)
_DOING = {
    'run': ('running', 'racing', 'dashing'),
    'jump': ('jumping', 'leaping', 'hopping high'),
    'sleep': ('sleeping', 'napping', 'snoozing in bed'),
    'sit': ('sitting', 'resting on a chair', 'sitting down'),
    'handstand': ('standing upside down', 'doing a handstand', 'balancing upside down'),
    'fly': ('flying', 'soaring', 'gliding in a cape'),
    'climb': ('climbing', 'climbing a ladder', 'climbing up'),
    'hide': ('hiding', 'hiding in a barrel', 'peeking out of a barrel'),
    'ride': ('riding', 'cycling', 'riding a bike'),
    'dance': ('dancing', 'singing and dancing', 'dancing to music'),
    'cry': ('crying', 'weeping', 'sobbing'),
}
_SOUND = {
    'run': ('zoom', 'tap tap tap'),
    'jump': ('boing', 'hop'),
    'sleep': ('zzz', 'snore'),
    'sit': ('creak', 'phew'),
    'handstand': ('wobble', 'hup'),
    'fly': ('whoosh', 'swoosh'),
    'climb': ('clank', 'step by step'),
    'hide': ('psst', 'peekaboo'),
    'ride': ('ring ring', 'whirr'),
    'dance': ('la la la', 'tra la'),
    'cry': ('boohoo', 'sniff'),
}
_ITEM = {
    'ball': ('ball',),
    'umbrella': ('umbrella', 'parasol'),
    'balloon': ('balloon',),
    'flower': ('flower', 'blossom'),
    'cake': ('cake',),
    'book': ('book', 'open book'),
    'kite': ('kite',),
    'fish': ('fish',),
    'key': ('key',),
    'gift': ('gift', 'present'),
    'mug': ('mug', 'cup'),
    'drum': ('drum',),
}
PLACE = {
    'beach': ('on the beach', 'by the sea'),
    'forest': ('in the forest', 'among the trees'),
    'city': ('in the city', 'downtown'),
    'room': ('at home', 'in the room'),
    'desert': ('in the desert', 'among the cactuses'),
    'mountains': ('in the mountains', 'below the peaks'),
    'moon': ('on the moon', 'in space'),
    'farm': ('in the meadow', 'on the hills'),
}
_TIME = {
    'day': ('today', 'by day'),
    'dusk': ('at dusk', 'at sunset'),
    'night': ('at night', 'tonight'),
}
_WEATHER = {'clear': '', 'rain': 'in the rain', 'snow': 'in the snow'}
_SPEECH = (
    'I am {doing} with {item}!',
    'Look, {item}! I love {doing}.',
    'Why am I {doing} near {item}?',
    '{doing} again... and where does {item} come from?',
    'Who put {item} here while I was {doing}?',
    'Nothing beats {doing} and {item}!',
)
_NARRATION = (
    '{who} is {doing} beside {item}.',
    '{who} keeps {doing}. There is {item} too.',
    'Here comes {item}, and {who} goes on {doing}.',
    '{who} likes {doing} close to {item}.',
)
_SOUND_EFFECT = ('{sound}! {item}!', '{sound}! {who} and {item}!', '{item}... {sound}, {sound}!')
TITLE_NOUNS = ('Tale', 'Secret', 'Return', 'Song', 'Day')


def _name(rng, who: Character) -> str:
    """One of the ways to speak of a character."""
    form = rng.integers(4)
    if form == 0:
        return NAMES[who.species]
    if form == 1:
        return f'the {who.colour} {who.species}'
    if form == 2 and who.hat != 'none':
        return f'the {who.species} in the {who.hat}'
    return f'the {who.species}'


def tell(rng, scene: Scene, seen: Happening) -> str:
    """Says what is seen in a panel: always the action and the item, sometimes more."""
    item = pick(rng, _ITEM[seen.item])
    colour = f'{seen.item_colour} ' if rng.random() < 0.25 else ''
    article = 'an' if (colour + item)[0] in 'aeiou' else 'a'
    kind = rng.random()
    form = pick(rng, _SPEECH if kind < 0.5 else _NARRATION if kind < 0.85 else _SOUND_EFFECT)
    text = form.format(
        doing=pick(rng, _DOING[seen.action]),
        sound=pick(rng, _SOUND[seen.action]),
        item=f'{article} {colour}{item}',
        who=_name(rng, seen.who),
    )
    if rng.random() < 0.25:
        where = (pick(rng, PLACE[scene.place]), pick(rng, _TIME[scene.time]))
        where = (*where, _WEATHER[scene.weather]) if scene.place not in ('room', 'moon') else where
        text = f'{" ".join(filter(None, where))}: {text}'
    if seen.companion is not None and rng.random() < 0.5:
        text = f'{text} {_name(rng, seen.companion)} is watching.'
    sentences = text.replace('! ', '!|').replace('? ', '?|').replace('. ', '.|').split('|')
    return ' '.join(sentence[0].upper() + sentence[1:] for sentence in sentences)


def kind(text: str) -> str:
    """Returns how a text of `tell` says what is seen: 'speech', 'narration' or 'sound'."""
    for name, forms in (('speech', _SPEECH), ('narration', _NARRATION)):
        for form in forms:
            parts = re.split(r'{\w+}', form.lower())
            if re.search('.+'.join(map(re.escape, parts)), text.lower()):
                return name
    return 'sound'
