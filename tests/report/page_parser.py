"""Reads a page as a browser would: elements, attributes, text, scripts."""

from __future__ import annotations

import json
from functools import lru_cache
from html.parser import HTMLParser
from typing import Any

ADDRESSES = ("src", "href", "srcset", "action", "formaction", "poster", "data", "background", "xlink:href")


class Page(HTMLParser):
    """What a page holds; JavaScript does not run here, so that what stands in `noscript` is read too."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.ids: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.styles: list[str] = []
        self.policy = ""
        self.texts: list[str] = []
        self._inside: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attrs]
        found = dict(attrs)
        if found.get("id"):
            self.ids.append(str(found["id"]))
        if tag == "script":
            self.scripts.append((found, ""))
        if tag == "meta" and found.get("http-equiv") == "Content-Security-Policy":
            self.policy = str(found["content"])
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if self._inside and self._inside[-1] == tag:
            self._inside.pop()

    def handle_data(self, data: str) -> None:
        inside = self._inside[-1] if self._inside else ""
        if inside == "script":
            attributes, text = self.scripts[-1]
            self.scripts[-1] = (attributes, text + data)
        elif inside == "style":
            self.styles.append(data)
        else:
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All text that is shown; a number and its percent sign, which stay on one line, are apart by a plain space here."""
        return "".join(self.texts).replace("\u00a0", " ")

    def block(self, name: str) -> str:
        """The text of a script element that holds data."""
        return next(text for attributes, text in self.scripts if attributes.get("id") == name)

    @property
    def data(self) -> dict[str, Any]:
        """What the page's scripts draw from."""
        return dict(json.loads(self.block("report-data")))

    @property
    def addresses(self) -> list[str]:
        """Every address that the page names."""
        return [value for _, name, value in self.attributes if name in ADDRESSES]


@lru_cache(maxsize=8)
def read(text: str) -> Page:
    """Read a page once."""
    return Page(text)
