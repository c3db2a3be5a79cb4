"""Turns listings of objdump and LLVM IR into text in which only what a function does is left.

Addresses, names and metadata go: targets are numbered in order of appearance, so that two builds of
one function differ only where their instructions do, and no text holds the name of the function.
"""

import bisect
import re
from collections.abc import Callable

_INSTRUCTION = re.compile(r'\s*([0-9a-f]+):\t(.*)')
_RELOCATION = re.compile(r'\s+[0-9a-f]+: R_\w+\s+(\S+)')
_PADDING = re.compile(r'((data16|cs) )*nop[wlq]?( .*)?|xchg %ax,%ax')
_TARGET = re.compile(r'\b([0-9a-f]+) <([^>]+)>$')
_RESOLVED = re.compile(r' (?:#|//) ([0-9a-f]+) <([^>]+)>$')
_OPEN = (  # what the linker will fill in; an instruction may have an immediate 0 as well
    re.compile(r'0x0(?=\(%rip\))'),
    re.compile(r'(?<![\w.-])0x0(?![0-9a-f])'),
)
_TEXT = re.compile(r'\.text\.(?:unlikely\.|hot\.|startup\.|exit\.)?(?=.)')
_WIDTHS = {
    **{
        f'{r}{letter}x': width
        for r, width in (('r', 'r64'), ('e', 'r32'), ('', 'r16'))
        for letter in 'abcd'
    },
    **{
        f'{r}{index}i': width
        for r, width in (('r', 'r64'), ('e', 'r32'), ('', 'r16'))
        for index in 'sd'
    },
    **{f'{letter}{half}': 'r8' for letter in 'abcd' for half in 'lh'},
    'sil': 'r8',
    'dil': 'r8',
    **{
        f'r{number}{end}': width
        for number in range(8, 16)
        for end, width in (('', 'r64'), ('d', 'r32'), ('w', 'r16'), ('b', 'r8'))
    },
    **{f'{kind}mm{number}': f'{kind}mm' for kind in 'xyz' for number in range(32)},
}

# Of LLVM IR: what is renamed, and what is left out (never within strings).
_NAME = r'(?:"[^"]*"|[\w.$-]+)'
_LLVM = re.compile(
    rf'%(?P<local>{_NAME})|@(?P<globe>{_NAME})'
    r'|(?P<aside>;.*|(,| )? ?![\w.]+ !\d+|(?<=metadata) !\d+| ?#\d+(?![\w"])| section "[^"]*"'
    r'|\b(?:dso_local|dso_preemptable|local_unnamed_addr|unnamed_addr|noundef) )'
    r'|(?P<string>"[^"]*")'
)
_DEFINE = re.compile(rf'^define [^@\n]*@({_NAME})\(.*?^}}', re.M | re.S)
_LABEL = re.compile(rf'^({_NAME}):|label %({_NAME})|\[ [^\[\]]*, %({_NAME}) \]', re.M)


def split_assembly(listing: str) -> dict[str, str]:
    """Cuts the output of `objdump -d -r` at its symbols: name → the lines of instructions."""
    parts = re.split(r'^[0-9a-f]+ <(.+)>:$', listing, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def canonical_assembly(
    lines: str, name: str, *, symbols: bool = False, registers: str = 'keep'
) -> str:
    """Returns one instruction per line, its operands after a space, and labels on separate lines.

    Jump targets are `L0:`, `L1:` in order of appearance; what the linker would fill in is `G0`,
    `G1`, or with `symbols` its name where it has one; the function itself is `self`. Padding is
    left out; numbers stay as they are, hexadecimal.

    Args:
      lines: those of one function, as `split_assembly` returns them.
      name: the function's symbol.
      registers: 'class' writes registers of x86 by kind and width (`%r64`, `%xmm`), those of the
        stack excepted; registers of other machines stay.
    """
    code = [entry for entry in _instructions(lines) if not _PADDING.fullmatch(entry[1])]
    starts = [at for at, _, _ in code]
    other = _naming(name, symbols)
    label = lambda address: f'\0{bisect.bisect_left(starts, int(address, 16))}\0'
    written = []
    for _, text, relocations in code:
        resolved = _RESOLVED.search(text)
        text = re.sub(r' (#|//) .*$', '', text)
        branch = _TARGET.search(text)
        for relocation in relocations:
            symbol = other(relocation)
            if branch:
                text, branch = text[: branch.start()] + symbol, None
            elif position := next(filter(None, (form.search(text) for form in _OPEN)), None):
                text = text[: position.start()] + symbol + text[position.end() :]
            else:
                text += f' {{{symbol}}}'
        if branch and branch[2].split('+')[0] == name:
            again = int(branch[1], 16) == starts[0] and text.startswith(('call', 'bl '))
            text = text[: branch.start()] + ('self' if again else label(branch[1]))
        elif branch:
            text = text[: branch.start()] + other(branch[2])
        elif resolved and resolved[2].split('+')[0] == name and not relocations:
            text = re.sub(r'-?0x[0-9a-f]+(?=\(%rip\))', lambda _: label(resolved[1]), text)
        written.append(text)
    targets = {int(position) for position in re.findall('\0(\\d+)\0', '\n'.join(written))}
    marked = []
    for position, text in enumerate([*written, '']):
        marked += [f'\0{position}\0:'] * (position in targets) + [text] * bool(text)
    number = _numbering('L')
    whole = re.sub('\0(\\d+)\0', lambda match: number(match[1]), '\n'.join(marked))
    if registers == 'class':
        whole = re.sub(r'%(\w+)', lambda match: '%' + _WIDTHS.get(match[1], match[1]), whole)
    return whole


def split_llvm(module: str) -> dict[str, str]:
    """Cuts a module of LLVM IR: name → the text of its definition, `define` to `}`."""
    return {match[1].strip('"'): match[0] for match in _DEFINE.finditer(module)}


def canonical_llvm(text: str, name: str, *, symbols: bool = False) -> str:
    """Returns one instruction per line without metadata, attributes, comments and debug calls.

    Values are `%v0`, `%v1` in order of appearance, blocks `%L0`, named types `%T0`, globals `@G0`;
    with `symbols` types and globals keep their names. The function itself is `@self`; intrinsics
    (`@llvm.…`) are instructions and keep their names.
    """
    labels = {name for match in _LABEL.findall(text) for name in match if name}
    value, block, kind = _numbering('v'), _numbering('L'), _numbering('T')
    other = _naming(name, symbols)

    def replace(match: re.Match) -> str:
        if match['aside']:
            return ''
        if match['string']:  # of inline assembly
            return re.sub(rf'(?<![\w$]){re.escape(name)}(?![\w$])', 'self', match[0])
        if globe := (match['globe'] or '').strip('"'):
            return '@' + (globe if globe.startswith('llvm.') else other(globe))
        local = match['local']
        if local.strip('"').startswith(('struct.', 'union.', 'class.')):
            return match[0] if symbols else '%' + kind(local)
        return '%' + (block(local) if local in labels else value(local))

    lines = []
    for line in text.splitlines():
        if '@llvm.dbg.' in line or line.strip().startswith(('#dbg_', ';')):
            continue
        if start := re.match(rf'({_NAME}):', line):
            line = block(start[1]) + ':'
        else:
            line = _LLVM.sub(replace, line)
        if line := ' '.join(line.split()):
            lines.append(line)
    return '\n'.join(lines)


def count_instructions(text: str) -> int:
    """Counts the instructions of a canonical text of either form."""
    aside = re.compile(r'\w+:|define .*|[}\]]|i\d+ -?\w+, label %\w+')
    return sum(not aside.fullmatch(line) for line in text.splitlines())


def _instructions(lines: str) -> list[tuple[int, str, list[str]]]:
    """Returns (address, text with single spaces, symbols to be filled in) of each instruction."""
    instructions: list[tuple[int, str, list[str]]] = []
    for line in lines.splitlines():
        if match := _INSTRUCTION.match(line):
            text = ' '.join(match[2].split())
            # Older objdumps write the width at these.
            text = re.sub(r'^((?:\w+ )*)(call|jmp|ret|leave)q\b', r'\1\2', text)
            instructions.append((int(match[1], 16), text, []))
        elif instructions and (match := _RELOCATION.match(line)):
            symbol = re.sub(r'[+-]0x[0-9a-f]+$', '', match[1])
            instructions[-1][2].append(_TEXT.sub('', symbol))
    return instructions


def _naming(name: str, symbols: bool) -> Callable[[str], str]:
    """Returns what writes a symbol: `self`, its name without the function's, or its number."""
    number = _numbering('G')

    def write(symbol: str) -> str:
        if symbol == name:
            return 'self'
        if not symbols or symbol.startswith('.'):  # sections and strings have no name
            return number(symbol)
        return '.'.join('self' if part == name else part for part in symbol.split('.'))

    return write


def _numbering(letter: str) -> Callable[[str], str]:
    seen: dict[str, str] = {}
    return lambda key: seen.setdefault(key, f'{letter}{len(seen)}')
