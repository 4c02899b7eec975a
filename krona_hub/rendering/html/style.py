"""The style sheet of reports, and their only script, which sorts tables. Constants, independent of any file."""

from __future__ import annotations

STYLE = """
:root{color-scheme:light dark;--bg:#fff;--ink:#1b1f24;--soft:#57606a;--line:#d0d7de;--card:#f6f8fa;--heat:207,34,46;
--c0:#0a5cc2;--c1:#a33b00;--c2:#1a6e2e;--c3:#7a36c4;--dot:#c4123a}
@media (prefers-color-scheme:dark){:root{--bg:#0f1318;--ink:#e8ecf1;--soft:#a3adb8;--line:#38414c;--card:#181e26;
--heat:255,99,99;--c0:#6cb2ff;--c1:#ffa566;--c2:#6fd98a;--c3:#cba0ff;--dot:#ff7b95}}
*{box-sizing:border-box}
body{margin:0 auto;max-width:70rem;padding:1rem;background:var(--bg);color:var(--ink);
font:16px/1.5 system-ui,sans-serif;overflow-wrap:anywhere}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
p{margin:.4rem 0;max-width:48rem}.soft,figcaption,caption{color:var(--soft);font-size:.9rem}
.verdict{font-size:1.15rem;border-left:.3rem solid var(--c0);padding:.3rem .9rem;background:var(--card)}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
.pair>:only-child{max-width:40rem}
figure{margin:0;break-inside:avoid}svg{width:100%;height:auto;display:block}
svg text{fill:var(--ink);font:12px system-ui,sans-serif}svg .grid{stroke:var(--line)}svg .tick{fill:var(--soft)}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
caption{text-align:left;padding:.2rem 0}th,td{padding:.2rem .6rem;text-align:left;vertical-align:top;
border-bottom:1px solid var(--line);overflow-wrap:normal}th{background:var(--card)}.n{text-align:right}
th button{all:unset;cursor:pointer;font-weight:600}th button:focus-visible{outline:2px solid var(--c0)}
th[aria-sort=ascending] button::after{content:" ▲"}th[aria-sort=descending] button::after{content:" ▼"}
.sortable td{white-space:nowrap}.sortable td:last-child{white-space:normal;min-width:8rem}
.sortable td:first-child{white-space:normal;overflow-wrap:anywhere;min-width:9rem}
.block th{font-weight:400;color:var(--soft);background:none;padding-top:.7rem;white-space:normal;overflow-wrap:anywhere}
.facts th{white-space:nowrap;font-weight:600}.facts td{overflow-wrap:anywhere}
.heat{font-size:.8rem;margin-bottom:.8rem}
.heat td{text-align:right;padding:.1rem .3rem;background:rgba(var(--heat),calc(var(--e)*.0055))}
.heat th{font-weight:400;padding:.1rem .3rem}.heat td:not([style]){background:none;color:var(--soft)}
.samples td{border:0;padding:.2rem}.samples img{display:block;width:8rem;height:auto}
.samples thead th+th{width:8.4rem;font-weight:400;font-size:.8rem}
.strip{display:flex;flex-wrap:wrap;gap:.6rem;padding:0;margin:.2rem 0;list-style:none;font-size:.8rem}
.strip img{display:block;width:8rem;height:auto}.strip li{break-inside:avoid}
.key{display:flex;flex-wrap:wrap;gap:.2rem 1rem;padding:0;margin:.2rem 0;list-style:none;font-size:.9rem}
.key svg{display:inline-block;width:1.6rem;height:.8rem;margin-right:.3rem}
footer{margin:2rem 0 1rem;border-top:1px solid var(--line);padding-top:.5rem}
@media print{:root{--bg:#fff;--ink:#000;--soft:#444;--card:#fff}body{max-width:none;font-size:11px}
.scroll{overflow:visible}*{print-color-adjust:exact;-webkit-print-color-adjust:exact}tr{break-inside:avoid}}
"""

STYLE += ",".join(f".r{i} td:nth-child({i})" for i in range(1, 10)) + "{text-align:right}\n"

SCRIPT = """
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const join = () => {
    let block = "";
    for (const row of [...body.rows]) {
      if (!row.matches(".block")) row.cells[0].prepend(block);
      else {
        block = row.querySelector(".none") ? "" : row.textContent.trim() + ".";
        row.remove();
      }
    }
  };
  table.querySelectorAll("thead th").forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      if (body.querySelector(".block")) join();
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const text = (row) => row.cells[column]?.textContent ?? "";
      const number = (row) => parseFloat(text(row).replaceAll(",", ""));
      const order = head.classList.contains("n")
        ? (a, b) => (number(a) || 0) - (number(b) || 0)
        : (a, b) => text(a).localeCompare(text(b), undefined, { numeric: true });
      body.append(...[...body.rows].sort((a, b) => (up ? 1 : -1) * order(a, b)));
    });
  });
}
"""
