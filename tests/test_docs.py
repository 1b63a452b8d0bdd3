"""The site of the documentation, as mkdocs builds it."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlparse

import pytest
import torch
from PIL import Image
from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

import lightning_modules.public
import mctf_hf
from cli.commands import COMMANDS
from tests.helpers import REPOSITORY, docs_script

# Attributes by which a page loads something while it is shown.
LOADED = {"script": "src", "img": "src", "iframe": "src", "source": "src", "object": "data"}
RELATIONS = {"stylesheet", "preload", "prefetch", "preconnect", "icon", "modulepreload"}


class Page(HTMLParser):
    """The places of a page, what it links to, and what it loads."""

    def __init__(self, file: Path):
        super().__init__()
        self.ids: set[str] = set()
        self.links: list[str] = []
        self.loaded: list[str] = []
        self.feed(file.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        self.ids |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag in LOADED and given.get(LOADED[tag]):
            self.loaded.append(given[LOADED[tag]])
        if tag == "link" and RELATIONS & set(given.get("rel", "").split()):
            self.loaded.append(given["href"])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("docs") / "site"
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    assert "WARNING" not in built.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[Path, Page]:
    return {file: Page(file) for file in site.rglob("*.html")}


def broken(link: str, file: Path, pages: dict[Path, Page]) -> bool:
    """Whether a link within the site leads nowhere."""
    path, place = urldefrag(link)
    target = (file.parent / unquote(path)).resolve() if path else file
    if target.is_dir():
        target /= "index.html"
    return not target.exists() or bool(place and unquote(place) not in pages[target].ids)


def test_links_and_their_places_exist(pages: dict[Path, Page]) -> None:
    within = [
        (file, link)
        for file, page in pages.items()
        if file.name != "404.html"  # its links are those of a server's root
        for link in page.links
        if not urlparse(link).scheme
    ]
    assert len(within) > 500
    assert not [(file.name, link) for file, link in within if broken(link, file, pages)]


def test_nothing_is_loaded_from_other_hosts(site: Path, pages: dict[Path, Page]) -> None:
    loaded = [link for page in pages.values() for link in page.loaded]
    assert any(link.endswith(".js") for link in loaded)
    assert not [link for link in loaded if urlparse(link).netloc]
    styles = [file.read_text() for file in site.rglob("*.css")]
    assert styles
    assert not re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)]*", "".join(styles))


def test_the_reference_has_every_public_name(pages: dict[Path, Page]) -> None:
    told = set().union(*(page.ids for file, page in pages.items() if "api" in file.parts))
    public = {f"mctf_hf.{name}" for name in mctf_hf.__all__}
    public |= {f"lightning_modules.{name}" for name in lightning_modules.public.__all__}
    assert len(public) > 30
    assert not public - told


def test_docstrings_have_no_marks_of_sphinx_there(site: Path) -> None:
    for file in (site / "api").rglob("*.html"):
        assert not re.findall(r":(?:func|class|meth|mod|attr):", file.read_text()), file


def test_llms_txt_tells_of_every_page(site: Path) -> None:
    lines = (site / "llms.txt").read_text().splitlines()
    assert lines[0] == "# MCTF" and lines[2].startswith("> ")
    listed = dict(re.findall(r"^- \[.+\]\((\S+)\): (.+\.)$", "\n".join(lines), re.MULTILINE))
    assert all((site / target).exists() for target in listed)
    sources = (REPOSITORY / "docs").rglob("*.md")
    assert set(listed) == {told_as(str(file.relative_to(REPOSITORY / "docs"))) for file in sources}


def told_as(source: str) -> str:
    """Pages of the reference by their place, for their Markdown has no docstrings."""
    in_reference = source.startswith("api/")
    return re.sub(r"(index)?\.md$", "/", source).replace("//", "/") if in_reference else source


@pytest.mark.parametrize("file", sorted(file.name for file in REPOSITORY.glob("*.md")))
def test_files_beside_the_docs_link_to_what_is_there(
    file: str, site: Path, pages: dict[Path, Page]
) -> None:
    links = re.findall(r"\]\(((?!https?:)[^)]+)\)", (REPOSITORY / file).read_text())
    assert file != "README.md" or len(links) > 15
    for link in links:
        path, place = urldefrag(link)
        assert (REPOSITORY / path).exists(), link
        if place:
            page = Path(path).relative_to("docs").with_suffix("")
            folder = page.parent if page.name == "index" else page
            assert place in pages[site / folder / "index.html"].ids, link


def test_every_picture_is_shown(pages: dict[Path, Page]) -> None:
    shown = {Path(link).name for page in pages.values() for link in page.loaded}
    drawn = {file.name for file in (REPOSITORY / "docs").rglob("*.webp")}
    assert drawn and drawn <= shown
    binary = [file for file in (REPOSITORY / "docs").rglob("*") if file.suffix in (".webp", ".jpg")]
    assert sum(file.stat().st_size for file in binary) < 1_500_000


def test_the_pictures_can_be_drawn_again(tmp_path: Path) -> None:
    config = Dinov2Config(
        hidden_size=24, num_attention_heads=2, num_hidden_layers=12, image_size=32, patch_size=4
    )
    torch.manual_seed(0)
    Dinov2Model(config).save_pretrained("tiny")
    size = {"height": 32, "width": 32}
    BitImageProcessorPil(size=size, crop_size=size, do_center_crop=False).save_pretrained("tiny")
    module = docs_script("make_pictures")
    pictures = (REPOSITORY / "docs" / "pictures").glob("*.webp")
    assert set(module.METHODS) == {file.stem for file in pictures}
    module.METHODS = {name: module.METHODS[name] for name in ("tome", "evit", "own")}
    try:
        module.main("tiny", "drawn")
    finally:
        mctf_hf.reducers.REDUCERS.pop("by_norm", None)
    assert {file.stem for file in Path("drawn").iterdir()} == set(module.METHODS)
    picture = Image.open("drawn/tome.webp")
    assert picture.width > 4 * 200 and len(picture.getcolors(1 << 24)) > 100
    assert picture.tobytes() != Image.open("drawn/evit.webp").tobytes()


def test_every_command_has_its_row() -> None:
    text = (REPOSITORY / "docs" / "commands.md").read_text()
    rows = "\n".join(re.findall(r"^\| (`.*?) \|", text, re.MULTILINE))
    assert not [command for command in COMMANDS if f"`{command}`" not in rows]


def test_the_nav_has_no_page_twice() -> None:
    text = (REPOSITORY / "mkdocs.yml").read_text()
    named = re.findall(r"[\w/]+\.md", text)
    assert len(named) == len(set(named))
