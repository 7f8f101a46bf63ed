"""Run every notebook and write pages to read without Jupyter: `make notebooks` makes site/.

The pages need no network and no JavaScript: pictures and sounds are in them, and a panel is shown
as its still picture.
"""

from __future__ import annotations

import argparse
import re
import sys
from dataclasses import dataclass
from pathlib import Path

import nbformat
from jinja2 import Environment
from markupsafe import Markup
from nbclient import NotebookClient
from nbconvert import HTMLExporter
from nbformat import NotebookNode
from pygments.formatters import HtmlFormatter
from traitlets.config import Config

ROOT = Path(__file__).resolve().parents[1]
CELL_SECONDS = 300  # a cell that takes longer is stuck
# Without the widgets' own type, which is blank in a page that runs none: the next best is shown.
_SHOWN = ["text/html", "image/svg+xml", "image/png", "image/jpeg", "text/markdown", "text/plain"]

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{{ title }}</title>
<style>
body { font: 16px/1.55 system-ui, sans-serif; color: #222; max-width: 62rem; margin: 2rem auto;
       padding: 0 1rem; }
h1, h2, h3 { line-height: 1.25; }
h2 { margin-top: 2.2rem; }
a.anchor-link, .jp-InputPrompt, .jp-OutputPrompt, .prompt { display: none; }
pre { font: 13.5px/1.45 ui-monospace, monospace; overflow-x: auto; margin: 0; }
code { font-size: 0.9em; background: #f3f3f3; padding: 0.1em 0.25em; }
.highlight { border-left: 3px solid #8aa; padding: 0.6rem 0.8rem; margin: 0.8rem 0 0; }
.jp-OutputArea-output, .output_area { padding: 0.5rem 0.8rem; overflow-x: auto; }
.jp-OutputArea-output pre, .output_area pre { white-space: pre-wrap; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; }
table { border-collapse: collapse; font-size: 0.9rem; }
td, th { border: 1px solid #ddd; padding: 0.2rem 0.5rem; text-align: left; }
{{ colours }}
</style>
</head>
<body>
{% if notebooks is defined %}
<h1>{{ title }}</h1>
<p>Each notebook answers one question. These are its pages with the outputs of one run;
<code>make lab</code> opens the notebooks themselves, with sliders and buttons.</p>
<dl>
{% for notebook in notebooks %}
<dt><a href="{{ notebook.page }}">{{ notebook.title }}</a></dt>
<dd>{{ notebook.question }}</dd>
{% endfor %}
</dl>
{% else %}
<p><a href="index.html">All notebooks</a></p>
{{ body }}
{% endif %}
</body>
</html>
"""


@dataclass(frozen=True)
class Entry:
    """A notebook in the list of all.

    Attributes:
        page: its HTML file's name.
        title: its first heading.
        question: what it answers.
    """

    page: str
    title: str
    question: str


def make_site(notebooks: Path, out: Path) -> list[Entry]:
    """Run the notebooks of a folder in the order of their names, and write their pages.

    Args:
        notebooks: a folder with .ipynb files; the working directory of their kernels.
        out: where the pages and index.html go; made if it is missing.

    Returns:
        The list that index.html shows.

    Raises:
        CellExecutionError: a cell failed; nbclient's message holds the cell and its traceback.
    """
    out.mkdir(parents=True, exist_ok=True)
    entries = []
    for path in sorted(notebooks.glob("*.ipynb")):
        print(f"running {path.name} ...", file=sys.stderr, flush=True)
        notebook = nbformat.read(path, as_version=4)
        entry = read_entry(notebook, path.stem)
        NotebookClient(
            notebook,
            timeout=CELL_SECONDS,
            resources={"metadata": {"path": str(notebooks)}},
            store_widget_state=False,
            coalesce_streams=True,  # lines that a cell prints stay together
            extra_arguments=["--log-level=ERROR"],  # no warning about loopback from every kernel
        ).execute()
        body = Markup(to_body(notebook))
        (out / entry.page).write_text(_render(title=entry.title, body=body), encoding="utf-8")
        entries.append(entry)
    index = _render(title="The notebooks of diffbuf", notebooks=entries)
    (out / "index.html").write_text(index, encoding="utf-8")
    return entries


def read_entry(notebook: NotebookNode, stem: str) -> Entry:
    """Read title and question from a notebook's first cell.

    Args:
        notebook: nbformat 4.
        stem: of its file's name; also the title of a notebook that has none.
    """
    head = notebook.cells[0].source if notebook.cells else ""
    title = re.search(r"^# (.+)", head)
    question = re.search(r"\*\*Question:\*\* (.+)", head)
    return Entry(
        page=f"{stem}.html",
        title=title[1] if title else stem,
        question=question[1] if question else "",
    )


def to_body(notebook: NotebookNode) -> str:
    """Return a notebook that has been run as HTML, its links to notebooks as links to pages."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = re.sub(r"(\]\([\w/.-]+)\.ipynb(#[^)]*)?\)", r"\1.html\2)", cell.source)
    exporter = HTMLExporter(
        template_name="basic", config=Config({"NbConvertBase": {"display_data_priority": _SHOWN}})
    )
    body, _ = exporter.from_notebook_node(notebook)
    return str(body)


def _render(**values: object) -> str:
    colours = Markup(HtmlFormatter().get_style_defs(".highlight"))
    return Environment(autoescape=True).from_string(_PAGE).render(colours=colours, **values)


def main() -> None:
    """Read the command line and make the site."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--notebooks", type=Path, default=ROOT / "notebooks")
    parser.add_argument("--out", type=Path, default=ROOT / "site")
    arguments = parser.parse_args()
    make_site(arguments.notebooks.resolve(), arguments.out)
    print(f"open {arguments.out / 'index.html'}")


if __name__ == "__main__":
    main()
