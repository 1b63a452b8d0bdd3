"""What the site needs beside mkdocs: ``llms.txt``, and docstrings without marks of Sphinx."""

import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import Files
from mkdocs.structure.nav import Navigation, Section
from mkdocs.structure.pages import Page

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data):`~?\.?([^`]+)`")


class PlainRoles(griffe.Extension):
    """Turn ``:func:`name``` of docstrings into code."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = _ROLE.sub(lambda found: f"`{found[1]}`", obj.docstring.value)


def on_nav(nav: Navigation, config: MkDocsConfig, files: Files) -> None:
    """Remember the order of the pages."""
    config.extra["nav"] = nav


def on_post_build(config: MkDocsConfig) -> None:
    """Write ``llms.txt`` (llmstxt.org), which lists all pages, and their Markdown beside them."""
    lines = [f"# {config.site_name}", "", f"> {config.site_description}."]
    for item in config.extra["nav"]:
        pages = item.children if isinstance(item, Section) else [item]
        lines += ["", f"## {item.title}", ""]
        for page in pages:
            target = page.url
            if ":::" not in page.markdown:  # docstrings are in the page alone
                target = page.file.src_uri
                Path(config.site_dir, target).write_text(page.markdown, encoding="utf-8")
            lines.append(f"- [{page.title}]({target}): {_summary(page)}")
    Path(config.site_dir, "llms.txt").write_text("\n".join([*lines, ""]), encoding="utf-8")


def _summary(page: Page) -> str:
    """The first sentences of a page's text, without links and emphasis."""
    paragraphs = re.sub(r"```.*?```", "", page.markdown, flags=re.DOTALL).split("\n\n")
    plain = next(text for text in paragraphs if re.match(r"[\w*`\[]", text.strip()))
    plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[*`]", lambda found: found[1] or "", plain)
    first, *more = re.split(r"(?<=\.) ", " ".join(plain.split()))
    return f"{first} {more[0]}" if more and len(first) < 80 else first
