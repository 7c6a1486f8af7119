"""The pages: their links lead somewhere, and the fields and modules that they name are there."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from proteus_jax import config

PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
FIELDS = {field for base in ("base", "eval/base") for field in config.fields_of(base)}
# What a page may write in the place of a name.
EXAMPLES = {"FIELD", "method.temperature", "nonsense", "configs/eval/norm.py"}
EXAMPLES |= {"methods/direction.py", "evaluation/protocols/norm.py"}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_fields_are_there(page: Path) -> None:
    for field in re.findall(r"--config\.([A-Za-z_.]*\w)", page.read_text()):
        known = field in FIELDS or any(each.startswith(f"{field}.") for each in FIELDS)
        assert known or field in EXAMPLES, field


@pytest.mark.parametrize("page", ["architecture.md", "extending.md"])
def test_modules_are_there(page: str) -> None:
    """Files by their paths, from the package or from the repository."""
    text = (ROOT / "docs" / page).read_text()
    for name in re.findall(r"`([\w/]+/[\w./]*)`", text):
        places = (ROOT / name, ROOT / "proteus_jax" / name)
        assert name in EXAMPLES or any(place.exists() for place in places), name


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 150


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs" / "index.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert page.name == "index.md" or f"]({page.name})" in index, page.name
