"""Plain text as Markdown that shows exactly that text."""

from __future__ import annotations

import re

# Markup of GitHub's Markdown inside a line; an underscore within a word is none.
_MARKUP = re.compile(r"[\\`*\[\]|~$]|(?<!\w)_|_(?!\w)")
# Markup at the start of a line: headings, quotes, lists, rules.
_BLOCK = re.compile(r"^(\s*)([#+=-]|\d+(?=[.)]))")


def escape(text: str) -> str:
    """Text within a line or a table's cell: no markup, no HTML, no line break."""
    text = " ".join(text.split())
    for character, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;")):
        text = text.replace(character, entity)
    return _MARKUP.sub(r"\\\g<0>", text)


def paragraph(text: str) -> str:
    """Text as a paragraph of its own."""
    return _BLOCK.sub(_escaped_start, escape(text))


def inline_code(text: str) -> str:
    """Text as a code span, line breaks as spaces."""
    text = " ".join(text.split())
    if not text:
        return ""
    fence = "`" * (_longest_run(text) + 1)
    padding = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{fence}{padding}{text}{padding}{fence}"


def code_block(text: str, language: str = "text") -> str:
    """Text as a fenced block."""
    fence = "`" * max(3, _longest_run(text) + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}"


def _longest_run(text: str) -> int:
    return max((len(run) for run in re.findall("`+", text)), default=0)


def _escaped_start(match: re.Match[str]) -> str:
    indent, start = match.groups()
    return f"{indent}{start}\\" if start.isdigit() else f"{indent}\\{start}"
