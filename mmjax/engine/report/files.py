"""Reads the files of a run for its report, whatever state they are in."""

import json
import math
from typing import Any

from etils import epath

from mmjax.engine import logs


class RunFiles:
    """The files of a run; `faults` lists those that could not be read."""

    def __init__(self, workdir: epath.Path) -> None:
        self.workdir = workdir
        self.faults: list[str] = []
        self.info = self._read('config.json')
        self.results = self._read('results.json')
        self.lines, unreadable = logs.read(workdir / 'metrics.jsonl')
        if unreadable:
            self.faults.append(f'metrics.jsonl: {unreadable} unreadable line(s) skipped')
        folder = workdir / 'figures'
        paths = folder.iterdir() if folder.exists() else ()
        self.figures = sorted(p for p in paths if p.suffix == '.png' and p.name[0] != '.')
        plan = self.info.get('plan')
        plan = plan if isinstance(plan, list) else []
        self.plan = [stage for stage in plan if isinstance(stage, dict) and 'name' in stage]
        self.step = max((line['step'] for line in self.lines), default=0)

    def _read(self, name: str) -> dict[str, Any]:
        path = self.workdir / name
        try:
            content = json.loads(path.read_text()) if path.exists() else {}
            if not isinstance(content, dict):
                raise ValueError(f'it holds a {type(content).__name__}, not an object')
            return content
        except (ValueError, OSError) as error:
            self.faults.append(f'{name} could not be read: {error}')
            return {}

    def verdict(self, value: object) -> tuple[str, str] | None:
        """Returns kind and sentence of a word that the task declares as a verdict."""
        verdicts = self.info.get('verdicts') or {}
        return verdicts.get(value) if isinstance(value, str) else None

    def finite(self, key: str) -> list[float]:
        """Returns the finite values of `key` in metrics.jsonl."""
        values = [number(line.get(key)) for line in self.lines]
        return [value for value in values if value is not None and math.isfinite(value)]


def number(value: object) -> float | None:
    """Returns a JSON number, or the string of one that is not finite, as float; else None."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return float(value) if isinstance(value, str) and value in ('nan', 'inf', '-inf') else None
