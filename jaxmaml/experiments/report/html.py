"""A report as one page of HTML that needs no other file."""

import base64
import html

from jaxmaml.experiments.report.blocks import Block, Listing, Paragraph, Picture, Report, Table

MAX_HALF = 5
"""Up to this number of columns, a table of numbers has room beside a picture."""

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --soft: #f3f5f7;
  --line: #d5dae0; --dim: #57606a; --mark: #fff4d6; --link: #0969da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --paper: #14171b; --soft: #1e2329; --line: #3a424c; --dim: #a2abb5;
    --mark: #40350f; --link: #6cb1ff; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif; }
header, main, footer { max-width: 76rem; margin: 0 auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; line-height: 1.25; margin: 1.5rem 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.2rem 0 .8rem; padding-bottom: .3rem;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1rem; margin: .5rem 0; padding: 0;
  list-style: none; }
a { color: var(--link); }
.notice { background: var(--mark); border-radius: .4rem; padding: .6rem .8rem;
  overflow-wrap: anywhere; }
.blocks { display: grid; gap: 1.2rem 1.6rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 27rem), 1fr)); }
.blocks > * { min-width: 0; margin: 0; grid-column: 1 / -1; }
.blocks > .half { grid-column: auto; }
figure { margin: 0; min-width: 0; max-width: 42rem; }
figure img { display: block; width: 100%; height: auto; background: #fff; border-radius: .4rem;
  border: 1px solid var(--line); }
figcaption, caption { color: var(--dim); font-size: .9rem; text-align: left; }
figcaption { margin-top: .4rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; }
.scroll:focus-visible, pre:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
caption { caption-side: top; padding-bottom: .4rem; }
caption span { position: sticky; left: 0; display: inline-block; max-width: min(72rem, 92vw); }
th, td { padding: .3rem .8rem; border-bottom: 1px solid var(--line); text-align: right;
  white-space: nowrap; }
thead th { background: var(--soft); }
th:first-child { text-align: left; }
tbody th { font-weight: 600; position: sticky; left: 0; background: var(--paper); }
.words td { text-align: left; }
.words thead th { text-align: left; }
pre { margin: .5rem 0 0; padding: .8rem; background: var(--soft); border-radius: .4rem;
  overflow: auto; max-height: 30rem; font: .82rem/1.45 ui-monospace, monospace; }
summary { cursor: pointer; overflow-wrap: anywhere; }
footer { color: var(--dim); font-size: .9rem; padding-top: 1.5rem; padding-bottom: 2rem; }
@media print { pre { max-height: none; } }
"""

_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{notice}<nav aria-label="Parts of the report"><ul>
{links}
</ul></nav>
</header>
<main>
{parts}
</main>
<footer>{footer}</footer>
</body>
</html>
"""  # noqa: E501


def render(report: Report) -> str:
    """Returns the page. Every text of the report is escaped."""
    links, parts = [], []
    for number, part in enumerate(report.parts, start=1):
        title, anchor = html.escape(part.title), f"part-{number}"
        blocks = "\n".join(map(_block, part.blocks))
        links.append(f'<li><a href="#{anchor}">{title}</a></li>')
        parts.append(
            f'<section aria-label="{title}">\n<h2 id="{anchor}">{title}</h2>\n'
            f'<div class="blocks">\n{blocks}\n</div>\n</section>'
        )
    return _PAGE.format(
        title=html.escape(report.title),
        style=_STYLE,
        notice=f'<p class="notice" role="status">{html.escape(report.notice)}</p>\n'
        if report.notice
        else "",
        links="\n".join(links),
        parts="\n".join(parts),
        footer=html.escape(report.footer),
    )


def _block(block: Block) -> str:
    match block:
        case Paragraph(text):
            return f"<p>{html.escape(text)}</p>"
        case Table():
            return _table(block)
        case Listing():
            return _listing(block)
        case Picture():
            return _picture(block)


def _table(table: Table) -> str:
    # A cell that is not a number is a word, and reads from the left.
    kind = "" if all(map(_is_number, _cells(table))) else ' class="words"'
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in table.header)
    rows = "\n".join(
        f'<tr><th scope="row">{html.escape(row[0])}</th>'
        + "".join(f"<td>{html.escape(cell)}</td>" for cell in row[1:])
        + "</tr>"
        for row in table.rows
    )
    caption = html.escape(table.caption)
    place = "scroll" if kind or len(table.header) > MAX_HALF else "scroll half"
    return (
        f'<div class="{place}" role="region" tabindex="0" aria-label="{caption}">\n<table{kind}>\n'
        f"<caption><span>{caption}</span></caption>\n<thead><tr>{head}</tr></thead>\n"
        f"<tbody>\n{rows}\n</tbody>\n</table>\n</div>"
    )


def _cells(table: Table) -> list[str]:
    return [cell for row in table.rows for cell in row[1:]]


def _is_number(cell: str) -> bool:
    return cell[:1].isdigit() or cell[:1] in ("-", "") or cell == "not finite"


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.png).decode()
    return (
        '<figure class="half">\n'
        f'<img alt="{html.escape(picture.alt)}" src="data:image/png;base64,{data}">\n'
        f"<figcaption>{html.escape(picture.caption)}</figcaption>\n</figure>"
    )


def _listing(listing: Listing) -> str:
    state = " open" if listing.is_open else ""
    summary = html.escape(listing.summary)
    return (
        f"<details{state}>\n<summary>{summary}</summary>\n"
        f'<pre tabindex="0" role="region" aria-label="{summary}">{html.escape(listing.text)}</pre>\n'
        "</details>"
    )
