"""Built-in C functions of many meanings, each with a comment: pure functions of numbers.

A syntax is parameters and a body, written in tuples; a name is one letter. With expressions x, y
and blocks, which are tuples of statements:

  expression: number | name | (operator, x, y) | ('[]', array, x) | ('call', x, …)
  statement: ('=', name | ('[]', array, x), y) | ('if', x, block, block) | ('return', x)
             | ('loop', start, x, step, block), start and step being blocks of assignments

Arithmetic wraps at 32 bits, `>>` keeps the sign, `/` and `%` cut towards 0 (C with `-fwrapv`); a
call is one of the function itself. Numbers are few and small: what tells two functions apart is
where they stand. Most functions are a source of items w and a use of them; both make the label.
"""

import functools
from typing import NamedTuple

from mmjax.recipes.contrabin.synthetic.compiler import c_text, stream
from mmjax.recipes.contrabin.synthetic.optimizer import names

KINDS = {'a': 'array', 'b': 'array', 's': 'text', 't': 'text', 'n': 'count', 'x': 'int', 'y': 'int'}
SIBLINGS = 8  # functions with the same plan
NUMBERS = tuple(range(1, 11))
LETTERS = tuple(map(ord, 'abcdexyzXYZ059'))
WORDS = ('zero', 'one', 'two', 'three', 'four', 'five', 'six', 'seven', 'eight', 'nine', 'ten')
COMPARE = {
    '<': ('below', 'less than', 'smaller than'),
    '<=': ('at most', 'not above', 'no more than'),
    '>': ('above', 'greater than', 'larger than'),
    '>=': ('at least', 'not below', 'no less than'),
    '==': ('equal to', 'exactly', 'the same as'),
    '!=': ('other than', 'different from', 'not'),
}
STEPS = {
    '+': ('adding', 'increasing by'),
    '-': ('subtracting', 'reducing by'),
    '*': ('multiplying by', 'scaling by'),
    '^': ('xoring with', 'flipping the bits of'),
    '|': ('oring with', 'setting the bits of'),
    '>>': ('shifting right by', 'shifting down by'),
    '/': ('dividing by', 'taking the quotient by'),
    'from': ('subtracting from', 'taking from'),
}
JOIN = {
    '+': ('adds up', 'sums', 'totals'),
    '-': ('subtracts', 'takes away', 'deducts'),
    '^': ('xors together', 'combines by exclusive or'),
    '|': ('ors together', 'unites the bits of'),
    '*': ('multiplies by {} and adds', 'scales the result by {} before adding'),
}
PAIR = {'+': 'sum', '-': 'difference', '*': 'product', '^': 'exclusive or', '&': 'common bits'}
EACH = {1: ('every', 'each'), 2: ('every second', 'every other'), 3: ('every third', 'each third')}
BEST = {'<': 'smallest', '<=': 'last smallest', '>': 'largest', '>=': 'last largest'}
VERBS = ('do', 'run', 'calc', 'apply', 'handle', 'step', 'visit', 'work', 'eval', 'mix', 'scan')
NOUNS = ('block', 'chunk', 'part', 'unit', 'frame', 'batch', 'entry', 'cell', 'group', 'field')


class Syntax(NamedTuple):
    """What a function does."""

    parameters: tuple  # of (name, kind)
    body: tuple  # a block


class Function(NamedTuple):
    """A function in C, in English and as syntax; label is the family of algorithms it is of."""

    source: str
    comment: str
    name: str
    label: str
    syntax: Syntax


def _count(name, start, test, *body, op='+', by=1):
    return ('loop', (('=', name, start),), test, (('=', name, (op, name, by)),), body)


class _Draw:
    """Draws functions: a plan that siblings share, what fills it, and how it is told."""

    def __init__(self, seed, identity):
        self.plan = stream('plan', seed, identity // SIBLINGS)
        self.meaning, self.words = (stream(x, seed, identity) for x in ('meaning', 'words'))
        fills = (NUMBERS, LETTERS, tuple(STEPS), tuple(COMPARE), tuple(JOIN))
        self.few = {fill: [self.of(*fill) for _ in range(3)] for fill in fills}
        # What stands for numbers: in tests, and expressions by their phrases.
        self.numbers, self.others = NUMBERS, {'y': 'y'} if self.of(0, 0, 1) else {}

    def of(self, *options):
        return options[int(self.plan.integers(len(options)))]

    def fill(self, options):
        """Draws one of the three that the plan allows, which siblings put to other places."""
        return self.few[tuple(options)][int(self.meaning.integers(3))]

    def say(self, *options):
        return options[int(self.words.integers(len(options)))]

    def told(self, x: int) -> str:
        text = f"'{chr(x)}'" if x in LETTERS else str(x)
        return self.say(text, WORDS[x]) if 0 <= x <= 10 else text

    def operand(self, numbers=NUMBERS):
        """An expression and its phrase: mostly a number."""
        if self.others and self.meaning.random() < 0.25:
            phrase = list(self.others)[int(self.meaning.integers(len(self.others)))]
            return self.others[phrase], phrase
        number = self.fill(numbers)
        return number, self.told(number)

    def test(self, x, kinds=('compare', 'compare', 'compare', 'left', 'bits', 'both', 'both')):
        """A condition on an expression, and an adjective: 'above 3'."""
        kind, equal, k = self.of(*kinds), self.of('==', '!='), self.of(2, 3, 4, 5, 6)
        if kind == 'both':
            op, word = self.of(('&&', 'and'), ('||', 'or'))
            (p, first), (q, second) = self.test(x, kinds[:5]), self.test(x, kinds[:5])
            return (op, p, q), f'{first} {word} {second}'
        if kind == 'compare':
            op, (y, phrase) = self.fill(COMPARE), self.operand(self.numbers)
            return (op, x, y), f'{self.say(*COMPARE[op])} {phrase}'
        if kind == 'bits':
            how = ('with no', 'lacking any') if equal == '==' else ('with a', 'having some')
            return (equal, ('&', x, k), 0), f'{self.say(*how)} bit of {self.told(k)}'
        left, how = self.of(*range(k)), self.say('leaving', 'equal to')
        phrase = f'{"not " * (equal == "!=")}{how} {self.told(left)} modulo {self.told(k)}'
        return (equal, ('%', x, k), left), phrase

    def value(self, x, most=2):
        """An expression made of another, and how: ' after adding 3', or nothing."""
        told = []
        for _ in range(self.of(*range(most + 1))):
            op, k = self.fill(STEPS), self.of(2, 3)
            y, phrase = (k, self.told(k)) if op in ('>>', '/') else self.operand()
            x = ('-', y, x) if op == 'from' else (op, x, y)
            told.append(f'{self.say(*STEPS[op])} {phrase}')
        return x, f' after {" and then ".join(told)}' if told else ''

    def finish(self, x):
        """A return, and a sentence that says how the result is changed before."""
        x, after = self.value(x)
        told = self.say('the result is returned', 'it returns that', 'this is given back')
        return ('return', x), f' Finally {told}{after}.' if after else ''

    def begin(self):
        first, how = self.fill(NUMBERS), self.say('starting from', 'beginning with')
        return ('=', 'r', first), f', {how} {self.told(first)}'

    def join(self, x, into='r', scales=(2, 3, 5, 7)):
        """A statement that brings an expression into another, and a verb."""
        op, k = self.fill(JOIN), self.of(*scales)
        left = ('+', ('*', into, k), x) if op == '*' else (op, into, x)
        return ('=', into, left), self.say(*JOIN[op]).format(k)

    # Sources: the items in words, and a loop around a body that sees one as w, its number as i.

    def elements(self):
        low, k, item = self.of(0, 0, 1, 2), self.of(1, 1, 2, 3), ('=', 'w', ('[]', 'a', 'i'))
        start, test, op = self.of(
            (low, ('<', 'i', 'n'), '+'), (('-', 'n', low + 1), ('>=', 'i', 0), '-')
        )
        where = 'from index {} on' if op == '+' else 'backwards from {} off the end'
        told = f'{self.say(*EACH[k])} element {where.format(self.told(low))}'
        return told, lambda body: (_count('i', start, test, item, *body, op=op, by=k),)

    def pairs(self):
        op, gap = self.of(*PAIR), self.of(1, 2, 3)
        end, other, told = self.of(
            ('n', ('[]', 'b', 'i'), 'elements at the same place of two arrays'),
            ('n', ('[]', 'b', ('-', ('-', 'n', 1), 'i')), 'elements of a and of b backwards'),
            ('n', ('[]', 'a', ('-', ('-', 'n', 1), 'i')), 'an element and its mirror image'),
            (('-', 'n', gap), ('[]', 'a', ('+', 'i', gap)), f'elements {self.told(gap)} apart'),
        )
        item, test = ('=', 'w', (op, ('[]', 'a', 'i'), other)), ('<', 'i', end)
        return f'each {PAIR[op]} of {told}', lambda body: (_count('i', 0, test, item, *body),)

    def rows(self):
        c, first = self.of(2, 3, 4, 5), self.fill(NUMBERS)
        cell, verb = self.join(('[]', 'a', ('+', ('*', 'i', c), 'j')), 'w')
        row = ('=', 'w', first), _count('j', 0, ('<', 'j', c), cell)
        test = ('<=', ('*', ('+', 'i', 1), c), 'n')
        told = f'each row of {self.told(c)} cells, which {verb} them from {self.told(first)}'
        return told, lambda body: (_count('i', 0, test, *row, *body),)

    def characters(self):
        self.numbers, item, test = LETTERS, ('[]', 's', 'i'), ('!=', ('[]', 's', 'i'), 0)
        told = 'each character'
        if self.of(0, 1):
            other, op, self.numbers = ('[]', 't', 'i'), self.of(*PAIR), NUMBERS
            item, test = (op, item, other), ('&&', test, ('!=', other, 0))
            told = f'each {PAIR[op]} of characters at the same place of two texts'
        return told, lambda body: (_count('i', 0, test, ('=', 'w', item), *body),)

    def digits(self):
        base, whole = self.of(*NUMBERS[1:]), ('=', 'x', ('&', 'x', 0x7FFFFFFF))
        item, step = ('=', 'w', ('%', 'x', base)), ('=', 'x', ('/', 'x', base))
        number, test = ('=', 'i', ('+', 'i', 1)), ('>', 'x', 0)
        told = f'each digit of the low 31 bits in base {self.told(base)}'
        loop = ('loop', (('=', 'i', 0),), test, (step, number))
        return told, lambda body: (whole, (*loop, (item, *body)))

    def bits(self):
        high, k, low = self.of(8, 12, 16, 24), self.of(1, 2, 3, 4), self.of(0, 0, 1, 2, 4)
        item = ('=', 'w', ('&', ('>>', 'x', 'i'), 2**k - 1))
        told = f'each group of {self.told(k)} bits from bit {self.told(low)} up to {high}'
        return told, lambda body: (_count('i', low, ('<', 'i', high), item, *body, by=k),)

    def terms(self):
        (x, before), (y, last), op = self.value('u', 1), self.value('v', 1), self.of(*PAIR)
        p, q, rounds = self.fill(NUMBERS), self.fill(NUMBERS), self.of(7, 15)
        items = ('=', 'w', (op, x, y)), ('=', 'u', 'v'), ('=', 'v', 'w')
        told = f'each of x modulo {rounds + 1} terms after {self.told(p)} and {self.told(q)}, one'
        told += f' being the {PAIR[op]} of the last but one{before} and the last{last}'
        first, test = (('=', 'u', p), ('=', 'v', q)), ('<', 'i', ('&', 'x', rounds))
        return told, lambda body: (*first, _count('i', 0, test, *items, *body))

    # Uses of a source, or of nothing: a body and a comment.

    def fold(self, noun, around):
        x, after = self.value('w')
        body, verb = self.join(x)
        if self.of(0, 1, 1):
            test, told = self.test('w')
            body, noun = ('if', test, (body,), ()), f'{noun} {self.say("that is", "if")} {told}'
        (first, begin), (last, tail) = self.begin(), self.finish('r')
        return (first, *around((body,)), last), f'{verb} {noun}{after}{begin}.{tail}'

    def count(self, noun, around):
        (x, after), p, q = (
            self.value('w', 1),
            self.fill(NUMBERS),
            self.of(0, 1) and self.fill(NUMBERS),
        )
        test, told = self.test(x)
        less = (('=', 'r', ('-', 'r', q)),) if q else ()
        body = ('if', test, (('=', 'r', ('+', 'r', p)),), less)
        (first, begin), (last, tail) = self.begin(), self.finish('r')
        told = f'{self.say("counts", "adds")} {self.told(p)} for {noun} that{after} is {told}'
        told += f' and takes off {self.told(q)} otherwise' if q else ''
        return (first, *around((body,)), last), f'{told}{begin}.{tail}'

    def best(self, noun, around):
        (x, after), op = self.value('w'), self.of(*BEST)
        test = ('||', ('<', 'e', 0), (op, 'v', 'r'))
        body = ('=', 'v', x), ('if', test, (('=', 'r', 'v'), ('=', 'e', 'i')), ())
        name, what = self.of(('r', 'value'), ('e', 'number'), (('+', 'r', 'e'), 'value + number'))
        (first, begin), (last, tail) = self.begin(), self.finish(name)
        told = f'{self.say("finds", "determines")} the {what} of the {BEST[op]} of {noun}{after}'
        return (first, ('=', 'e', -1), *around(body), last), f'{told}{begin}.{tail}'

    def search(self, noun, around):
        (x, after), none = self.value('w', 1), self.fill(NUMBERS)
        (test, told), (found, what) = self.test(x), self.of(('i', 'number'), ('w', 'value'))
        result, tail = self.finish(found)
        told = f'{noun} that{after} is {told}, else {self.told(none)}.{tail}'
        body = *around((('if', test, (result,), ()),)), ('return', none)
        return body, f'{self.say("finds", "looks for")} the {what} of the first of {told}'

    def sort(self):
        k, op, (step, after) = self.of(1, 2, 3), self.fill(COMPARE), self.value('u', 1)
        other, test = ('[]', 'a', ('+', 'i', k)), ('<', 'i', ('-', 'n', k))
        swap = ('=', ('[]', 'a', 'i'), 'v'), ('=', other, 'u'), ('=', 'r', ('+', 'r', 1))
        body = ('=', 'u', ('[]', 'a', 'i')), ('=', 'v', other), ('if', (op, step, 'v'), swap, ())
        (first, begin), (last, tail) = self.begin(), self.finish('r')
        told = f'swaps elements {self.told(k)} apart where the former{after} is '
        told += f'{self.say(*COMPARE[op])} the latter and counts the swaps{begin}.{tail}'
        return (first, _count('i', 0, test, *body), last), told

    def change(self):
        low, k, (x, after) = self.of(0, 1, 2), self.of(1, 2), self.value('w')
        (y, other), (test, told), (first, begin) = self.value('v'), self.test('w'), self.begin()
        here, there, less = ('[]', 'a', 'i'), ('[]', 'a', 'j'), ('=', 'j', ('-', 'j', 1))
        swap = ('=', here, y), ('=', there, x), ('=', 'r', ('+', 'r', 1))
        body = ('=', 'v', there), ('=', 'w', here), ('if', test, swap, ()), less
        last, tail = self.finish('r')
        told = f'exchanges elements{after}, if {told}, and their partners from the end{other}, '
        told += f'from index {self.told(low)} in steps of {self.told(k)}, counting{begin}.{tail}'
        loop = _count('i', low, ('<', 'i', 'j'), *body, by=k)
        return (first, ('=', 'j', ('-', 'n', 1)), loop, last), told

    def recursion(self):
        k, least, tail = self.of(2, 3, 4), self.fill(NUMBERS), self.of(True, False)
        smaller, how = self.of(
            (('/', 'x', k), f'x divided by {self.told(k)}'),
            (('-', ('&', 'x', 7), 1), 'x modulo 8 minus 1'),
            (('-', ('&', 'x', 15), k), f'x modulo 16 minus {self.told(k)}'),
        )
        name = 'y' if tail else 'x'
        (base, after), (x, more) = self.value(name), self.value('x')
        again = ('call', smaller) if tail or not self.others else ('call', smaller, 'y')
        (_, _, joined), verb = self.join(x, 'y' if tail else again)
        body = ('if', ('<', 'x', least), (('return', base),), ())
        told = f'recurs on {how} and {verb} x{more} {"into y on" if tail else "on"} the way'
        told += f'{"" if tail else " back"}; for x below {self.told(least)} it gives {name}{after}.'
        return (body, ('return', (*again, joined) if tail else joined)), told

    def cases(self):
        body, told = [], []
        for _ in range(self.of(1, 2, 3)):
            name, (test, when) = self.of('x', 'y'), self.test('x')
            x, after = self.value(name)
            body.append(('if', test, (('return', x),), ()))
            told.append(f'{name}{after} if x is {when}')
        x, after = self.value('y')
        return (*body, ('return', x)), f'gives {"; ".join(told)}; otherwise y{after}.'


SOURCES = ('elements', 'pairs', 'rows', 'characters', 'digits', 'bits', 'terms')
USES = ('fold', 'count', 'best', 'search')
WHOLE = ('sort', 'change', 'recursion', 'cases')


@functools.lru_cache(maxsize=4)
def _drawn(seed: int, identity: int) -> tuple[str, Syntax, str]:
    draw = _Draw(seed, identity)
    name = draw.of(*SOURCES, *SOURCES, *WHOLE)
    if name in SOURCES:
        noun, around = getattr(draw, name)()
        if draw.of(0, 0, 1):
            draw.others['its number'] = 'i'
        use = draw.of(*USES)
        body, comment = getattr(draw, use)(noun, around)
        name = f'{use} {name}'
    else:
        body, comment = getattr(draw, name)()
    used = names(body)
    if {'a', 'b'} & set(used):
        used = [*used, 'n']
    syntax = Syntax(tuple((x, kind) for x, kind in KINDS.items() if x in used), body)
    return name, syntax, comment[0].upper() + comment[1:]


def syntax(seed: int, identity: int) -> Syntax:
    """Draws what `function` of the same numbers does."""
    return _drawn(seed, identity)[1]


def function(seed: int, identity: int) -> Function:
    """Draws a function; `seed` and `identity` are not negative."""
    if seed < 0 or identity < 0:
        raise ValueError(f'seed and identity must not be negative, got {seed} and {identity}')
    label, syntax, comment = _drawn(seed, identity)
    rng = stream('text', seed, identity)
    name = '_'.join(words[int(rng.integers(len(words)))] for words in (VERBS, NOUNS))
    name += str(rng.integers(10)) * int(rng.integers(2))
    return Function(c_text(syntax, name, rng), comment, name, label, syntax)
