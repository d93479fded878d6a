"""One HTML page with plotly figures that needs nothing else: no network, no file; light, dark and on paper.

Figures are drawn with the page's own inlined plotly.js; nothing but that and a few lines of the page's own may run (its
content security policy names both by their hashes). Text, grid and background follow the reader's colour scheme by the
style sheet; lines and marks have colours that are legible on white and on black.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Iterable, Mapping, Sequence

from moeopt.report.figures import style
from moeopt.showing import line

SCRIPT = """
const figures = JSON.parse(document.getElementById("figures").textContent);
const options = {displaylogo: false, responsive: true, modeBarButtonsToRemove: ["select2d", "lasso2d"]};
for (const [id, figure] of Object.entries(figures)) Plotly.newPlot(id, figure.data, figure.layout, options);
const resize = width => Object.keys(figures).forEach(id => Plotly.relayout(id, {width, autosize: !width}));
addEventListener("beforeprint", () => resize(680));  // of A4 and Letter, within the margins
addEventListener("afterprint", () => resize(null));
"""
THEMES = {
    "light": "--bg:#fff;--ink:#1b1f24;--muted:#59626d;--grid:#e2e5e9;--rule:#c9ced6;--card:#f5f7f9;--won:#d8efe4;"
    "--lost:#fbe2d5;--accent:#0072b2",
    "dark": "--bg:#14171b;--ink:#e4e8ec;--muted:#9aa4af;--grid:#2e343c;--rule:#454d57;--card:#1c2026;--won:#173d2f;"
    "--lost:#4a2a18;--accent:#5cb2ee",
}
SHEET = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:15px/1.5 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1108px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:27px;line-height:1.2;letter-spacing:-.015em;margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:18px;letter-spacing:-.01em;margin:40px 0 10px;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:10px 30px;margin:0;padding:12px 0;border-block:1px solid var(--grid)}
dt{color:var(--muted);font-size:12.5px}dd{margin:0;overflow-wrap:anywhere}
.conclusions ul{margin:0;padding:14px 20px 14px 36px;background:var(--card);border-left:4px solid var(--accent);
  border-radius:0 6px 6px 0}
.conclusions li:first-child{font-weight:600}.conclusions li{margin:4px 0;overflow-wrap:anywhere}
.notes,.small,figcaption{color:var(--muted);font-size:13px}
.notes ul{margin:0;padding-left:18px}.notes li{margin:3px 0}
figure{margin:14px 0 26px;break-inside:avoid}figcaption{margin:2px 0 0 0;max-width:82ch}
.scroll{overflow-x:auto}.wide{min-width:760px}
.js-plotly-plot .main-svg text{fill:var(--ink)!important}
.js-plotly-plot [class$=tick] text{fill:var(--muted)!important}
.js-plotly-plot .hoverlayer text{fill:#fff!important}
.js-plotly-plot .gridlayer path{stroke:var(--grid)!important}
.js-plotly-plot :is([class*=lines-above],path.ticks){stroke:var(--rule)!important}
.js-plotly-plot .modebar-btn path{fill:var(--muted)!important}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{color:var(--muted);font-weight:500;text-align:right;vertical-align:bottom;padding:5px 0 5px 14px;
  border-bottom:1px solid var(--rule)}
td{text-align:right;padding:5px 0 5px 14px;border-bottom:1px solid var(--grid);white-space:nowrap}
td.text{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:150px}th.text{text-align:left}
:is(th,td):first-child{padding-left:0}
code{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:8px}
.matrix{font-size:12.5px}.matrix :is(td,th){padding-left:6px;overflow-wrap:anywhere}
.cell{display:block;padding:3px 6px;border-radius:4px}.cell small{display:block;color:var(--muted);font-size:11px}
.won{background:var(--won)}.lost{background:var(--lost)}
details{margin:12px 0}summary{cursor:pointer;color:var(--muted)}summary:hover{color:var(--ink)}
"""
PRINT = """
body{font-size:10pt}main{max-width:none;padding:0}h2{break-after:avoid}table{font-size:8pt}
tr,.conclusions{break-inside:avoid}.modebar{display:none}
*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}
summary{list-style:none;color:var(--ink);font-weight:600}td.text{min-width:0}
.matrix{font-size:7pt}.matrix :is(td,th){padding-left:2px}.cell{padding:2px}.cell small{font-size:6.5pt}
.scroll{overflow:visible}.wide{min-width:0}@page{margin:14mm}
"""


def page(title: str, body: str, figures: Mapping[str, style.Figure]) -> str:
    """The page.

    Args:
        title: of the window, as plain text.
        body: HTML, in which text of others is escaped (`escape`).
        figures: by the id of the element of the body that each is drawn into, see `place`; without any, nothing runs.
    """
    scripts: list[str] = []
    if figures:
        from plotly.offline import get_plotlyjs

        scripts = [get_plotlyjs(), SCRIPT]
    copies = {name: style.on_any_background(style.plotly().Figure(figure)) for name, figure in figures.items()}
    drawn = (f"{json.dumps(name)}:{figure.to_json()}" for name, figure in copies.items())
    data = f"{{{','.join(drawn)}}}".replace("<", "\\u003c")  # so that no name in it ends the script
    hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    policy = "default-src 'none'; style-src 'unsafe-inline'; img-src data: blob:; script-src " + (
        " ".join(f"'sha256-{value}'" for value in hashes) or "'none'"
    )
    themed = (
        f":root{{{THEMES['light']}}}@media(prefers-color-scheme:dark){{:root{{{THEMES['dark']}}}}}"
        f"{SHEET}@media print{{:root{{{THEMES['light']}}}{PRINT}}}"
    )
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<title>{escape(title)}</title><link rel="icon" href="data:,">'
        f"<style>{themed}</style></head>\n<body><main>\n{body}\n</main>\n"
        f'<script type="application/json" id="figures">{data}</script>\n'
        + "".join(f"<script>{script}</script>\n" for script in scripts)
        + "</body></html>\n"
    )


def escape(text: str, most: int = 120) -> str:
    """Text of others for HTML, in an attribute too."""
    return html.escape(line(text, most), quote=True)


def place(name: str, figure: style.Figure, caption: str = "", *, wide: bool = False) -> str:
    """Where the page draws a figure, as high as its layout says; a wide one scrolls on a narrow screen."""
    height, kind = figure.layout.height or style.HEIGHT, "wide" if wide else "plot"
    plot = f'<div id="{name}" class="{kind}" style="height:{height}px"></div>'
    told = f"<figcaption>{escape(caption, 2000)}</figcaption>" if caption else ""
    return f'<figure><div class="scroll">{plot}</div>{told}</figure>'


def section(title: str, body: str = "", kind: str = "") -> str:
    return f'<section class="{kind}"><h2>{escape(title)}</h2>{body}</section>'


def details(summary: str, body: str) -> str:
    return f"<details><summary>{escape(summary)}</summary>{body}</details>"


def bullets(texts: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(text, 4000)}</li>" for text in texts) + "</ul>"


def table(head: Sequence[str], rows: Iterable[Sequence[str]], *, kind: str = "", texts: Sequence[int] = (0,)) -> str:
    """A table that scrolls where it is wide.

    Args:
        head: names of columns, as plain text.
        rows: cells, HTML already.
        kind: its class.
        texts: columns that hold text and not numbers.
    """

    def cells(tag: str, values: Iterable[str]) -> str:
        marked = ((value, ' class="text"' if i in texts else "") for i, value in enumerate(values))
        return "<tr>" + "".join(f"<{tag}{mark}>{value}</{tag}>" for value, mark in marked) + "</tr>"

    top, body = cells("th", map(escape, head)), "".join(cells("td", row) for row in rows)
    return f'<div class="scroll"><table class="{kind}"><thead>{top}</thead><tbody>{body}</tbody></table></div>'
