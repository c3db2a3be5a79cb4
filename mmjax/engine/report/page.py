"""Builds the HTML of a report: one self-contained page of escaped text, tables and images."""

import base64
import functools
import html
import json
from collections.abc import Container, Iterable, Mapping, Sequence

_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_CSS = """
:root { color-scheme: light; --ink: #1d2733; --muted: #66727f; --line: #dfe5eb; --soft: #f5f7fa;
  --accent: #2f63c9; }
* { box-sizing: border-box; }
body { margin: 0; background: #fff; color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, 'Segoe UI', Roboto, 'Noto Sans', sans-serif; }
main { max-width: 1180px; margin: 0 auto; padding: 40px 28px 72px; }
h1 { font-size: 30px; line-height: 1.2; margin: 0 12px 0 0; letter-spacing: -.01em;
  overflow-wrap: anywhere; }
h2 { font-size: 20px; margin: 48px 0 14px; padding-bottom: 6px;
  border-bottom: 1px solid var(--line); }
h3 { font-size: 15px; margin: 26px 0 8px; }
p { margin: 8px 0; } .muted { color: var(--muted); } .muted:empty { display: none; }
.top { display: flex; flex-wrap: wrap; align-items: center; gap: 6px; }
code, pre { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
pre { background: var(--soft); border: 1px solid var(--line); border-radius: 8px;
  padding: 10px 14px; white-space: pre-wrap; overflow-wrap: anywhere; }
.badge { border-radius: 99px; padding: 2px 12px; font-size: 13px; font-weight: 600; }
.good { background: #e2f4ea; color: #0f6b3f; } .warn { background: #fdf0d8; color: #8a5800; }
.bad { background: #fde4e1; color: #a3211a; }
.note { border-left: 4px solid #e5a93a; background: #fdf7ea; padding: 8px 14px; margin: 14px 0;
  border-radius: 0 8px 8px 0; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(165px, 1fr)); gap: 12px;
  margin: 22px 0 0; }
.card { border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 24px; line-height: 1.25; letter-spacing: -.01em;
  overflow-wrap: anywhere; font-variant-numeric: tabular-nums; }
.card span { color: var(--muted); font-size: 13px; display: block; }
.strip { display: flex; gap: 3px; margin: 14px 0 18px; }
.strip div { min-width: 6px; padding: 6px 10px; color: #fff; border-radius: 6px; font-size: 13px;
  white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin: 8px 0 4px; font-variant-numeric: tabular-nums;
  font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--muted); font-size: 13px;
  border-bottom: 2px solid var(--line); vertical-align: bottom; }
td { border-bottom: 1px solid var(--line); vertical-align: top; overflow-wrap: anywhere; }
th, td { padding: 6px 22px 6px 0; } td.n, th.n { text-align: right; white-space: nowrap; }
tr.best td { background: #eef4ff; font-weight: 600; }
.frozen { color: #9aa5b1; } .trains { color: var(--accent); font-weight: 600; }
.charts { display: grid; grid-template-columns: 1fr 1fr; gap: 22px 26px; }
figure { margin: 0; break-inside: avoid; min-width: 0; }
figure.wide { grid-column: 1 / -1; }
figure img { width: 100%; height: auto; display: block; }
figcaption { font-size: 13px; color: var(--muted); overflow-wrap: anywhere; }
figcaption b { color: var(--ink); font-size: 14px; }
.images figure { margin: 18px 0 30px; }
.images img { width: auto; max-width: 100%; border: 1px solid var(--line); border-radius: 8px; }
details { margin: 10px 0; } summary { cursor: pointer; color: var(--accent); }
@media (max-width: 760px) { .charts { grid-template-columns: 1fr; } main { padding: 24px 16px; } }
@media print { main { max-width: none; padding: 0; } h2 { break-after: avoid; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; } }
"""
_CELL = 240  # characters of a value shown in a table
STAGE_COLOURS = ('#2f63c9', '#138a6b', '#8a4fc4', '#b8602b', '#3f8fb0', '#a63a66')


class Markup(str):
    """Text that is HTML already; any other text is escaped."""


def escape(value: object) -> Markup:
    """Escapes anything that is not Markup; undecodable characters become question marks."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(str(value).encode('utf-8', 'replace').decode()))


def join(parts: Iterable[object]) -> Markup:
    return Markup(''.join(map(escape, parts)))


def element(name: str, *children: object, class_: str = '', **attributes: str) -> Markup:
    """Returns <name …>children</name>; an empty attribute is left out."""
    pairs = {'class': class_, **attributes}
    words = ''.join(f' {key}="{escape(value)}"' for key, value in pairs.items() if value)
    return Markup(f'<{name}{words}>{join(children)}</{name}>')


heading = functools.partial(element, 'h2')
note = functools.partial(element, 'p', class_='note')
muted = functools.partial(element, 'p', class_='muted')


def details(words: str, *children: object) -> Markup:
    """Returns a section that opens with a click on its summary."""
    return element('details', element('summary', words), *children)


def table(
    head: Sequence[object],
    rows: Iterable[Sequence[object]],
    *,
    numeric: Container[int] = (),
    best: Container[int] = (),
) -> Markup:
    """Returns a table; `numeric` columns align right, `best` rows stand out."""
    align = lambda column: 'n' if column in numeric else ''
    cells = lambda name, row: join(
        element(name, show(cell), class_=align(i)) for i, cell in enumerate(row)
    )
    body = [
        element('tr', cells('td', row), class_='best' if i in best else '')
        for i, row in enumerate(rows)
    ]
    parts = element('thead', element('tr', cells('th', head))), element('tbody', *body)
    return element('div', element('table', *parts), class_='scroll')


def image(
    content: bytes, kind: str, title: str, caption: str = '', *, wide: bool = False
) -> Markup:
    """Returns a figure with an image of MIME type `kind` inside the page itself."""
    source = f'data:{kind};base64,{base64.b64encode(content).decode("ascii")}'
    tag = Markup(f'<img alt="{escape(title)}" src="{source}">')
    words = element('figcaption', element('b', title), f' · {caption}' if caption else '')
    # A chart has its title above, any other image its caption below.
    parts = (words, tag) if kind == 'image/svg+xml' else (tag, words)
    return element('figure', *parts, class_='wide' if wide else '')


def cards(items: Iterable[tuple[str, object, str]]) -> Markup:
    """Returns boxes of (label, value, remark)."""
    boxes = [
        element(
            'div',
            element('span', label),
            element('b', show(value)),
            element('span', show(remark)),
            class_='card',
        )
        for label, value, remark in items
    ]
    return element('div', *boxes, class_='cards')


def strip(stages: Sequence[tuple[str, float]]) -> Markup:
    """Returns a bar of the stages (name, updates), as wide as they are long."""
    total = sum(steps for _, steps in stages) or 1
    boxes = [
        element(
            'div',
            f'{name} · {steps:,.0f}',
            title=f'{name}: {steps:,.0f} updates',
            style=f'flex: {max(steps / total, 0.01):.4f} 1 0; '
            f'background: {STAGE_COLOURS[i % len(STAGE_COLOURS)]}',
        )
        for i, (name, steps) in enumerate(stages)
    ]
    return element('div', *boxes, class_='strip')


def document(title: str, body: Iterable[Markup]) -> str:
    """Returns the whole page; its policy forbids scripts and anything from outside."""
    head = (
        f'<meta charset="utf-8"><meta name="viewport" content="width=device-width">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<title>{escape(title)}</title><style>{_CSS}</style>'
    )
    main = element('main', *body)
    return f'<!doctype html>\n<html lang="en"><head>{head}</head>\n<body>{main}</body></html>\n'


def show(value: object) -> str:
    """Formats a value: '–' for None, four digits of a float, thousands apart in an integer."""
    if isinstance(value, Markup):
        return value
    if isinstance(value, bool | Mapping | list):
        value = json.dumps(value, ensure_ascii=False)
    if isinstance(value, float) and abs(value) < 1e6 and (value.is_integer() or abs(value) >= 1e4):
        value = round(value)
    if isinstance(value, int | float):
        return f'{value:,}' if isinstance(value, int) else f'{value:.4g}'
    words = '–' if value is None else str(value)
    return words if len(words) <= _CELL else words[: _CELL - 1] + '…'
