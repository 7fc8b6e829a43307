"""The pages tell the truth: their Python runs, their links lead somewhere, their commands name flags that are there."""
import contextlib
import functools
import io
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch

from common.masks import apply_mask

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "tests" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def python_blocks(page):
    return re.findall(r"^```python\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page):
    """[(script, [flags])] of the Python scripts that a page runs or names with flags; shell variables filled in."""
    text = page.read_text().replace("\\\n", " ")
    for name, value in re.findall(r'^ +(\w+)="?(.*?)"?$', text, re.MULTILINE):
        text = text.replace(f"${name}", value)
    found = re.findall(r"(?:^|[ `])((?:\w+/)*\w+\.py)\b([^`#\n]*)", text, re.MULTILINE)
    return [(script, re.findall(r"(?<!\S)--[a-z][a-z-]*", rest)) for script, rest in found]


@functools.cache
def help_of(script):
    """What `python <script> --help` prints; run in this process, where PyTorch is loaded already."""
    text, arguments = io.StringIO(), sys.argv
    sys.argv = [script, "--help"]
    try:
        with contextlib.redirect_stdout(text), pytest.raises(SystemExit):
            runpy.run_path(str(ROOT / script), run_name="__main__")
    finally:
        sys.argv = arguments
    return text.getvalue()


def anchors(page):
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_the_library_page_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "notebook"}
    for page in ROOT / "docs" / "library.md", ROOT / "docs" / "formats.md":
        for block in python_blocks(page):
            exec(compile(block, page.name, "exec"), namespace)
    model, ticket, images = (namespace[name] for name in ("model", "ticket", "images"))
    for name, survives in ticket["masks"].items():  # after training in one's own loop
        assert torch.equal(model.get_parameter(name) != 0, survives)
    model.load_state_dict(ticket["init"])
    apply_mask(model, ticket["masks"])
    assert torch.equal(namespace["pruned"](images), model(images))


def test_each_example_of_the_library_page_has_at_most_15_lines():
    blocks = python_blocks(ROOT / "docs" / "library.md")
    assert len(blocks) >= 5 and max(len(block.splitlines()) for block in blocks) <= 15


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text().splitlines()) <= 130


@every_page
def test_links_lead_somewhere(page):
    for target, _, anchor in re.findall(r"\]\((?!https?:)([^)#\s]*)(#?)([^)\s]*)\)", page.read_text()):
        linked = page.parent / target if target else page
        assert linked.exists(), target
        assert not anchor or anchor in anchors(linked), f"{target}#{anchor}"


@every_page
def test_commands_name_scripts_and_flags_that_are_there(page, monkeypatch):
    for folder in "bench", "study":
        monkeypatch.syspath_prepend(ROOT / folder)
    for script, flags in commands(page):
        assert (ROOT / script).exists() or (page.parent / script).exists(), script
        if flags and script != "setup.py":
            unknown = [flag for flag in flags if not re.search(rf"{flag}(?![\w-])", help_of(script))]
            assert not unknown, f"{script} does not know {unknown}"
