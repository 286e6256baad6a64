"""Show what docstrings write for Python and Sphinx as Markdown: a griffe extension."""

import re
from typing import Any

import griffe

EXAMPLE = re.compile(r"(?:^>>> .*\n?(?:^(?!\s*$).*\n?)*)+", re.MULTILINE)
ROLE = re.compile(r":(?:meth|class|func|mod|data|attr|exc):`~?([^`]+)`")


class Docstrings(griffe.Extension):
    """Fences examples, from ``>>>`` to the next empty line, and shows Sphinx's roles as code."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite one docstring."""
        if obj.docstring is not None:
            value = ROLE.sub(r"`\1`", re.sub(r"\s*# doctest: \+\w+", "", obj.docstring.value))
            obj.docstring.value = EXAMPLE.sub(lambda found: f"```pycon\n{found[0].rstrip()}\n```\n", value)
