"""Three-address code of the toy machine: arithmetic, optimisation, registers.

An instruction is (operation, destination, *arguments). The destination is a register (str), None,
or, of 'label', 'jump' and 'j<' and the like, the number of a label. An argument is a register or a
number. Other operations: those of `OPERATORS`; 'set', 'copy' (value); 'argument' (which); 'load4',
'load1' (address); 'store4' (address, value); 'slot' (offset), 'keep' (offset, value) for the frame;
'push' (value), 'call' of label 1; 'enter' (size); 'return' (value).
"""

WORD = 1 << 32
LARGEST = 127  # the largest number inside an instruction
MNEMONICS = {
    '+': 'adda',
    '-': 'suba',
    '*': 'mula',
    '/': 'quot',
    '%': 'rema',
    '&': 'conj',
    '|': 'disj',
    '^': 'excl',
    '<<': 'asl',
    '>>': 'asr',
    'copy': 'mvr',
    'load4': 'ldw',
    'load1': 'ldb',
    'store4': 'stw',
    'slot': 'lds',
    'keep': 'sts',
    'argument': 'arg',
    'push': 'psh',
    'call': 'jsr',
    'jump': 'jp',
    'j<': 'jlt',
    'j<=': 'jle',
    'j>': 'jgt',
    'j>=': 'jge',
    'j==': 'jeq',
    'j!=': 'jne',
    'return': 'rts',
    'enter': 'frm',
    'set': 'imm',
}


def wrap(x: int) -> int:
    """Brings a number into the range of 32 bits with a sign, as two's complement does."""
    return ((x + (WORD >> 1)) & (WORD - 1)) - (WORD >> 1)


def _quotient(x, y):
    return wrap(abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1))


OPERATORS = {
    '+': lambda x, y: wrap(x + y),
    '-': lambda x, y: wrap(x - y),
    '*': lambda x, y: wrap(x * y),
    '/': _quotient,
    '%': lambda x, y: x - y * _quotient(x, y),
    '&': lambda x, y: x & y,
    '|': lambda x, y: x | y,
    '^': lambda x, y: x ^ y,
    '<<': lambda x, y: wrap(x << (y & 31)),
    '>>': lambda x, y: x >> (y & 31),
    '<': lambda x, y: int(x < y),
    '<=': lambda x, y: int(x <= y),
    '>': lambda x, y: int(x > y),
    '>=': lambda x, y: int(x >= y),
    '==': lambda x, y: int(x == y),
    '!=': lambda x, y: int(x != y),
}
MIRRORED = {'<': '>', '>': '<', '<=': '>=', '>=': '<=', '==': '==', '!=': '!='}
OPPOSITE = {'<': '>=', '>=': '<', '>': '<=', '<=': '>', '==': '!=', '!=': '=='}
COMMUTATIVE = frozenset('+*&|^')
_NEUTRAL = {('+', 0), ('-', 0), ('*', 1), ('/', 1), ('^', 0), ('|', 0), ('>>', 0), ('&', -1)}
_PURE = {*OPERATORS, 'set', 'copy', 'load4', 'load1', 'slot', 'argument'}


def walk(node):
    """Yields an expression, a statement or a block, and all that it consists of."""
    ahead = [node]
    while ahead:
        node = ahead.pop()
        yield node
        if isinstance(node, (tuple, list)):
            ahead.extend(reversed(node))


def names(node) -> list[str]:
    """Lists the names in a tree, each as often as it occurs: names are single letters."""
    return [x for x in walk(node) if isinstance(x, str) and len(x) == 1 and x.isalpha()]


def _assigned(node) -> set:
    return {x[1] for x in walk(node) if isinstance(x, tuple) and x[:1] == ('=',)}


def _inside(index: int) -> int:
    if index < 0:
        raise IndexError(f'index {index}')
    return index


def interpreter(syntax):
    """Makes a function of what a syntax means: the reference that everything is checked by.

    Returns:
      run(*arguments) → int. An array is a list of numbers, a text one that ends in 0; both may be
      changed. Raises IndexError where the function would leave them.
    """

    def value(x):
        if not isinstance(x, tuple):
            return (lambda e: x) if isinstance(x, int) else (lambda e: e[x])
        if x[0] == '[]':
            array, at = x[1], value(x[2])
            return lambda e: e[array][_inside(at(e))]
        parts = [value(part) for part in x[1:]]
        if x[0] == 'call':
            return lambda e: run(*[part(e) for part in parts])
        p, q = parts
        if x[0] in ('&&', '||'):
            return (lambda e: p(e) and q(e)) if x[0] == '&&' else (lambda e: p(e) or q(e))
        operator = OPERATORS[x[0]]
        return lambda e: operator(p(e), q(e))

    def statement(kind, *parts):
        match kind, *parts:
            case ('=', ('[]', array, index), x):
                at, x = value(index), value(x)
                return lambda e: e[array].__setitem__(_inside(at(e)), x(e))
            case ('=', name, x):
                x = value(x)
                return lambda e: e.__setitem__(name, x(e))
            case ('return', x):
                return value(x)
            case ('if', test, then, otherwise):
                test, then, otherwise = value(test), block(then), block(otherwise)
                return lambda e: then(e) if test(e) else otherwise(e)
        start, test, body = block(parts[0]), value(parts[1]), block((*parts[3], *parts[2]))

        def loop(e):
            start(e)
            while test(e):
                if (result := body(e)) is not None:
                    return result

        return loop

    def block(statements):
        acts = [statement(*x) for x in statements]

        def act(e):
            for one in acts:
                if (result := one(e)) is not None:
                    return result

        return act

    parameters, body = [name for name, _ in syntax.parameters], block(syntax.body)

    def run(*arguments):
        return body(dict(zip(parameters, arguments, strict=True)))

    return run


def unroll(block: tuple, factor: int) -> tuple:
    """Repeats the bodies of innermost counting loops `factor` times; the rest is a second loop."""
    done = []
    for statement in block:
        match statement:
            case ('if', test, then, otherwise):
                done.append(('if', test, unroll(then, factor), unroll(otherwise, factor)))
            case ('loop', start, test, step, body) if any(s[0] == 'loop' for s in body):
                done.append(('loop', start, test, step, unroll(body, factor)))
            case ('loop', start, (test, i, bound), (('=', j, (sign, k, by)),) as step, body) if (
                i == j == k
                and (test, sign) in (('<', '+'), ('<=', '+'), ('>=', '-'), ('>', '-'))
                and isinstance(by, int)
                and '[]' not in tuple(walk(bound))
                and not _assigned(body) & {i, *names(bound)}
            ):
                ahead = (test, (sign, i, by * (factor - 1)), bound)
                done += [('loop', start, ahead, (), (*body, *step) * factor)]
                done += [('loop', (), (test, i, bound), step, body)]
            case _:
                done.append(statement)
    return tuple(done)


def _simpler(op, args, level):
    """One instruction by arithmetic alone: folded, without neutral operands, cheaper."""
    if op in OPERATORS and all(isinstance(x, int) for x in args):
        return ('set', OPERATORS[op](*args)) if args[1] or op not in '/%' else (op, *args)
    if op in COMMUTATIVE and isinstance(args[0], int):
        args = args[::-1]
    if (op, args[-1]) in _NEUTRAL:
        return 'copy', args[0]
    if (op, args[-1]) == ('*', 0):
        return 'set', 0
    power = args[-1].bit_length() - 1 if isinstance(args[-1], int) else 0
    if level >= 2 and op == '*' and power > 0 and args[-1] == 1 << power:
        return '<<', args[0], power
    return (op, *args)


def _jump(op, label, left, right, level):
    """A conditional jump, decided where it can be, its number last, and 0 where that does."""
    if isinstance(left, int) and isinstance(right, int):
        return ('jump', label) if OPERATORS[op](left, right) else None
    if isinstance(left, int):
        op, left, right = MIRRORED[op], right, left
    if level >= 2 and (op, right) in (('<', 1), ('>=', 1), ('>', -1), ('<=', -1)):
        op, right = {'<': '<=', '>=': '>', '>': '>=', '<=': '<'}[op], 0
    return (f'j{op}', label, left, right)


def propagate(code: list[tuple], level: int) -> list[tuple]:
    """Folds numbers and forwards copies within basic blocks; level 2 reuses common values too."""
    known, available, done, dead = {}, {}, [], False
    for op, into, *args in code:
        if op == 'label':
            known, available, dead = {}, {}, False
        if dead:
            continue
        if op not in ('label', 'jump', 'call', 'slot', 'keep', 'argument', 'enter'):
            args = [known.get(x, x) for x in args]
        if op in OPERATORS:
            op, *args = _simpler(op, args, level)
        elif op[0] == 'j' and op != 'jump':
            jump = _jump(op[1:], into, *args, level)
            if jump is None:
                continue
            op, into, *args = jump
        key = (op, *args)
        if level >= 2 and key in available:
            op, args = 'copy', [available[key]]
        dead = op in ('jump', 'return')
        done.append((op, into, *args))
        if op in ('store4', 'call'):
            available = {k: v for k, v in available.items() if k[0] not in ('load4', 'load1')}
        if not isinstance(into, str):
            continue
        known = {k: v for k, v in known.items() if into not in (k, v)}
        available = {k: v for k, v in available.items() if into not in k and into != v}
        if op in ('set', 'copy'):
            known[into] = args[0]
        elif (op in OPERATORS or op in ('load4', 'load1')) and into not in args:
            available[key] = into
    return done


def thread(code: list[tuple]) -> list[tuple]:
    """Removes jumps to the next instruction, and labels nobody jumps to."""
    following, kept = set(), []
    for instruction in reversed(code):
        op, label, *_ = instruction
        if op[0] == 'j' and label in following:
            continue
        following = following | {label} if op == 'label' else set()
        kept.append(instruction)
    used = {1 if x[0] == 'call' else x[1] for x in kept if x[0][0] == 'j' or x[0] == 'call'}
    return [x for x in reversed(kept) if x[0] != 'label' or x[1] in used]


def _alive(code):
    """Returns ({register: its bit}, for each instruction the bits of those needed after it)."""
    at = {x[1]: place for place, x in enumerate(code) if x[0] == 'label'}
    bits, rules = {}, []
    for place, (op, into, *args) in enumerate(code):
        read = 0
        for name in args:
            if isinstance(name, str):
                read |= bits.setdefault(name, 1 << len(bits))
        written = bits.setdefault(into, 1 << len(bits)) if isinstance(into, str) else 0
        ways = () if op in ('jump', 'return') else (place + 1,)
        rules.append((place, (*ways, at[into]) if op[0] == 'j' else ways, ~written, read))
    rules.reverse()
    after, before, changed = [0] * len(code), [0] * (len(code) + 1), True
    while changed:
        changed = False
        for place, ways, kept, read in rules:
            out = 0
            for way in ways:
                out |= before[way]
            need = out & kept | read
            if need != before[place] or out != after[place]:
                before[place], after[place], changed = need, out, True
    return bits, after


def sweep(code: list[tuple]) -> list[tuple]:
    """Removes what computes a value that nobody needs."""
    while True:
        bits, after = _alive(code)
        needed = zip(code, after, strict=True)
        kept = [x for x, out in needed if x[0] not in _PURE or bits[x[1]] & out]
        if len(kept) == len(code):
            return kept
        code = kept


def allocate(code: list[tuple]) -> list[tuple]:
    """Replaces registers by numbers 0, 1, … in a wrapper (number,), as few as a greedy rule finds.

    Two registers share a number unless one is written while the other is needed.
    """
    clash, (bits, after) = {}, _alive(code)
    registers = list(bits)
    for (op, into, *args), out in zip(code, after, strict=True):
        for name in (into, *args):
            if isinstance(name, str):
                clash.setdefault(name, set())
        if isinstance(into, str):
            others = out & ~bits[into] & ~(bits.get(args[0], 0) if op == 'copy' else 0)
            while others:
                other = registers[others.bit_length() - 1]
                others ^= bits[other]
                clash[into].add(other)
                clash[other].add(into)
    friends = {into: args[0] for op, into, *args in code if op == 'copy'}
    number = {}
    for name in clash:
        taken = {number[other] for other in clash[name] if other in number}
        wanted = number.get(friends.get(name))
        free = min(set(range(len(taken) + 1)) - taken)
        number[name] = free if wanted is None or wanted in taken else wanted
    renamed = [
        (op, *((number[x],) if isinstance(x, str) else x for x in rest)) for op, *rest in code
    ]
    return [x for x in renamed if x[0] != 'copy' or x[1] != x[2]]


def optimize(code: list[tuple], level: int) -> list[tuple]:
    """Runs the passes of a level, see `code_compiler.compile_function`."""
    for _ in range(min(level, 1) * 2):
        code = sweep(thread(propagate(code, level)))
    return thread(code)


def _fit(code: list[tuple]) -> list[tuple]:
    """Puts numbers that no instruction can hold into registers first."""
    done = []
    for op, into, *args in code:
        for place, x in enumerate(args):
            if isinstance(x, int) and not 0 <= x <= LARGEST and op not in ('set', 'label', 'enter'):
                args[place] = f'%{len(done)}big'
                done.append(('set', args[place], x))
        done.append((op, into, *args))
    return done


def assemble(code: list[tuple], order, level: int) -> str:
    """Writes code with register number i named by order[i]; at level 2 up, 0 is not compared."""
    lines, labels = [], {}

    def operand(x):
        return hex(x) if isinstance(x, int) else f'q{order[x[0]]}'

    for op, into, *args in allocate(_fit(code)):
        word, words = MNEMONICS.get(op, ''), [operand(x) for x in args]
        if op == 'label' or op[0] == 'j':
            label = f'@{labels.setdefault(into, len(labels))}'
            if level >= 2 and args[1:] == [0]:
                word, words = 'jz' + word[1:], words[:1]
            words.append(label)
        elif op == 'call':
            words = [operand(into), f'@{labels[1]}']
        elif op == 'set' and not 0 <= args[0] <= LARGEST:
            lines.append(f'immh {operand(into)}, {(args[0] >> 16) & 0xFFFF:#x}')
            word, words = 'imml', [operand(into), hex(args[0] & 0xFFFF)]
        elif into is not None:
            words.insert(0, operand(into))
        lines.append(f'{word} {", ".join(words)}'.strip())
    return '\n'.join(lines) + '\n'
