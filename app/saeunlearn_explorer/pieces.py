"""Pieces of HTML that the views share. Everything goes through markupsafe: what is not Markup is escaped."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from saeunlearn.evaluation.meaning import is_number
from saeunlearn.figures import png_data_uri

if TYPE_CHECKING:
    from matplotlib.figure import Figure

WIDE = 132.0  # width of the drawing of an interval, in its own units

Cell = Any  # a Markup, or anything whose text is escaped


def join(parts: Iterable[Any]) -> Markup:
    """The parts one after another; strings are escaped."""
    return Markup("").join(parts)


def note(message: Any, kind: str = "warn") -> Markup:
    """A message in a box. kind: "warn", "error" (read out at once by screen readers), "info"."""
    role = "alert" if kind == "error" else "status"
    return Markup('<div class="note {}" role="{}">{}</div>').format(kind, role, message)


def number(value: Any, digits: int = 3) -> str:
    """A number for reading: a few significant digits, no exponent between .0001 and 100,000; – for none."""
    if not is_number(value):
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if value and not 0.1 <= abs(value) < 1e5:
        return f"{value:.2g}"
    return f"{value:.{digits}f}" if abs(value) < 10 else f"{value:,.1f}"


def percent(value: Any) -> str:
    return f"{value:.1%}" if is_number(value) else "–"


def score(value: Any, metric: str | None) -> str:
    """A score in its metric's unit: a loss as it is, a share as per cent."""
    return number(value) if metric and metric.lower().startswith("nll") else percent(value)


def cards(items: Iterable[tuple[str, Any, Any, str]]) -> Markup:
    """(title, large value, small text, class) each."""
    one = Markup('<div class="card {}"><span>{}</span><b>{}</b><small>{}</small></div>')
    return Markup('<div class="cards">{}</div>').format(join(one.format(c, t, v, s) for t, v, s, c in items))


def table(head: Sequence[Any], rows: Iterable[Sequence[Cell]], *, right: Iterable[int] = (), label: str = "") -> Markup:
    """A table that scrolls sideways where it is too wide. `right`: numbers of the columns that hold numbers."""
    columns = set(right)

    def line(cells: Sequence[Cell], tag: str) -> Markup:
        made = (
            Markup("<{}{}>{}</{}>").format(Markup(tag), Markup(' class="r"' if i in columns else ""), c, Markup(tag))
            for i, c in enumerate(cells)
        )
        return Markup("<tr>{}</tr>").format(join(made))

    body = join(line(cells, "td") for cells in rows)
    return Markup(
        '<div class="scroll" tabindex="0" role="region" aria-label="{}"><table><thead>{}</thead><tbody>{}</tbody>'
        "</table></div>"
    ).format(label or "table", line(head, "th"), body)  # fmt: skip


def pairs(items: Iterable[tuple[Any, Any]]) -> Markup:
    """What and value, as a list of definitions."""
    rows = join(Markup("<div><dt>{}</dt><dd>{}</dd></div>").format(k, v) for k, v in items)
    return Markup('<dl class="pairs">{}</dl>').format(rows)


def fold(summary: Any, content: Any) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, content)


def under(value: Any, small: Any) -> Markup:
    """A value with something small below it."""
    return Markup('{}<span class="under">{}</span>').format(value, small)


def fingerprint(value: Any) -> Markup:
    return Markup('<code title="{0}">{1}</code>').format(value or "", str(value)[:16] if value else "–")


def bar(done: float | None, label: str) -> Markup:
    """A progress bar; None: working, but nobody knows how far."""
    value = Markup(' aria-valuenow="{:.0f}"').format(100 * done) if done is not None else Markup("")
    width = f"{100 * (1.0 if done is None else done):.1f}"
    return Markup(
        '<div class="progress{}" role="progressbar" aria-valuemin="0" aria-valuemax="100"{} aria-label="{}">'
        '<i style="width:{}%"></i></div>'
    ).format(" unknown" if done is None else "", value, label, width)


# --- drawings ----------------------------------------------------------------------------------------------


def whiskers(row: dict[str, Any], low: float, high: float, side: str) -> Markup:
    """Before (grey disc) and after (diamond in the colour of `side`) with their intervals, between low and high."""
    reach = (high - low) or 1.0

    def x(value: float) -> float:
        return 6 + (WIDE - 12) * (min(max(value, low), high) - low) / reach

    marks = [Markup('<line class="axis" x1="6" x2="{0}" y1="26" y2="26"/>').format(WIDE - 6)]
    if is_number(row.get("chance")):
        marks.append(Markup('<line class="chance" x1="{0:.1f}" x2="{0:.1f}" y1="1" y2="26"/>').format(x(row["chance"])))
    for when, y in (("before", 8), ("after", 19)):
        if not is_number(row.get(when)):
            continue
        ends: list[Any] = [row.get(f"{when}_low"), row.get(f"{when}_high")]
        if all(is_number(e) for e in ends):
            marks.append(Markup('<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{y}" y2="{y}"/>').format(
                f"range {when}", x(ends[0]), x(ends[1]), y=y))  # fmt: skip
        at = x(row[when])
        shape = '<circle cx="{0:.1f}" cy="{1}" r="4"/>' if when == "before" else (
            '<path d="M{0:.1f} {1}m-5 0l5 -5l5 5l-5 5z"/>')  # fmt: skip
        marks.append(Markup(f'<g class="{when}">{shape}</g>').format(at, y))
    said = f"before {number(row.get('before'))}, after {number(row.get('after'))}"
    return Markup('<svg class="whiskers {}" viewBox="0 0 {:.0f} 28" role="img" aria-label="{}">{}</svg>').format(
        side, WIDE, said, join(marks)
    )


def picture(fig: Figure, said: str) -> Markup:
    """A figure of the library; `said` stands for it where pictures are not seen."""
    return Markup('<img class="picture" alt="{}" src="{}">').format(said, png_data_uri(fig))


def box(kind: str, x: float, y: float, width: float, height: float, said: str) -> Markup:
    """A rectangle of a drawing, with what it says when pointed at."""
    return Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"><title>{}</title></rect>'
    ).format(kind, x, y, width, height, said)


def histogram(edges: Sequence[float], counts: Sequence[int], title: str, kind: str = "") -> Markup:
    """Counts between edges; the height is logarithmic, because most activations are small."""
    width, height = 260.0, 90.0
    top = math.log1p(max([*counts, 1]))
    step = (width - 12) / max(1, len(counts))
    parts = [Markup('<line class="axis" x1="6" x2="{}" y1="{y}" y2="{y}"/>').format(width - 6, y=height - 16)]
    for i, n in enumerate(counts):
        tall = (height - 26) * math.log1p(n) / top
        said = f"{number(edges[i])} … {number(edges[i + 1])}: {n:,}"
        parts.append(box(f"bar {kind}", 6 + i * step, height - 16 - tall, max(step - 1, 0.6), tall, said))
    ends = ((6, "start", edges[0]), (width - 6, "end", edges[-1])) if len(edges) else ()
    for x, anchor, value in ends:
        parts.append(Markup('<text x="{}" y="{}" style="text-anchor:{}">{}</text>').format(x, height - 3, anchor,
                                                                                           number(value)))  # fmt: skip
    return Markup(
        '<figure class="small"><figcaption>{}</figcaption><svg class="bars" viewBox="0 0 {} {}" role="img" '
        'aria-label="{}">{}</svg></figure>'
    ).format(title, width, height, f"{title}: {sum(counts):,} activations", join(parts))


# --- tokens ------------------------------------------------------------------------------------------------


def tokens(words: Sequence[str], values: Sequence[Any], *, largest: float | None = None, at: int | None = None,
           unit: str = "activation") -> Markup:  # fmt: skip
    """A text, token by token, shaded by its values: orange above zero, blue (and underlined) below.

    `largest`: the value of the darkest shade (default: the largest here); `at`: the token to frame.
    """
    numbers = [abs(float(v)) for v in values if is_number(v)]
    most = largest or max([*numbers, 0.0]) or 1.0
    parts = []
    for i, word in enumerate(words):
        v: Any = values[i] if i < len(values) else None
        share = min(1.0, abs(v) / most) if is_number(v) else 0.0
        classes = "t" + (" down" if is_number(v) and v < 0 and share > 0.02 else "") + (" at" if i == at else "")
        said = f"{unit} {number(v)}" if is_number(v) else "not scored"
        parts.append(Markup('<span class="{}" style="--s:{:.2f}" title="{}">{}</span>').format(
            classes, share, said, readable(word)))  # fmt: skip
    return Markup('<span class="tokens">{}</span>').format(join(parts))


def readable(word: str) -> str:
    """A token with what would not be seen made visible."""
    return word.replace("\n", "⏎").replace("\t", "⇥") or "∅"


def chip(word: str, value: Any = None, kind: str = "") -> Markup:
    """A token in a frame, spaces visible, with a number behind it."""
    small = Markup(" <small>{}</small>").format(number(value, 2)) if value is not None else ""
    return Markup('<span class="chip {}">{}{}</span>').format(kind, readable(word).replace(" ", "␣"), small)
