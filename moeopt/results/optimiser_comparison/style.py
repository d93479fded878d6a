"""The page's style sheet: light, dark and print."""

from __future__ import annotations

from collections.abc import Sequence

LIGHT = ("#0072b2", "#c44e00", "#00795a", "#b0478a", "#946200", "#2f8fcf", "#5f6670", "#6a3d9a")
DARK = ("#5cb2ee", "#ff9257", "#35c79b", "#ea9fcd", "#efb73e", "#a5dcff", "#b6bdc6", "#bfa3f3")
"""Okabe and Ito's hues and a violet, each at least 3 : 1 against the page."""
STYLE = """
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--ink);
  font:15px/1.5 Inter,system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1108px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:27px;line-height:1.2;letter-spacing:-.015em;margin:0 0 14px;overflow-wrap:anywhere}
h2{font-size:18px;letter-spacing:-.01em;margin:40px 0 10px;overflow-wrap:anywhere}
dl{display:flex;flex-wrap:wrap;gap:10px 30px;margin:0;padding:12px 0;border-block:1px solid var(--grid)}
dt{color:var(--muted);font-size:12.5px}dd{margin:0;overflow-wrap:anywhere}
.conclusions ul{margin:0;padding:14px 20px 14px 36px;background:var(--card);border-left:4px solid var(--c0);
  border-radius:0 6px 6px 0}

.conclusions li:first-child{font-weight:600}.conclusions li{margin:4px 0;overflow-wrap:anywhere}
.notes,.small,figcaption{color:var(--muted);font-size:13px}
.notes ul{margin:0;padding-left:18px}.notes li{margin:3px 0}
figure{margin:14px 0 26px;break-inside:avoid}figcaption{margin:2px 0 0 0;max-width:82ch}
svg{display:block;width:100%;height:auto;overflow:visible;font-variant-numeric:tabular-nums}
svg text{font-size:12.5px;fill:var(--ink)}svg .tick{fill:var(--muted);font-size:12px}svg .label{fill:var(--muted)}
.middle{text-anchor:middle}.end{text-anchor:end}svg .name{font-weight:600}
.grid{stroke:var(--grid);fill:none}.axis,.tickmark{stroke:var(--rule);fill:none}
.line{fill:none;stroke-width:2.2;stroke-linejoin:round}.seed{fill:none;stroke-width:1;opacity:.55}
.other{fill:none;stroke:var(--other);stroke-width:1}.band{opacity:.16;stroke:none}.leader{fill:none;opacity:.6}
.whisker{stroke-width:2;opacity:.45}.dot{opacity:.8}.median{stroke:var(--ink);stroke-width:2.5}
.line:hover{stroke-width:3.4}.seed:hover{opacity:1;stroke-width:2}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-size:13.5px;font-variant-numeric:tabular-nums}
th{color:var(--muted);font-weight:500;text-align:right;vertical-align:bottom;padding:5px 0 5px 14px;
  border-bottom:1px solid var(--rule)}
td{text-align:right;padding:5px 0 5px 14px;border-bottom:1px solid var(--grid);white-space:nowrap}
th:first-child,td:first-child{text-align:left;padding-left:0}
.pairlist :is(th,td):nth-child(2),.studies :is(th,td):nth-child(2),.settings :is(th,td):nth-child(2){
  text-align:left}
td:first-child,.studies td:nth-child(2),.pairlist td:nth-child(2){white-space:normal;overflow-wrap:anywhere;
  min-width:190px}
.settings td{white-space:normal;vertical-align:top}
code{font:12px/1.5 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}
.key{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:8px}
.matrix{font-size:12.5px}.matrix td,.matrix th{padding-left:6px;overflow-wrap:anywhere}
.matrix td:first-child{min-width:110px}
.cell{display:block;padding:3px 6px;border-radius:4px}.cell small{display:block;color:var(--muted);font-size:11px}
.won{background:var(--won)}.lost{background:var(--lost)}
details{margin:12px 0}summary{cursor:pointer;color:var(--muted)}summary:hover{color:var(--ink)}
"""
PRINT = """
body{font-size:10pt}main{max-width:none;padding:0}h2{break-after:avoid}table{font-size:8pt}
tr,.conclusions{break-inside:avoid}
.conclusions ul{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.key,.cell,svg{-webkit-print-color-adjust:exact;print-color-adjust:exact}
details::details-content{content-visibility:visible;block-size:auto}
summary{list-style:none;color:var(--ink);font-weight:600}
td:first-child,.studies td:nth-child(2),.pairlist td:nth-child(2),.matrix td:first-child{min-width:0}
.matrix{font-size:7pt}.matrix td,.matrix th{padding-left:2px}.cell{padding:2px}.cell small{font-size:6.5pt}
.scroll{overflow:visible}@page{margin:14mm}
"""


def sheet(optimisers: int) -> str:
    """All of it, for so many optimisers."""

    def theme(colours: Sequence[str], **others: str) -> str:
        named = {f"c{i}": colour for i, colour in enumerate(colours)} | others
        return ";".join(f"--{name}:{value}" for name, value in named.items())

    light = theme(
        LIGHT, bg="#ffffff", ink="#1b1f24", muted="#59626d", grid="#eaecef", rule="#c9ced6", card="#f5f7f9",
        other="#c6ccd4", won="#d8efe4", lost="#fbe2d5",
    )  # fmt: skip
    dark = theme(
        DARK, bg="#14171b", ink="#e4e8ec", muted="#9aa4af", grid="#272c33", rule="#454d57", card="#1c2026",
        other="#4c545e", won="#173d2f", lost="#4a2a18",
    )  # fmt: skip
    hover = "".join(
        f"svg:has(.s{i}:hover) .line:not(.s{i}){{opacity:.18}}svg:has(.s{i}:hover) .name:not(.s{i}){{opacity:.35}}"
        for i in range(min(optimisers, 32))
    )
    return (
        f":root{{{light}}}@media(prefers-color-scheme:dark){{:root{{{dark}}}}}{STYLE}{hover}"
        f"@media print{{:root{{{light}}}{PRINT}}}"
    )
