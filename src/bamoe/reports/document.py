"""A document as plain blocks, of which the HTML page and the Markdown are two renderings."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING

from bamoe.reports.markdown import code_block, escape, paragraph
from bamoe.reports.table import Table

if TYPE_CHECKING:
    from jinja2 import Template

FIGURES = "figures"  # the folder of a document's figures, beside its Markdown


@dataclass(frozen=True)
class Paragraph:
    """Text; a notice stands out."""

    text: str
    notice: bool = False


@dataclass(frozen=True)
class Subheading:
    """A heading below that of the section."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of points, each a few words in bold (or "") and a text."""

    points: Sequence[tuple[str, str]]


@dataclass(frozen=True)
class TableBlock:
    """A table; `label` names it for those who hear the page."""

    table: Table
    label: str
    caption: str = ""


@dataclass(frozen=True)
class Figure:
    """A plot: an SVG, the name of its file, and in words what it shows."""

    name: str
    svg: bytes
    alt: str
    caption: str = ""

    @property
    def data_uri(self) -> str:
        """The SVG as the source of an image; as an image it shares no ids with the other figures of the page."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


@dataclass(frozen=True)
class Figures:
    """Figures side by side where there is room."""

    figures: Sequence[Figure]


@dataclass(frozen=True)
class Code:
    """Text to be read as it is; `wrap` where its lines may be broken."""

    text: str
    language: str = "text"
    wrap: bool = False


@dataclass(frozen=True)
class Details:
    """Blocks that are shown when the reader asks for them."""

    summary: str
    blocks: Sequence[Block]


Block = Paragraph | Subheading | Bullets | TableBlock | Figures | Code | Details


@dataclass(frozen=True)
class Section:
    """Blocks under a heading."""

    heading: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """What a link to the section ends in."""
        return "-".join(self.heading.lower().split())


@dataclass(frozen=True)
class Document:
    """A title, blocks before the first heading, and sections."""

    title: str
    blocks: Sequence[Block]
    sections: Sequence[Section]

    def figures(self) -> list[Figure]:
        """All figures, in their order."""
        blocks = [*self.blocks, *(block for section in self.sections for block in section.blocks)]
        return [figure for block in blocks for figure in _figures(block)]

    def markdown(self) -> str:
        """The document for GitHub; its figures are in the folder `FIGURES`."""
        parts = [f"# {escape(self.title)}", *map(_markdown, self.blocks)]
        for section in self.sections:
            parts += [f"## {escape(section.heading)}", *map(_markdown, section.blocks)]
        return "\n\n".join(part.strip("\n") for part in parts) + "\n"

    def html(self) -> str:
        """The document as one page that loads nothing."""
        return _template().render(document=self)


def _figures(block: Block) -> list[Figure]:
    if isinstance(block, Figures):
        return list(block.figures)
    return [figure for part in block.blocks for figure in _figures(part)] if isinstance(block, Details) else []


def _markdown(block: Block) -> str:
    match block:
        case Paragraph(text, notice):
            return f"> {paragraph(text)}" if notice else paragraph(text)
        case Subheading(text):
            return f"### {escape(text)}"
        case Bullets(points):
            return "\n".join(f"- **{escape(lead)}**: {escape(text)}" if lead else f"- {escape(text)}"
                             for lead, text in points)  # fmt: skip
        case TableBlock(table, _, caption):
            return f"{table.markdown()}\n{paragraph(caption)}" if caption else table.markdown()
        case Figures(figures):
            images = [f"![{escape(figure.alt)}]({FIGURES}/{figure.name})" for figure in figures]
            captions = [figure.caption and f"\n\n{paragraph(figure.caption)}" for figure in figures]
            return "\n\n".join(image + caption for image, caption in zip(images, captions, strict=True))
        case Code(text, language):
            return code_block(text, language)
        case Details(summary, blocks):
            inside = "\n\n".join(_markdown(part).strip("\n") for part in blocks)
            return f"<details>\n<summary>{escape(summary)}</summary>\n\n{inside}\n\n</details>"


@cache
def _template() -> Template:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("bamoe", "reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["kind"] = lambda block: type(block).__name__
    return environment.get_template("report.html.jinja")
