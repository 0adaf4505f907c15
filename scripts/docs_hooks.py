"""What the documentation site takes from the code: option tables, the method table, links out of ``docs/``.

``<!-- options: NAME -->`` in a page becomes the facts and the options of that method, ``<!-- methods -->`` the table of
all methods; the menu lists the pages of methods in its order. Each notebook becomes a page. A link to a file outside
``docs/``, as it works in a checkout, becomes the name of the file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

from llm_accel.method_table import describe, markdown
from llm_accel.methods import BUILT_IN
from llm_accel.methods.base import to_text

_KINDS = {"kv": "KV cache", "sparse": "Sparse attention", "visual": "Visual tokens"}
_OPTIONS = re.compile(r"<!-- options: (\w+) -->")
_OUTSIDE = re.compile(
    r"\[([^\]]+)\]\((?:\.\./)+((?:benchmarks|llm_accel|tests|training|scripts|examples|README|CONTRIBUTING|SECURITY)[\w./-]*)\)"
)


def options(name: str) -> str:
    """Paper, class and all options of a method; KeyError for one that does not exist."""
    entry = describe()[name]
    needs = "needed" if entry["needs_query"] else "not needed"
    rows = [
        f"| `{key}` | `{to_text(option['default']) or '()'}` | {option['help']} |"
        for key, option in entry["options"].items()
    ]
    facts = [
        f"**Paper:** {entry['paper']}  ",
        f"**Class:** `llm_accel.{entry['class']}`, on the command line `{name}:option=value,...`  ",
        f"**Cuts:** {entry['cuts']}; the question is {needs} when the prompt is compressed; "
        f"{'frees memory' if entry['frees_memory'] else 'frees no memory'}.",
    ]
    return "\n".join([*facts, "", "| option | default | |", "|---|---|---|", *rows])


def as_page(book: dict[str, Any]) -> str:
    """The notebook as a page of the documentation."""
    parts = []
    for cell in book["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        for output in cell.get("outputs", ()):
            data = output.get("data", {})
            if "image/png" in data:
                parts.append(f"![output](data:image/png;base64,{data['image/png']})")
            else:
                parts.append("```text\n" + "".join(output.get("text", data.get("text/plain", ()))).rstrip() + "\n```")
    return "\n\n".join(parts) + "\n"


def method_pages(folder: Path) -> dict[str, list[str]]:
    """Kind of method -> the pages in ``folder`` that show its options, in the order of the table."""
    texts = {f"methods/{page.name}": page.read_text(encoding="utf-8") for page in sorted(folder.glob("*.md"))}
    found: dict[str, dict[str, None]] = {title: {} for title in _KINDS.values()}
    for cls in BUILT_IN:
        kind = _KINDS.get(cls.__module__.split(".")[2], _KINDS["kv"])
        found[kind].update({name: None for name, text in texts.items() if f"<!-- options: {cls.name} -->" in text})
    return {title: list(pages) for title, pages in found.items()}


def on_config(config: Any) -> Any:
    """Called by mkdocs once: the menu of the methods."""
    methods = next(entry for entry in config.nav if "Methods" in entry)
    pages = method_pages(Path(config.docs_dir) / "methods")
    methods["Methods"] = [{title: listed} for title, listed in pages.items()]
    return config


def on_files(files: Any, *, config: Any) -> Any:
    """Called by mkdocs once: a page for each notebook."""
    for notebook in [file for file in files if file.src_uri.endswith(".ipynb")]:
        page = as_page(json.loads(notebook.content_string))
        link = f"[This page as a notebook]({notebook.name}.ipynb), with the outputs of its last run.\n"
        name = notebook.src_uri.removesuffix("ipynb") + "md"
        files.append(File.generated(config, name, content=page + "\n" + link))
    return files


def on_page_markdown(text: str, **_: Any) -> str:
    """Called by mkdocs for each page."""
    text = _OPTIONS.sub(lambda match: options(match[1]), text).replace("<!-- methods -->", markdown())
    text = re.sub(r"(?<=\]\()(\S*notebooks/\w+)\.ipynb(?=\))", r"\1.md", text)
    return _OUTSIDE.sub(lambda match: f"{match[1]} (`{match[2]}`)", text)
