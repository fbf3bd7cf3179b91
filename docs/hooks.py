"""What mkdocs does beyond its extensions: MathML, fields, and the repository's other documents.

A page links to those by their place in the repository (``../CONTRIBUTING.md``), so that its links
work there too.
"""

import html
import re
from pathlib import Path
from typing import Any

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from tables import tables

ROOT = Path(__file__).parents[1]
DOCUMENTS = ("ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "examples/benchmarks/*.md")
PICTURES = ("examples/benchmarks/*.png",)
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', flags=re.DOTALL)


def on_config(config: Any) -> Any:
    """List the repository's documents in the navigation."""
    records = sorted(path.name for path in ROOT.glob(DOCUMENTS[-1]) if path.name != "README.md")
    config["nav"] += [
        {"Benchmarks": [f"examples/benchmarks/{name}" for name in ("README.md", *records)]},
        {"Development": list(DOCUMENTS[:-1])},
    ]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add these documents and their pictures, each at its place in the repository."""
    for pattern in (*DOCUMENTS, *PICTURES):
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, **kwargs: Any) -> str:
    """Fill in tables. Docs are at the top here, one folder above their place in the repository."""
    if page.file.src_uri == "fields.md":
        for name, table in tables().items():
            markdown = markdown.replace(f"{{{{ {name} }}}}", table)
    if page.file.generated_by is None:
        return markdown.replace("](../", "](")
    return markdown.replace("](docs/", "](").replace("](../../docs/", "](../../")


def on_page_content(content: str, **kwargs: Any) -> str:
    """Turn formulas into MathML, which browsers show without a script."""

    def mathml(found: re.Match[str]) -> str:
        display = "inline" if found[2] == "(" else "block"
        made = convert(html.unescape(found[3]).strip(), display=display)
        if "\\" in made or "<mi>&</mi>" in made:
            raise PluginError(f"latex2mathml does not know all of {found[3]}")
        return made

    return FORMULA.sub(mathml, content)
