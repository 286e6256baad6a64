"""The notebooks as pages of the site, with the outputs that are stored in them."""

import base64
import html
import json
import re
from pathlib import Path

from mkdocs.structure.files import File

FOLDER = Path(__file__).resolve().parent.parent / "notebooks"
FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$([^$\n]+?)\$(?!\w)", re.S)
SAFE = re.compile(r"<(?:div|pre)\b.*</(?:div|pre)>\s*", re.S)  # what the notebooks' own reports write


def on_files(files, config):
    """Add a page for each notebook, and a file for each of its figures."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        notebook = json.loads(path.read_text(encoding="utf-8"))
        page, figures = as_page(notebook, path.stem)
        files.append(File.generated(config, f"notebooks/{path.stem}.md", content=page))
        for name, content in figures.items():
            files.append(File.generated(config, f"notebooks/{name}", content=content))
    return files


def as_page(notebook, stem):
    """Write a notebook as Markdown; return it with the figures (name -> PNG) that it shows."""
    parts, figures = [], {}
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(FORMULA.sub(_formula, source))
            continue
        parts.append(_fenced(source, "python"))
        for number, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{stem}-{cell['id']}-{number}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![figure of the cell above]({name})")
            elif "text/html" in data and SAFE.fullmatch("".join(data["text/html"])):
                parts.append(f'<div class="output">{"".join(data["text/html"]).strip()}</div>')
            else:
                parts.append(_fenced("".join(output.get("text", data.get("text/plain", ""))).rstrip(), "text"))
    head = f"*This page is `notebooks/{stem}.ipynb`, with the outputs of `make notebooks`.*"
    return "\n\n".join([parts[0], head, *parts[1:]]) + "\n", figures


def _fenced(text, language):
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _formula(found):
    """Write TeX as MathML, which browsers show by themselves; as code where the converter is not installed."""
    tex, display = (found[1], "block") if found[1] else (found[2], "inline")
    try:
        from latex2mathml.converter import convert
    except ImportError:
        return f"<code>{html.escape(tex.strip())}</code>"
    return convert(tex.strip(), display=display)
