"""Built-in functions: their C, their binaries and their meaning agree, and no two mean the same."""

import hashlib
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mmjax.errors import UserError
from mmjax.recipes.contrabin.synthetic import catalogue as catalogues
from mmjax.recipes.contrabin.synthetic import programs
from mmjax.recipes.contrabin.synthetic.compiler import LEVELS, compile_function
from mmjax.recipes.contrabin.synthetic.optimizer import interpreter

COUNT = 240
SIZES = {'train': 200, 'val': 15, 'test': 25}
HALF = 1 << 31
GCC = shutil.which('gcc')
ARITHMETIC = {
    'adda': lambda x, y: x + y,
    'suba': lambda x, y: x - y,
    'mula': lambda x, y: x * y,
    'quot': lambda x, y: int(np.trunc(np.float64(x) / np.float64(y))),  # exact for 32 bits
    'rema': lambda x, y: int(np.fmod(np.float64(x), np.float64(y))),
    'conj': lambda x, y: x & y,
    'disj': lambda x, y: x | y,
    'excl': lambda x, y: x ^ y,
    'asl': lambda x, y: x << y,
    'asr': lambda x, y: x >> y,
}
TESTS = {
    'lt': lambda x, y: x < y,
    'le': lambda x, y: x <= y,
    'gt': lambda x, y: x > y,
    'ge': lambda x, y: x >= y,
    'eq': lambda x, y: x == y,
    'ne': lambda x, y: x != y,
}


def signed(x: int) -> int:
    return (x + HALF) % (2 * HALF) - HALF


class Machine:
    """Executes assembly, one instruction after the other, as its text says."""

    def __init__(self, text: str, memory: bytearray):
        self.memory, self.program, self.labels = memory, [], {}
        for line in text.splitlines():
            word, *words = line.replace(',', '').split()
            if word[0] == '@':
                self.labels[word] = len(self.program)
            else:
                self.program.append((word, words))

    def run(self, arguments: list[int]) -> int:
        registers, frame, pushed, size, place = {}, {}, [], 0, 0

        def read(word):
            if word[0] == 'q':
                return registers[word]
            assert re.fullmatch('0x[0-9a-f]+', word) and int(word, 16) < 128, word
            return int(word, 16)

        for _ in range(100_000):
            word, words = self.program[place]
            place += 1
            if word in ARITHMETIC:
                registers[words[0]] = signed(ARITHMETIC[word](read(words[1]), read(words[2])))
            elif word == 'jp':
                place = self.labels[words[0]]
            elif word.startswith('jz'):
                place = self.labels[words[1]] if TESTS[word[2:]](read(words[0]), 0) else place
            elif word[1:] in TESTS:
                if TESTS[word[1:]](read(words[0]), read(words[1])):
                    place = self.labels[words[2]]
            elif word in ('mvr', 'imm'):
                registers[words[0]] = read(words[1])
            elif word == 'immh':
                registers[words[0]] = signed(int(words[1], 16) << 16)
            elif word == 'imml':
                registers[words[0]] |= int(words[1], 16)
            elif word == 'arg':
                registers[words[0]] = arguments[read(words[1])]
            elif word == 'frm':
                size = read(words[0])
            elif word == 'sts':
                assert read(words[0]) % 4 == 0 and read(words[0]) < size
                frame[words[0]] = read(words[1])
            elif word == 'lds':
                registers[words[0]] = frame[words[1]]
            elif word in ('ldw', 'ldb'):
                at, width = read(words[1]), 4 if word == 'ldw' else 1
                assert 64 <= at <= len(self.memory) - width
                registers[words[0]] = int.from_bytes(
                    self.memory[at : at + width], 'little', signed=width == 4
                )
            elif word == 'stw':
                at = read(words[0])
                assert 64 <= at <= len(self.memory) - 4
                self.memory[at : at + 4] = (read(words[1]) % (2 * HALF)).to_bytes(4, 'little')
            elif word == 'psh':
                pushed.insert(0, read(words[0]))
            elif word == 'jsr':
                assert self.labels[words[1]] == 0
                registers[words[0]] = self.run(pushed)
                pushed = []
            else:
                assert word == 'rts', word
                return read(words[0])
        raise AssertionError('does not end')


def emulate(binary: str, parameters, arguments) -> tuple[int, list]:
    """Puts the arguments into memory, runs, and reads result and arrays back."""
    memory, passed, places = bytearray(64), [], []
    for (_, kind), x in zip(parameters, arguments, strict=True):
        if isinstance(x, list):
            places.append((len(memory), len(x), kind))
            passed.append(len(memory))
            memory += bytes(x) if kind == 'text' else np.array(x, '<i4').tobytes()
            memory += b'\x5a' * (-len(memory) % 4 + 16)  # what no function should change
        else:
            passed.append(x)
    before = bytes(memory)
    result = Machine(binary, memory).run(passed)
    after = []
    for start, length, kind in places:
        width = 4 if kind == 'array' else 1
        end = start + width * length
        assert memory[end : end + 16] == before[end : end + 16]
        after.append(np.frombuffer(memory[start:end], '<i4' if width == 4 else 'u1').tolist())
    return result, after


def reference(syntax, arguments) -> tuple[int, list]:
    arguments = [x.copy() if isinstance(x, list) else x for x in arguments]
    result = interpreter(syntax)(*arguments)
    return result, [x for x in arguments if isinstance(x, list)]


@pytest.fixture(scope='module')
def catalogue():
    return catalogues.catalogue(7, SIZES)


@pytest.fixture(scope='module')
def functions(catalogue):
    return [programs.function(7, i) for split in catalogue.values() for i in split]


def test_binaries_do_what_the_syntax_says(functions):
    for number, one in enumerate(functions):
        cases = catalogues.inputs(one.syntax.parameters, 100)[number % 4 :: 4]
        for level in LEVELS:
            binary = compile_function(one.syntax, level, seed=number)
            for arguments in cases:
                expected = reference(one.syntax, arguments)
                found = emulate(binary, one.syntax.parameters, arguments)
                assert found == expected, (one.source, binary, arguments)


def test_values_are_not_reused_after_a_change():
    first, raised = ('[]', 'a', 0), ('+', ('[]', 'a', 0), 1)
    memory = ('=', 'v', first), ('=', first, raised), ('return', ('-', ('*', 'v', 9), first))
    copies = ('=', 'v', 'n'), ('=', 'n', ('+', 'n', 1)), ('return', ('*', 'v', 'n'))
    for body in (memory, copies):
        syntax = programs.Syntax((('a', 'array'), ('n', 'count')), body)
        for level in LEVELS:
            binary = compile_function(syntax, level, seed=0)
            found = emulate(binary, syntax.parameters, [[7], 4])
            assert found == reference(syntax, [[7], 4]), binary


def test_levels_do_what_they_say(functions):
    lines = {level: [] for level in LEVELS}
    for one in functions:
        binaries = [compile_function(one.syntax, level, seed=1) for level in LEVELS]
        for level, binary in enumerate(binaries):
            lines[level].append(sum(line[0] != '@' for line in binary.splitlines()))
        assert not re.search('lds|sts|frm', ''.join(binaries[1:]))
        assert re.search('lds', binaries[0])
        assert not re.search(r'adda [^,]+, [^,]+, 0x0\b|mula [^,]+, [^,]+, 0x[1248]\b', binaries[2])
        assert not re.search(r'j(lt|le|gt|ge|eq|ne) [^,]+, 0x0,', binaries[2])
        if one.label == 'recursion' and 'y' in dict(one.syntax.parameters):
            tail = one.syntax.body[-1][1][0] == 'call'
            assert ('jsr' in binaries[3]) == (not tail) and 'jsr' in binaries[2]
    assert np.percentile(lines[0], 5) >= 20 and max(lines[0]) <= 150
    assert np.mean(lines[1]) < 0.7 * np.mean(lines[0])
    assert np.mean(lines[3]) > 1.5 * np.mean(lines[2])
    twice = ('+', ('[]', 'a', 'n'), ('[]', 'a', 'n'))
    body = ('=', 'v', ('*', 'n', 3)), ('return', ('+', twice, ('*', ('+', 2, 3), ('[]', 'a', 0))))
    syntax = programs.Syntax((('a', 'array'), ('n', 'count')), body)
    binaries = [compile_function(syntax, level, seed=1) for level in LEVELS]
    counts = [[binary.count(word) for word in ('mula', 'ldw', 'asl')] for binary in binaries]
    assert counts[:3] == [[5, 3, 0], [3, 3, 0], [1, 2, 1]]  # n * 3 is dead, a[0] has no product


def test_registers_say_nothing(functions):
    texts = [compile_function(functions[0].syntax, 1, seed) for seed in range(8)]
    assert len(set(texts)) == 8
    assert len({re.sub(r'q\d+', 'q', text) for text in texts}) == 1
    assert compile_function(functions[0].syntax, 1, 3) == texts[3]
    with pytest.raises(ValueError, match='level'):
        compile_function(functions[0].syntax, 4, 0)


def test_no_two_mean_the_same_on_other_inputs(functions):
    digests = [
        tuple(catalogues.behaviour(one.syntax, trial)[0] for trial in (51, 52, 53, 54))
        for one in functions
    ]
    assert len(set(digests)) == len(functions)


def test_comments_tell_meanings_apart(monkeypatch, catalogue):
    """When all wording is the same, what is left of a comment is the meaning."""
    stream = programs.stream
    monkeypatch.setattr(
        programs, 'stream', lambda name, *key: stream(name, *(key if name != 'words' else ()))
    )
    programs._drawn.cache_clear()
    told = [programs._drawn(7, i)[2] for split in catalogue.values() for i in split]
    programs._drawn.cache_clear()
    assert len(set(told)) == len(told)


def test_functions_look_different(functions):
    assert len({one.label for one in functions}) >= 12
    assert all(re.fullmatch('[a-z]+_[a-z]+[0-9]?', one.name) for one in functions)
    assert all(one.name + '(' in one.source for one in functions)
    assert all(one.comment[0].isupper() and one.comment[-1] == '.' for one in functions)
    assert not any('  ' in one.comment or ',,' in one.comment for one in functions)
    for part in ('for (', 'while (', 'do', 'unsigned ', 'long ', '++', ' += ', ' << ', ' == '):
        assert 3 <= sum(part in one.source for one in functions) < COUNT - 3, part


@pytest.mark.skipif(GCC is None, reason='needs gcc')
def test_c_does_what_the_syntax_says(functions, tmp_path):
    lines, expected = ['#include <stdio.h>'], []
    calls = []
    for number, one in enumerate(functions):
        lines.append(one.source.replace(one.name + '(', f'f{number}('))
        for arguments in catalogues.inputs(one.syntax.parameters, 200)[:6] if number < 80 else ():
            names, prints = [], []
            for (name, kind), x in zip(one.syntax.parameters, arguments, strict=True):
                if isinstance(x, list):
                    ctype = 'int' if kind == 'array' else 'char'
                    calls.append(f'{{ {ctype} {name}[] = {{{", ".join(map(str, [*x, 0]))}}};')
                    prints.append(f'for (int k = 0; k < {len(x)}; k++) printf(" %d", {name}[k]);')
                names.append(name if isinstance(x, list) else str(x))
            calls.append(f'printf("%d", f{number}({", ".join(names)}));')
            calls += [*prints, 'puts("");', '}' * len(prints)]
            result, arrays = reference(one.syntax, arguments)
            expected.append(' '.join(map(str, [result, *(x for array in arrays for x in array)])))
    source = tmp_path / 'all.c'
    source.write_text('\n'.join([*lines, 'int main(void) {', *calls, 'return 0; }', '']))
    strict = [GCC, '-std=c99', '-pedantic-errors', '-fsyntax-only', str(source)]
    assert subprocess.run(strict, capture_output=True, text=True, timeout=60).stderr == ''
    program = str(tmp_path / 'all')
    subprocess.run([GCC, '-std=c99', '-fwrapv', '-o', program, str(source)], check=True, timeout=60)
    out = subprocess.run([program], capture_output=True, text=True, check=True, timeout=60).stdout
    assert out.splitlines() == expected


def test_everything_is_the_same_in_another_process(catalogue, functions):
    code = (
        'import hashlib, sys\n'
        'from mmjax.recipes.contrabin.synthetic import catalogue as catalogues, programs\n'
        'from mmjax.recipes.contrabin.synthetic.compiler import compile_function\n'
        'assert not {"jax", "tensorflow", "torch"} & set(sys.modules)\n'
        f'catalogue = catalogues.catalogue(7, {SIZES})\n'
        'functions = [programs.function(7, i) for i in catalogue["test"]]\n'
        'binaries = [compile_function(one.syntax, 3, 5) for one in functions]\n'
        'print(hashlib.sha256(repr((catalogue, functions, binaries)).encode()).hexdigest())'
    )
    environment = {'PYTHONHASHSEED': '12345', 'PYTHONPATH': ':'.join(filter(None, sys.path))}
    found = subprocess.run(
        [sys.executable, '-c', code], env=environment, capture_output=True, text=True, check=True
    ).stdout.strip()
    test = functions[: SIZES['test']]
    here = (catalogue, test, [compile_function(one.syntax, 3, 5) for one in test])
    assert found == hashlib.sha256(repr(here).encode()).hexdigest()


def test_catalogue(catalogue):
    assert {split: len(chosen) for split, chosen in catalogue.items()} == SIZES
    everything = [i for chosen in catalogue.values() for i in chosen]
    assert len(set(everything)) == COUNT
    more = catalogues.catalogue(7, SIZES | {'train': 210})
    assert more['train'][:200] == catalogue['train'] and more['test'] == catalogue['test']
    with pytest.raises(UserError, match=r'built_in\.val'):
        catalogues.catalogue(7, {'train': 1, 'test': 1})
    with pytest.raises(ValueError, match='negative'):
        programs.function(0, -1)
