"""The page of a diagnosis: one HTML file that needs nothing else, plots drawn here as SVG."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import numpy as np
import torch
from PIL import Image

from muralist.eval.diagnose.examine import Diagnosis
from muralist.eval.diagnose.finding import Finding, Plot, Result

WIDTH, HEIGHT = 560, 170  # of a plot
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 8, 34  # its margins
STILL = 1280  # pixels at most that the frame is wide
POINTS = 700  # a longer curve is drawn by its largest values

STYLE = """
:root { color-scheme: light dark; --paper: #fbfaf7; --card: #fff; --ink: #1d2126; --soft: #5d6670; --line: #dcdcd6;
  --curve: #2f6db5; --bad: #b3261e; --good: #14632a; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #14171a; --card: #1c2024; --ink: #e8e6e1; --soft: #9aa3ad; --line: #343a41; --curve: #6ea8ef; --bad: #ff8a8a; --good: #8fdca5; } }
body { margin: 0 auto; max-width: 1180px; padding: 24px 20px;
  background: var(--paper); color: var(--ink); font: 15px/1.5 system-ui, "DejaVu Sans", sans-serif; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; }
h2 { font-size: 19px; margin: 0 0 10px; } h3 { font-size: 14px; margin: 12px 0 4px; font-weight: 600; }
p { margin: 4px 0; } .soft { color: var(--soft); }
section { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 18px; margin: 18px 0; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; vertical-align: top; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); } th { color: var(--soft); font-weight: 600; }
td.number { text-align: right; white-space: nowrap; } .bad { color: var(--bad); font-weight: 600; } .good { color: var(--good); }
.plots { display: flex; flex-wrap: wrap; gap: 4px 24px; } .plots > div { flex: 1 1 420px; min-width: 0; max-width: 560px; }
svg { width: 100%; height: auto; display: block; } svg text { fill: var(--soft); font-size: 11px; }
.axis { stroke: var(--line); } .curve { fill: none; stroke: var(--curve); stroke-width: 1.4; } .level { stroke: var(--bad); stroke-dasharray: 5 4; }
.mark { stroke: var(--bad); stroke-opacity: .35; }
.frame { position: relative; } .frame img { width: 100%; display: block; border-radius: 6px; } .frame svg { position: absolute; inset: 0; height: 100%; }
.frame line { stroke: #ff3bd4; stroke-width: 1.5; stroke-dasharray: 8 5; vector-effect: non-scaling-stroke; }
#lines:not(:checked) ~ .frame svg { display: none; }
"""


def render(diagnosis: Diagnosis, *, title: str, facts: Iterable[str] = ()) -> str:
    """The page; `title` and `facts` (size, frame rate, proxy) may hold any text."""
    found = [finding.name for finding in diagnosis.findings if finding.found]
    verdict = f"{len(found)} found: {', '.join(found)}" if found else "nothing found"
    parts = [
        f"<header><h1>{_text(title)}</h1><p class=soft>{_text(' · '.join(facts))}</p><p class={'bad' if found else 'good'}>{_text(verdict)}</p></header>",
        f"<section><h2>Findings</h2>{_table(diagnosis.findings)}</section>",
        f"<section><h2>Middle frame</h2>{_frame(diagnosis)}</section>",
        *(_curves(result) for result in diagnosis.results if result.plots),
    ]
    policy = "<meta http-equiv=Content-Security-Policy content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">"
    head = f"<!doctype html><html lang=en><meta charset=utf-8>{policy}<meta name=viewport content='width=device-width'>"
    return f"{head}<title>{_text(title)}: diagnosis</title><style>{STYLE}</style>{''.join(parts)}</html>\n"


def _text(text: str) -> str:
    """Text of any origin: escaped, and without what neither shows nor can be encoded."""
    return escape("".join(c if c.isprintable() else " " for c in text))


def _table(findings: list[Finding]) -> str:
    rows = "".join(
        f"<tr><td>{_text(f.name)}<td>{_state(f)}<td class=number>{'' if f.value is None else f'{f.value:.3g}'}<td class=number>{f.threshold:g}"
        f"<td class=soft>{_text(f.unit)}<td>{_text(f.sentence)}"
        for f in findings
    )
    return f"<table><thead><tr><th>artifact<th><th>value<th>threshold<th>unit<th></thead><tbody>{rows}</tbody></table>"


def _state(finding: Finding) -> str:
    if finding.found is None:
        return "<span class=soft>not told</span>"
    return "<span class=bad>found</span>" if finding.found else "<span class=good>no</span>"


def _frame(diagnosis: Diagnosis) -> str:
    """The still with lines where seams were found."""
    height, width = diagnosis.still.shape[:2]
    lines = {axis: sorted({x for f in diagnosis.findings if f.name.startswith("seams") for x in f.where.get(axis, [])}) for axis in ("x", "y")}
    drawn = "".join(f"<line x1={x} x2={x} y1=0 y2={height} />" for x in lines["x"]) + "".join(f"<line x1=0 x2={width} y1={y} y2={y} />" for y in lines["y"])
    image = f"<img alt='the middle frame of the video' src='data:image/jpeg;base64,{_jpeg(diagnosis.still)}'>"
    if not drawn:
        return f"<div class=frame>{image}</div>"
    overlay = f"<svg viewBox='0 0 {width} {height}' preserveAspectRatio=none aria-hidden=true>{drawn}</svg>"
    return f"<input type=checkbox id=lines checked> <label for=lines>show where seams were found</label><div class=frame>{image}{overlay}</div>"


def _jpeg(still: torch.Tensor) -> str:
    """A frame [H, W, 3] in [0, 1] as base64, reduced to STILL columns."""
    image = Image.fromarray((still.clamp(0, 1) * 255).round().byte().numpy())
    if image.width > STILL:
        image = image.resize((STILL, round(image.height * STILL / image.width)), Image.Resampling.LANCZOS)
    data = io.BytesIO()
    image.save(data, "JPEG", quality=90)
    return base64.b64encode(data.getvalue()).decode()


def _curves(result: Result) -> str:
    plots = "".join(f"<div><h3>{_text(plot.title)}</h3>{draw(plot)}</div>" for plot in result.plots)
    return f"<section><h2>{_text(result.finding.name.capitalize())}</h2><p>{_text(result.finding.sentence)}</p><div class=plots>{plots}</div></section>"


def draw(plot: Plot) -> str:
    """A plot as SVG."""
    x, y = _thinned(np.asarray(plot.x, dtype=float), np.nan_to_num(np.asarray(plot.y, dtype=float)))
    levels = [] if plot.level is None else [plot.level]
    low, high = min([*y, *levels, 0.0]), max([*y, *levels, 0.0])
    high = high if high > low else low + 1
    first, last = float(x[0]), max(float(x[-1]), float(x[0]) + 1)
    across = lambda v: LEFT + (v - first) / (last - first) * (WIDTH - LEFT - RIGHT)  # noqa: E731
    down = lambda v: HEIGHT - BOTTOM - (v - low) / (high - low) * (HEIGHT - TOP - BOTTOM)  # noqa: E731
    points = " ".join(f"{across(a):.1f},{down(b):.1f}" for a, b in zip(x, y))
    grid = "".join(
        f"<line class=axis x1={LEFT} x2={WIDTH - RIGHT} y1={down(v):.1f} y2={down(v):.1f} />{_label(LEFT - 6, down(v) + 4, v, 'end')}"
        for v in _ticks(low, high)
    )
    grid += "".join(_label(across(v), HEIGHT - BOTTOM + 14, v, "middle") for v in _ticks(first, last, 7))
    marks = "".join(f"<line class=mark x1={across(v):.1f} x2={across(v):.1f} y1={TOP} y2={HEIGHT - BOTTOM} />" for v in plot.marks)
    level = "".join(f"<line class=level x1={LEFT} x2={WIDTH - RIGHT} y1={down(v):.1f} y2={down(v):.1f} />" for v in levels)
    names = f"<text x={(LEFT + WIDTH - RIGHT) / 2} y={HEIGHT - 4} text-anchor=middle>{_text(plot.x_label)}</text>"
    names += f"<text transform='rotate(-90)' x={-(HEIGHT - BOTTOM) / 2} y=11 text-anchor=middle>{_text(plot.y_label)}</text>"
    curve = f"<polyline class=curve points='{points}' />"
    return f"<svg viewBox='0 0 {WIDTH} {HEIGHT}' role=img aria-label='{_text(plot.title)}'>{grid}{marks}{curve}{level}{names}</svg>"


def _label(x: float, y: float, value: float, anchor: str) -> str:
    return f"<text x={x:.1f} y={y:.1f} text-anchor={anchor}>{value:g}</text>"


def _ticks(low: float, high: float, count: int = 4) -> list[float]:
    """About `count` round numbers from `low` to `high`."""
    rough = (high - low) / count
    power = 10 ** np.floor(np.log10(rough))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= rough)
    return [round(float(v), 10) + 0.0 for v in np.arange(np.ceil(low / step) * step, high + step * 1e-6, step)]


def _thinned(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """A long curve by the value farthest from zero of each of POINTS pieces: peaks stay."""
    if len(x) <= POINTS:
        return x, y
    chosen = [piece[abs(y[piece]).argmax()] for piece in np.array_split(np.arange(len(x)), POINTS)]
    return x[chosen], y[chosen]
