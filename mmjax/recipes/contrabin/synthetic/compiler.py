"""Writes one syntax (see `code_programs`) down twice: as C, and as assembly of a toy machine.

The machine has 32-bit registers, memory in bytes (little end first), and for every call a fresh set
of registers and a frame; `arg` reads what the caller pushed, the first argument being number 0.
Operands are registers or numbers up to 0x7f; `immh` and `imml` set the two halves of others.
"""

import hashlib

import numpy as np

from mmjax.recipes.contrabin.synthetic import optimizer
from mmjax.recipes.contrabin.synthetic.optimizer import (
    COMMUTATIVE,
    MIRRORED,
    OPERATORS,
    OPPOSITE,
    names,
)

LEVELS = (0, 1, 2, 3)
REGISTERS = 32
_SPELLINGS = {
    'array': ('a', 'arr', 'data', 'buf', 'values', 'xs', 'v', 'items', 'src', 'p', 'vec', 'table'),
    'text': ('s', 'str', 'text', 't', 'word', 'line', 'q', 'label', 'input', 'chars'),
    'count': ('n', 'len', 'size', 'count', 'num', 'length', 'total', 'm'),
    'int': ('x', 'y', 'z', 'k', 'key', 'val', 'arg', 'num1', 'w', 'b', 'c', 'limit'),
    'local': ('r', 'acc', 'res', 'out', 'tmp', 'cur', 'u', 'g', 'h', 'ret', 'state', 'e', 'mark'),
    'counter': ('i', 'j', 'idx', 'pos', 'ii', 'at', 'l', 'off'),
}
_TYPES = {'local': ('int', 'int', 'unsigned', 'unsigned int', 'long'), 'counter': ('int', 'long')}
_TYPES['int'] = _TYPES['local']
_BINDING = ('||', '&&', '|', '^', '&', '== !=', '< <= > >=', '<< >>', '+ -', '* / %')
_BINDING = {op: level for level, group in enumerate(_BINDING) for op in group.split()}


def stream(*key) -> np.random.Generator:
    """A generator that knows its key only, the same on every machine."""
    digest = hashlib.sha256('/'.join(map(str, key)).encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:16], 'little')))


class _C:
    """One way to write a function in C; no choice changes what it does."""

    def __init__(self, syntax, function, rng):
        self.function, self.rng = function, rng
        self.kinds = {x: 'counter' if x in 'ij' else 'local' for x in names(syntax.body)}
        self.kinds |= dict(syntax.parameters)
        self.indent, self.whiles = self.pick('  ', '    ', '\t'), self.pick(0.1, 0.5, 0.9)
        self.apart, self.early, self.bare = self.chance(0.3), self.chance(0.4), self.chance(0.5)
        # Names of which more than the low 32 bits, or more than a small number's, matters.
        parts = [x for x in optimizer.walk(syntax.body) if isinstance(x, tuple) and x]
        tested = [part for x in parts if x[0] in (*MIRRORED, '[]') for part in x[1:]]
        exact = names([x for x in parts if x[0] in ('/', '%', '>>')])
        exact += names([x for x in tested if isinstance(x, tuple) and x[0] in (*OPERATORS, 'call')])
        tested, self.names, self.types = names(tested), {}, {}
        for x, kind in self.kinds.items():
            taken = self.names.values()
            self.names[x] = self.pick(*(y for y in _SPELLINGS[kind] if y not in taken))
            free = x not in exact and (kind == 'counter' or x not in tested)
            self.types[x] = self.pick(*_TYPES.get(kind, ('int',))) if free else 'int'

    def pick(self, *options):
        return options[int(self.rng.integers(len(options)))]

    def chance(self, p):
        return self.rng.random() < p

    def write(self, x) -> str:
        return self.expression(x)[0]

    def expression(self, x) -> tuple[str, int]:
        """The text of an expression, and how tightly its outermost operator binds."""
        match x:
            case int() if 47 < x < 123 and 'text' in self.kinds.values() and self.chance(0.7):
                return f"'{chr(x)}'", 11
            case int():
                return hex(x) if x > 9 and self.chance(0.3) else str(x), 11 if x >= 0 else 10
            case str():
                return self.names[x], 11
            case ('[]', array, index):
                return f'{self.names[array]}[{self.write(index)}]', 11
            case ('call', *parts):
                return f'{self.function}({", ".join(map(self.write, parts))})', 11
            case ('-', 0, y):
                text, binding = self.expression(y)
                return f'-{text}' if binding == 11 else f'-({text})', 10
        op, y, z = x
        if isinstance(z, int) and self.chance(0.3):
            if op == '*' and z in (2, 4, 8):
                op, z = '<<', z.bit_length() - 1
            elif op in ('<', '<=', '>', '>='):
                op, z = (
                    (op[0], z + (1 if op == '<=' else -1))
                    if '=' in op
                    else (op + '=', z + (1 if op == '>' else -1))
                )
        if op in (*COMMUTATIVE, *MIRRORED) and self.chance(0.3):
            op, y, z = MIRRORED.get(op, op), z, y
        level, texts = _BINDING[op], []
        for place, part in enumerate((y, z)):
            text, binding = self.expression(part)
            clear = binding >= (10 if level in (2, 3, 4, 5, 7) else level + place)
            texts.append(text if clear else f'({text})')
        return f' {op} '.join(texts), level

    def assign(self, target, x, inline='') -> str:
        left = inline + self.write(target)
        if isinstance(x, tuple) and x[1] == target and x[0] in OPERATORS and self.chance(0.7):
            if x[0] in '+-' and x[2] == 1 and self.chance(0.7):
                return self.pick(left + x[0] * 2, x[0] * 2 + left)
            return f'{left} {x[0]}= {self.write(x[2])}'
        return f'{left} = {self.write(x)}'

    def braced(self, head, body, depth, declared) -> list[str]:
        pad, lines = self.indent * depth, self.block(body, depth + 1, declared)
        if self.bare and len(lines) == 1 and body[0][0] in ('=', 'return'):
            return [pad + head, *lines]
        opened = [pad + head, pad + '{'] if self.apart else [pad + head + ' {']
        return [*opened, *lines, pad + '}']

    def block(self, block, depth, declared) -> list[str]:
        """The lines; a name is declared in the innermost block that has all of it."""
        statements, lines, declared = [], [], set(declared)
        for statement in block:
            if statement[0] == 'loop' and self.chance(self.whiles):
                _, start, test, step, body = statement
                statements += [*start, ('loop', (), test, (), (*body, *step))]
            else:
                statements.append(statement)
        for place, statement in enumerate(statements):
            later, inline = names(statements[place + 1 :]), ''
            own = names(statement[1:4] if statement[0] == 'loop' else statement[1])
            for name in dict.fromkeys(names(statement)):
                if name not in declared and name in (*later, *own):
                    declared.add(name)
                    first = (*statement[1], ())[0] if statement[0] == 'loop' else statement
                    if first[:2] == ('=', name) and (first is statement or name not in later):
                        inline = self.types[name] + ' '
                    else:
                        lines.append(f'{self.indent * depth}{self.types[name]} {self.names[name]};')
            lines += self.statement(statement, depth, declared, inline)
        return lines

    def statement(self, statement, depth, declared, inline) -> list[str]:
        pad = self.indent * depth
        match statement:
            case ('return', x):
                return [f'{pad}return {self.write(x)};']
            case ('=', target, x):
                return [f'{pad}{self.assign(target, x, inline)};']
            case ('loop', (), test, (), body):
                test = self.write(test)
                if self.chance(0.8):
                    return self.braced(f'while ({test})', body, depth, declared)
                lines = [f'{pad}if ({test}) {{', *self.braced('do', body, depth + 1, declared)]
                return [*lines, f'{pad}{self.indent}while ({test});', pad + '}']
            case ('loop', start, test, step, body):
                first = ', '.join(self.assign(*x[1:], inline) for x in start)
                step = ', '.join(self.assign(*x[1:]) for x in step)
                head = f'for ({first}; {self.write(test)}; {step})'
                return self.braced(head, body, depth, declared)
            case ('if', test, (('=', r, ('+', x, 1)),), ()) if x == r and self.chance(0.3):
                return [f'{pad}{self.write(r)} += {self.write(test)};']
        _, test, then, other = statement
        if other and test[0] in OPPOSITE and self.chance(0.4):
            test, then, other = (OPPOSITE[test[0]], *test[1:]), other, then
        lines = self.braced(f'if ({self.write(test)})', then, depth, declared)
        return [*lines, *(self.braced('else', other, depth, declared) if other else [])]


def c_text(syntax, function: str, rng: np.random.Generator) -> str:
    """Writes a syntax as one C99 function of a name, in one of many ways that mean the same."""
    c = _C(syntax, function, rng)
    declared = dict.fromkeys(name for name, _ in syntax.parameters)
    stars = {'array': 'int *', 'text': 'const char *'}
    told = [stars.get(kind, c.types[x] + ' ') + c.names[x] for x, kind in syntax.parameters]
    early = [x for x in c.kinds if c.early and x not in declared]
    lines = [f'{c.indent}{c.types[x]} {c.names[x]};' for x in early]
    lines += c.block(syntax.body, 1, {*declared, *early})
    head = f'int {function}({", ".join(told)})'
    return '\n'.join([*([head, '{'] if c.apart else [head + ' {']), *lines, '}', ''])


class _Lowering:
    """Three-address code of a syntax; at level 0 every name lives in the frame."""

    def __init__(self, syntax, level, slots):
        self.level, self.slots, self.code, self.last = level, slots, [], 0
        self.kinds = dict(syntax.parameters)
        self.emit('label', self.new())  # where calls go
        if level == 0:
            self.emit('enter', None, 4 * len(slots))
        for place, name in enumerate(self.kinds):
            self.store(name, self.emit('argument', f'%{self.new()}', place))
        self.again = self.new()  # where calls in tail position go
        self.emit('label', self.again)
        self.block(syntax.body)

    def emit(self, *instruction):
        self.code.append(instruction)
        return instruction[1]

    def new(self) -> int:
        self.last += 1
        return self.last

    def store(self, name, value):
        if self.level == 0:
            self.emit('keep', None, self.slots[name], value)
        elif name != value:
            self.emit('copy', name, value)

    def address(self, array, index):
        index, register = self.value(index), f'%{self.new()}'
        if self.kinds[array] == 'array':
            index = self.emit('*', register, index, self.value(4))
        return self.emit('+', f'%{self.new()}', self.value(array), index)

    def value(self, x, into=None):
        """Emits what computes an expression; returns the register or the number that it is."""
        into = into or f'%{self.new()}'
        match x:
            case int() | str() if self.level:
                return x
            case int():
                return self.emit('set', into, x)
            case str():
                return self.emit('slot', into, self.slots[x])
            case ('[]', array, index):
                load = 'load4' if self.kinds[array] == 'array' else 'load1'
                return self.emit(load, into, self.address(array, index))
            case ('call', *parts):
                for value in [self.value(part) for part in parts][::-1]:
                    self.emit('push', None, value)
                return self.emit('call', into)
        left, right = self.value(x[1]), self.value(x[2])
        return self.emit(x[0], into, left, right)

    def branch(self, test, label, when):
        """Jumps to a label if the truth of a test is `when`."""
        op, x, y = test
        if op not in ('&&', '||'):
            left, right = self.value(x), self.value(y)
            return self.emit('j' + (op if when else OPPOSITE[op]), label, left, right)
        beyond = self.new()
        either = (op == '||') == when
        self.branch(x, label if either else beyond, when == either)
        self.branch(y, label, when)
        self.emit('label', beyond)

    def block(self, block):
        for statement in block:
            self.statement(*statement)

    def statement(self, kind, *parts):
        match kind, *parts:
            case ('=', ('[]', array, index), x):
                value = self.value(x)
                self.emit('store4', None, self.address(array, index), value)
            case ('=', name, x):
                self.store(name, self.value(x, name if self.level else None))
            case ('return', ('call', *new)) if self.level == 3:
                new = [self.emit('copy', f'%{self.new()}', self.value(x)) for x in new]
                for name, value in zip(self.kinds, new, strict=True):
                    self.store(name, value)
                self.emit('jump', self.again)
            case ('return', x):
                self.emit('return', None, self.value(x))
            case ('if', test, then, other):
                beyond, end = self.new(), self.new()
                self.branch(test, beyond, False)
                self.block(then)
                self.emit('jump', end)
                self.emit('label', beyond)
                self.block(other)
                self.emit('label', end)
            case ('loop', start, test, step, body):
                top, end, late = self.new(), self.new(), self.level >= 2
                self.block(start)
                self.emit('label', top if not late else self.new())
                self.branch(test, end, False)
                self.emit('label', top if late else self.new())
                self.block((*body, *step))
                self.branch(test, top, True) if late else self.emit('jump', top)
                self.emit('label', end)


def compile_function(syntax, level: int, seed: int) -> str:
    """Compiles a function to text, one instruction or label a line.

    Args:
      syntax: see `code_programs`.
      level: 0 keeps every name in the frame; 1 uses registers, folds numbers, forwards copies and
        removes dead code; 2 shifts instead of multiplying, tests loops at their end, compares with
        zero and reuses values; 3 unrolls counting loops, and calls in tail position become jumps.
      seed: of the order of registers and of the frame, and of how often loops are unrolled.

    Raises ValueError for another level.
    """
    if level not in LEVELS:
        raise ValueError(f'level must be one of {LEVELS}, got {level}')
    rng = stream('registers', seed, level)
    body = optimizer.unroll(syntax.body, int(rng.choice((2, 4)))) if level == 3 else syntax.body
    known = dict.fromkeys([*(x for x, _ in syntax.parameters), *names(body)])
    slots = dict(zip(known, (4 * rng.permutation(len(known))).tolist(), strict=True))
    code = _Lowering(syntax._replace(body=body), level, slots).code
    return optimizer.assemble(optimizer.optimize(code, level), rng.permutation(REGISTERS), level)
