"""A Sphinx extension: the first use of each of the glossary's terms on a page is a link to it."""

import re
from collections.abc import Iterator

from docutils import nodes
from sphinx.application import Sphinx

# A link inside these would be a link in a link, or disturb code, formulas and headings.
CLOSED = (nodes.reference, nodes.title, nodes.literal, nodes.literal_block, nodes.raw, nodes.math)
PAGES = ("notebooks/", "exercises/", "benchmarks/", "index")


def terms_of(app: Sphinx) -> dict[str, str]:
    """Each term in small letters, and the name of its place on the glossary's page."""
    objects = app.env.get_domain("std").get_objects()
    return {name.lower(): place for name, _, kind, _, place, _ in objects if kind == "term"}


def pattern_of(terms: list[str]) -> re.Pattern:
    """Any of these words, the longest first, in the singular or the plural."""
    words = "|".join(re.escape(term) for term in sorted(terms, key=len, reverse=True))
    return re.compile(rf"(?<![\w-])({words})(s?)(?![\w-])", re.I)


def open_texts(doctree: nodes.document) -> Iterator[nodes.Text]:
    """The texts of a page in which a link may stand."""
    for text in list(doctree.findall(nodes.Text)):
        node = text.parent
        while node is not None and not isinstance(node, CLOSED):
            node = node.parent
        if node is None:
            yield text


def linked(text: str, places: dict[str, str], page: str) -> list[nodes.Node]:
    """A text with links on the terms in `places`, which lose each one that is used."""
    if not places or not (found := pattern_of(list(places)).search(text)):
        return [nodes.Text(text)]
    place = places.pop(found[1].lower())
    link = nodes.reference("", found[0], refuri=f"{page}#{place}", classes=["term"], internal=True)
    before = [nodes.Text(text[: found.start()])] if found.start() else []
    return [*before, link, *linked(text[found.end() :], places, page)]


def link_terms(app: Sphinx, doctree: nodes.document, name: str) -> None:
    """Sphinx calls this for each page."""
    if not name.startswith(PAGES):
        return
    places = terms_of(app)
    page = app.builder.get_relative_uri(name, "glossary")
    for text in open_texts(doctree):
        pieces = linked(text.astext(), places, page)
        if len(pieces) > 1 or not isinstance(pieces[0], nodes.Text):
            text.parent.replace(text, pieces)


def setup(app: Sphinx) -> dict[str, bool]:
    """Sphinx calls this."""
    app.connect("doctree-resolved", link_terms)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
