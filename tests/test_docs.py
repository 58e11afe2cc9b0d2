"""What the docs say is what there is."""

import re
import runpy
from pathlib import Path

import pytest
from typer.testing import CliRunner

from llm_clf.cli import app

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])


def test_settings_page_is_the_one_that_the_code_makes() -> None:
    page = runpy.run_path(str(ROOT / "scripts" / "settings_table.py"))
    assert (ROOT / "docs" / "settings.md").read_text(encoding="utf-8") == page["render"]()


def shell_commands() -> list[tuple[str, list[str]]]:
    """Return the llm-clf commands in the pages' shell blocks, a line continued by a backslash joined."""
    found = []
    for page in PAGES:
        for block in re.findall(r"```sh\n(.*?)```", page.read_text(encoding="utf-8"), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = line.split("#")[0].split()
                if "llm-clf" in words[:1]:
                    found.append((page.name, words[1:]))
    return found


def test_the_docs_show_commands() -> None:
    assert len(shell_commands()) >= 5


@pytest.mark.parametrize(("page", "words"), shell_commands(), ids=lambda value: " ".join(value)[:60])
def test_commands_in_the_docs_exist_with_their_options(page: str, words: list[str]) -> None:
    name = words[:2] if words[0] == "baseline" else words[:1]
    shown = CliRunner().invoke(app, [*name, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert shown.exit_code == 0, page
    for word in words[1:]:
        if word.startswith("--"):
            assert word.split("=")[0] in shown.output, (page, word)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)(?:#([^)]*))?\)", page.read_text(encoding="utf-8")):
        place = page.parent / target if target else page
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), f"{target}#{anchor}"


def anchors(page: Path) -> set[str]:
    """Return the names by which a page's headings are linked to."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(
    "command",
    [
        "build-prompts",
        "finetune",
        "predict",
        "evaluate",
        "compare",
        "leaderboard",
        "verify",
        "ensemble",
        "chat",
        "doctor",
        "baseline tfidf",
        "baseline encoder",
    ],
)
def test_help_of_every_command_has_an_example(command: str) -> None:
    shown = CliRunner().invoke(app, [*command.split(), "--help"], env={"COLUMNS": "200"})
    assert f"llm-clf {command} " in shown.output
