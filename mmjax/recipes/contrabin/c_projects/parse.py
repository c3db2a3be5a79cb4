"""Finds the functions of C text and the comments that describe them, by tree-sitter's grammar.

The text is parsed without preprocessing: functions of both branches of an `#if` are listed; the
object file shows which of them was compiled.
"""

import dataclasses
import hashlib
import re
from collections import Counter
from typing import Any

from mmjax.errors import UserError

# What may hold functions of file level. A brace that `#if` leaves open makes an ERROR of the rest.
_OUTER = {
    'translation_unit',
    'preproc_if',
    'preproc_ifdef',
    'preproc_else',
    'preproc_elif',
    'preproc_elifdef',
    'linkage_specification',
    'declaration_list',
    'ERROR',
}
_LEGAL = re.compile(
    r'copyright|licen[cs]e|spdx|all rights reserved|warranty|public domain|[@\\]file\b', re.I
)
_BODY_ROWS = 2  # a comment this close below the opening brace may describe the function
_TOKEN = re.compile(
    rb'(?P<literal>"(?:\\.|[^"\\\n])*"|\'(?:\\.|[^\'\\\n])*\')'
    rb'|(?P<comment>/\*.*?\*/|//(?:\\\n|[^\n])*)|(?P<word>\w+)|(?P<blank>\s+)|.',
    re.S,
)


@dataclasses.dataclass(frozen=True)
class CFunction:
    """A function definition.

    source: its text, without a comment of the body that became `comment`; comment: cleaned, on one
    line, '' if none; start, end: its bytes in the file; fault: '', 'parse_error' or
    'defined_twice' (which of the definitions was compiled is not known).
    """

    name: str
    source: str
    comment: str
    start: int
    end: int
    fault: str = ''


def functions(text: bytes) -> list[CFunction]:
    """Returns every function definition at file level, in order; `#if` and `extern "C"` included.

    The comment is the block that ends directly above the definition, or one blank line higher:
    `/* */` or consecutive `//` lines. Legal texts, file descriptions, code and rules of signs are
    no such comment. Failing that, one on the first lines of the body serves if a blank line sets
    it off. A definition in old style (K&R) counts; a lone word that the grammar cannot parse
    before the name, as macros of calling conventions are, is no fault.

    Args:
      text: the file; bytes that are not UTF-8 are replaced by U+FFFD in what is returned.

    Raises:
      UserError: tree-sitter is not installed.
    """
    definitions = []
    pending = [_parser().parse(text).root_node]
    while pending:
        children = pending.pop().children
        for position, child in enumerate(children):
            if child.type == 'function_definition':
                definitions.append(_function(text, children, position))
            elif child.type in _OUTER:
                pending.append(child)
    named = sorted(filter(None, definitions), key=lambda function: function.start)
    times = Counter(function.name for function in named)
    return [
        dataclasses.replace(function, fault=function.fault or 'defined_twice')
        if times[function.name] > 1
        else function
        for function in named
    ]


def content_key(source: str, name: str) -> bytes:
    """Returns a hash of a function without comments, white space and its own name."""
    own = name.encode()
    tokens = [
        b'self' if match.lastgroup == 'word' and match[0] == own else match[0]
        for match in _TOKEN.finditer(source.encode())
        if match.lastgroup not in ('comment', 'blank')
    ]
    return hashlib.sha256(b' '.join(tokens)).digest()


def clean_comment(text: str) -> str:
    """Returns the words of a comment on one line: no markers, rules or signs of doxygen's tags."""
    lines = []
    for line in text.splitlines():
        line = re.sub(r'^\s*(/\*+[!<]*|//+[!<]*|\*+(?!/))', '', line)
        line = re.sub(r'\*+/\s*$', '', line)
        # Rules (====, ----) and the marks of folding editors.
        line = re.sub(r'([^\w\s])\1{3,}|\{{3}|\}{3}', ' ', line)
        line = re.sub(r'(?<![\w@\\])[@\\](?=[a-zA-Z]+\b)', '', line)
        line = line.strip().rstrip('*').strip()
        if re.search(r'\w', line):
            lines.append(line)
    return ' '.join(' '.join(lines).split())


def _parser() -> Any:
    """Returns a parser of one call: a parser is not for several threads."""
    try:
        import tree_sitter
        import tree_sitter_c
    except ImportError as error:
        raise UserError(f"reading C needs {error.name}: pip install 'mmjax[code]'") from error
    return tree_sitter.Parser(tree_sitter.Language(tree_sitter_c.language()))


def _function(text: bytes, siblings: list[Any], position: int) -> CFunction | None:
    node = siblings[position]
    declarator = node.child_by_field_name('declarator')
    body = node.child_by_field_name('body')
    name = _name(declarator)
    if name is None or body is None:
        return None
    start, end = node.start_byte, node.end_byte
    sound = not any(c.has_error for c in node.children if not _is_macro(c, declarator))
    ifs = Counter(re.findall(rb'^\s*#\s*(if|endif)', text[start:end], re.M))
    comment, source = _above(text, siblings, position), text[start:end]
    if not comment:
        comment, (first, last) = _within(body)
        source = text[start:first] + text[last:end] if comment else source
    return CFunction(
        name.text.decode(errors='replace'),
        source.decode(errors='replace'),
        comment,
        start,
        end,
        '' if sound and ifs[b'if'] == ifs[b'endif'] else 'parse_error',
    )


def _is_macro(node: Any, declarator: Any) -> bool:
    """Whether this is a lone word before the declarator, as in `int ZEXPORT inflate(…)`."""
    early = node.end_byte <= declarator.start_byte
    return early and node.type == 'ERROR' and re.fullmatch(rb'\w+', node.text) is not None


def _name(declarator: Any) -> Any:
    """Descends through pointers, parentheses and returned function types to the identifier."""
    inside = False
    while declarator is not None and declarator.type != 'identifier':
        inside = inside or declarator.type == 'function_declarator'
        below = declarator.child_by_field_name('declarator')
        if below is None and declarator.type == 'parenthesized_declarator':
            below = next(iter(declarator.named_children), None)
        declarator = below
    return declarator if inside else None


def _above(text: bytes, siblings: list[Any], position: int) -> str:
    """Returns the cleaned comment that ends above siblings[position]."""
    row = siblings[position].start_point[0]
    position -= 1
    while position >= 0 and siblings[position].type == 'comment':
        last = position
        while position > 0 and _joined(siblings[position - 1], siblings[position]):
            position -= 1
        block = siblings[position : last + 1]
        line = text.rfind(b'\n', 0, block[0].start_byte) + 1
        # Where code stands before the comment on its line, it speaks of that code.
        if row - block[-1].end_point[0] > 2 or text[line : block[0].start_byte].strip():
            return ''
        words = b'\n'.join(node.text for node in block).decode(errors='replace')
        if comment := _worth(words):
            return comment
        if re.search(r'\w', clean_comment(words)):
            return ''  # a licence stands between: what is above it belongs elsewhere
        row = block[0].start_point[0]  # a rule of signs: the words may stand above it
        position -= 1
    return ''


def _within(body: Any) -> tuple[str, tuple[int, int]]:
    """Returns the cleaned comment of the body's first lines and its bytes in the file."""
    block: list[Any] = []
    for child in body.children[1:]:
        near = child.start_point[0] - body.start_point[0] <= _BODY_ROWS
        if child.type != 'comment' or not (_joined(block[-1], child) if block else near):
            break
        block.append(child)
    if not block:
        return '', (0, 0)
    after = block[-1].next_sibling
    if after.start_point[0] - block[-1].end_point[0] < 2 and after.type != '}':
        return '', (0, 0)  # it speaks of the line below it
    words = b'\n'.join(node.text for node in block).decode(errors='replace')
    return _worth(words), (block[0].start_byte, block[-1].end_byte)


def _joined(upper: Any, lower: Any) -> bool:
    """Whether two comments of one style stand on neighbouring lines."""
    if upper.type != 'comment' or lower.start_point[0] - upper.end_point[0] != 1:
        return False
    return upper.text[:2] == lower.text[:2] and upper.start_point[1] == lower.start_point[1]


def _worth(words: str) -> str:
    """Returns the cleaned comment; '' for legal texts and code that was commented out."""
    code = len(re.findall(r'[;{}]\s*(\*/)?\s*$', words, re.M))
    if _LEGAL.search(words) or 2 * code > len(words.splitlines()):
        return ''
    return clean_comment(words)
