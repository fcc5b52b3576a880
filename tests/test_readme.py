"""What README, docs and results name exists: files, recipes, commands, modules of benchmarks."""

import re
from pathlib import Path

import pytest

import jaxmm
from jaxmm.cli import COMMANDS
from jaxmm.recipes import find_recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "benchmarks" / "results" / "README.md"]
README = PAGES[0].read_text()


def pages(pattern, read=Path.read_text):
    """Return (page, match) of every match of `pattern` in the pages."""
    return sorted({(page, match) for page in PAGES for match in re.findall(pattern, read(page), re.M)})


def code(page):
    """Return the code of a page, one block or inline piece per line."""
    pieces = re.findall(r"```\w*\n(.*?)```|`([^`\n]+)`", page.read_text(), re.S)
    return "\n".join(block or inline for block, inline in pieces)


def test_it_begins_with_the_default_run_and_the_tests():
    [block, *_] = re.findall(r"^```bash\n(.*?)^```", README, re.M | re.S)
    train, test = block.splitlines()
    assert train == "pip install -e '.[train,captions]' -c constraints.txt && python run_train.py"
    assert test == "pip install -e '.[test]' -c constraints.txt && pytest"
    ci = (ROOT / ".ci" / "run").read_text().splitlines()
    assert set(test.replace("pip install", "pip install -q").split(" && ")) <= set(ci)


@pytest.mark.parametrize("page, link", pages(r"\]\(([^)#\s]+)(?:#[^)]*)?\)"), ids=lambda x: getattr(x, "name", x))
def test_links_lead_to_files(page, link):
    assert link.startswith("http") or (page.parent / link).exists()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(#([^)]+)\)", README))))
def test_links_lead_to_sections(link):
    headings = re.findall(r"^#+ (.*)$", README, re.M)
    assert link in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page, path", pages(r"`((?:jaxmm|configs|benchmarks|docs|tests)/[\w./]*)`"),
                         ids=lambda x: getattr(x, "name", x))
def test_paths_exist(page, path):
    assert (ROOT / path).exists()


@pytest.mark.parametrize("page, recipe", pages(r"--config[ ,]+([a-z][\w./]*)"), ids=lambda x: getattr(x, "name", x))
def test_recipes_exist(page, recipe):
    assert find_recipe(recipe).exists()


def test_every_recipe_is_in_the_readme():
    assert set(re.findall(r"\(configs/(\w+)\.py\)", README)) == {path.stem for path in (ROOT / "configs").glob("*.py")}


@pytest.mark.parametrize("page, command", pages(r"^(?:\$ )?jaxmm ((?:capfilt |data |search )?[a-z]+)", code),
                         ids=lambda x: getattr(x, "name", x))
def test_commands_exist(page, command):
    assert command in COMMANDS or any(name.startswith(f"{command} ") for name in COMMANDS)


@pytest.mark.parametrize("page, module", pages(r"benchmarks\.(\w+)"), ids=lambda x: getattr(x, "name", x))
def test_benchmarks_exist(page, module):
    assert (ROOT / "benchmarks" / f"{module}.py").exists()


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\bjaxmm\.([A-Za-z_]+)\(", README))))
def test_public_names_exist(name):
    assert name in jaxmm.__all__


def test_every_file_of_results_is_explained():
    results = ROOT / "benchmarks" / "results"
    text = (results / "README.md").read_text()
    assert all(path.name in text for path in results.iterdir() if path.name != "README.md")


def test_tests_of_faults_exist():
    text = (ROOT / "docs" / "reliability.md").read_text()
    numbers = re.findall(r"^\| (e?\d+) \|", text, re.M)
    assert len(numbers) == len(set(numbers)) == 51
    names = set(re.findall(r"`([\w/]+\.py)::(\w+)`", text))
    assert len(names) > 50
    missing = [name for file, name in names if f"def {name}(" not in (ROOT / "tests" / file).read_text()]
    assert not missing
