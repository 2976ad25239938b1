"""Every Python block of the README and the docs runs, in order, in one namespace per file."""

import re
from pathlib import Path

import pytest
from problems import usual

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


FULL = [page for page in PAGES if page.stem in ("analyses", "estimators")]


@pytest.mark.parametrize("page", usual(PAGES[:1], PAGES, full=FULL), ids=lambda page: page.name)
def test_python_blocks_run(page, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)  # for the files that they write
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block, page.name, "exec"), namespace)
    if page.name == "README.md":
        printed = capsys.readouterr().out
        shown = blocks(page, "text")[0]
        for word in ("Gradient over 100 steps", "half-life", "reach", "10% sliding", "1% block", "full BPTT"):
            assert word in printed and word in shown


def test_readme_begins_with_the_two_commands():
    assert blocks(ROOT / "README.md", "sh") == [
        "pip install '.[cli]' && jbptt report\n",
        "pip install '.[test]' && pytest\n",
    ]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target
