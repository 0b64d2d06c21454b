# SPDX-License-Identifier: Apache-2.0
"""A document of headed sections, as Markdown beside its plots or as one static HTML page."""

import base64
from dataclasses import dataclass
from functools import cache
from importlib import resources
from urllib.parse import quote

from jinja2 import Environment, StrictUndefined, Template

from harprune.reporting.tables import Table


@dataclass(frozen=True)
class Plot:
    """A picture (SVG) with the file it lies in and a sentence for those who cannot see it."""

    path: str
    caption: str
    svg: bytes

    @property
    def source(self) -> str:
        """The picture as a data URI, so that a page needs no other file."""
        return "data:image/svg+xml;base64," + base64.b64encode(self.svg).decode()


@dataclass(frozen=True)
class Section:
    """A heading with what stands below it; `code` is set as it is."""

    heading: str
    table: Table | None = None
    plot: Plot | None = None
    text: str = ""
    code: str = ""


@dataclass(frozen=True)
class Document:
    """A title, the sentences that open it, what the reader is warned of, and the sections."""

    title: str
    lead: tuple[str, ...]
    warnings: tuple[str, ...]
    sections: tuple[Section, ...]

    def markdown(self) -> str:
        """GitHub's Markdown; plots are links to their files."""
        parts = [f"# {self.title}", *self.lead]
        parts += [f"> **Warning:** {warning}" for warning in self.warnings]
        parts += [part for section in self.sections for part in _markdown(section)]
        return "\n\n".join(parts) + "\n"

    def html(self) -> str:
        """One page that needs nothing else."""
        return _template().render(document=self)


def _markdown(section: Section) -> list[str]:
    parts = [f"## {section.heading}", section.text]
    parts += [section.table.markdown()] if section.table else []
    parts += [f"![{section.plot.caption}]({quote(section.plot.path)})"] if section.plot else []
    parts += [f"```sh\n{section.code}\n```"] if section.code else []
    return [part for part in parts if part]


@cache
def _template() -> Template:
    source = resources.files("harprune.reporting").joinpath("page.html.j2").read_text("utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string(source)
