"""Reading a page as a strict parser does: every tag closed in its turn, and the text that a reader sees."""

import re
from html.parser import HTMLParser

VOID = {"meta", "img", "br", "hr", "link", "input"}
UNSEEN = {"head", "nav"}


class Page(HTMLParser):
    """The tags, ids, attributes and visible words of a page; an AssertionError where it is not well formed."""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.words, self.headings, self.bold = [], [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attributes):
        names = [name for name, _ in attributes]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice: {names}"
        assert not (self.open and self.open[-1] == "p" and tag in {"p", "table", "div", "figure", "ul", "pre", "h2"})
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "img":
            self.words += dict(attributes)["alt"].split()
        if re.fullmatch(r"h[1-6]", tag):
            self.headings.append(int(tag[1]))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes {self.open[-1]}"
        self.open.pop()

    def handle_data(self, data):
        if not UNSEEN & set(self.open):
            self.words += data.split()
            if "strong" in self.open:
                self.bold.append(data)

    @property
    def text(self):
        return " ".join(self.words)

    def attributes(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]
