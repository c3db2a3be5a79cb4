"""Keeps the books of `code_prepare`: what is kept, what is left out and why, and what was seen."""

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Any

from mmjax.recipes.contrabin.c_projects import build
from mmjax.recipes.contrabin.c_projects.parse import CFunction, content_key

_EXAMPLES = 20


@dataclasses.dataclass
class Made:
    """What became of a file: functions kept, with their binaries by level, and the counts."""

    project: str
    path: str
    kept: list[tuple[CFunction, dict[str, str]]] = dataclasses.field(default_factory=list)
    files: Counter[str] = dataclasses.field(default_factory=Counter)
    functions: Counter[str] = dataclasses.field(default_factory=Counter)
    binaries: Counter[str] = dataclasses.field(default_factory=Counter)
    examples: list[tuple[str, str]] = dataclasses.field(default_factory=list)  # (reason, text)


class Books:
    """Counts what is kept and left out, and remembers what was seen, across files and splits."""

    def __init__(self, found: build.Projects):
        parts = ('files', 'functions', 'binaries', 'twins', 'rows')
        self._counts: dict[str, Counter[str]] = {part: Counter() for part in parts}
        self._counts['files'].update(found.skipped)
        self._projects = {project: Counter() for project in sorted(found.files)}
        self._examples: dict[str, list[str]] = {}
        self._sources: set[bytes] = set()
        self._binaries: dict[bytes, tuple[bytes, str, str]] = {}  # → source, level, split

    def rows(self, split: str, made: Made) -> Iterator[dict[str, Any]]:
        """Books one file and yields the rows of its functions that are not known yet."""
        for part in ('files', 'functions', 'binaries'):
            self._counts[part].update(getattr(made, part))
        for reason, text in made.examples:
            self._examples.setdefault(reason, []).append(text)
        local = self._projects[made.project]
        local.update(files=1, compiled=made.files['compiled'])
        local.update({key: made.functions[key] for key in ('found', 'commented')})
        for function, binaries in made.kept:
            key = content_key(function.source, function.name)
            if key in self._sources:
                self._counts['functions']['equal_source'] += 1
                continue
            self._sources.add(key)
            self._counts['functions']['kept'] += 1
            local.update({f'{split}_rows': len(binaries)})
            for level, binary in binaries.items():
                self._book_binary(binary, key, level, split)
                metadata = dict(path=made.path, label='', opt_level=level, language='c')
                row = dict(source=function.source, binary=binary, comment=function.comment)
                yield dict(row, metadata=dict(metadata, name=function.name))

    def _book_binary(self, binary: str, key: bytes, level: str, split: str) -> None:
        digest = hashlib.sha256(binary.encode()).digest()
        source, first_level, first_split = self._binaries.setdefault(digest, (key, level, split))
        self._counts['rows'][split] += 1
        twins = self._counts['twins']
        if source == key:
            twins['binary_equal_at_two_levels'] += first_level != level
        else:
            twins['binary_of_another_source'] += 1
            twins['binary_of_another_split'] += first_split != split

    def report(self) -> dict[str, Any]:
        counts = {part: dict(+counter) for part, counter in self._counts.items()}
        examples = {reason: texts[:_EXAMPLES] for reason, texts in self._examples.items()}
        projects = {name: dict(counter) for name, counter in self._projects.items()}
        return dict(counts, projects=projects, examples=examples)


def table(report: Mapping[str, Any]) -> str:
    """Returns a report of `prepare` as lines for a terminal."""
    lines = [f'{report["settings"]["compiler"]}, split by {report["settings"]["split_by"]}']
    lines += [report['note']] if report['note'] else []
    for part in ('files', 'functions', 'binaries', 'twins', 'rows'):
        counts = ', '.join(f'{key.replace("_", " ")} {n:,}' for key, n in report[part].items())
        lines.append(f'{part:<10}{counts}')
    width = max(map(len, report['projects']), default=0)
    for name, project in report['projects'].items():
        counts = ', '.join(f'{key.replace("_", " ")} {n:,}' for key, n in project.items())
        lines.append(f'  {name:<{width}}  {counts}')
    for reason, examples in report['examples'].items():
        lines.append(f'{reason.replace("_", " ")}, for one: {examples[0]}')
    return '\n'.join(lines)
