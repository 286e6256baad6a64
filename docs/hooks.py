"""What the site does to links: those to notebooks lead to their pages, those to other files become names."""

import re
from posixpath import dirname, join, normpath, relpath

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Point links to notebooks at their pages; replace links to other files outside of the site by their texts."""

    def outside(match):
        target = match[2]
        if "://" in target:
            return match[0]
        place = normpath(join(dirname(page.file.src_uri), target))
        if place.startswith("../notebooks/") and place.endswith(".ipynb"):
            own = relpath(place.removeprefix("../").replace(".ipynb", ".md"), dirname(page.file.src_uri) or ".")
            return f"[{match[1]}]({own})"
        return match[1] if place.startswith("..") else match[0]

    return LINK.sub(outside, markdown)
