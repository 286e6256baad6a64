"""What the site does to a page: links to files outside of the documentation become the files' names."""

import re
from posixpath import dirname, join, normpath

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s#]+)(#[^)\s]*)?\)")


def on_page_markdown(markdown, page, config, files):
    """Replace links that lead out of the documentation, which the site does not hold, by their texts."""

    def outside(match):
        target = match[2]
        if "://" in target:
            return match[0]
        return match[1] if normpath(join(dirname(page.file.src_uri), target)).startswith("..") else match[0]

    return LINK.sub(outside, markdown)
