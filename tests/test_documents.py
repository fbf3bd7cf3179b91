"""ARCHITECTURE.md and CONTRIBUTING.md: what they name exists, and what they show runs."""

import ast
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import hf_precond

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "hf_precond"
DOCUMENTS = ("ARCHITECTURE.md", "CONTRIBUTING.md")
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
SOURCE = {
    path: path.read_text()
    for path in (*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py"), *ROOT.glob("examples/*"))
    if path.is_file()
}


def read(name):
    return (ROOT / name).read_text()


def shown_files():
    """The files that CONTRIBUTING.md shows whole: path to text."""
    blocks = [text for language, text in BLOCK.findall(read("CONTRIBUTING.md")) if language]
    named = [re.match(r"# ([\w./]+\.\w+)\n", text) for text in blocks]
    return {m[1]: text[m.end() :] for m, text in zip(named, blocks, strict=True) if m}


def quoted(name):
    """What stands between backticks in a document's prose and tables."""
    return sorted(set(re.findall(r"`([^`\n]+)`", BLOCK.sub("", read(name)))))


def definitions(path):
    """Names that a file defines: functions, classes, constants, and ``Class.member``."""
    found = set()

    def visit(body, prefix):
        for node in body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                found.add(prefix + node.name)
            if isinstance(node, ast.ClassDef):
                visit(node.body, f"{prefix}{node.name}.")
            targets = node.targets if isinstance(node, ast.Assign) else []
            targets = [node.target] if isinstance(node, ast.AnnAssign) else targets
            found.update(prefix + t.id for t in targets if isinstance(t, ast.Name))
            if isinstance(node, ast.If | ast.Try):
                visit(node.body + node.orelse, prefix)

    visit(ast.parse(path.read_text()).body, "")
    return found


def find(path):
    """The files that a path in a document may mean: from the root, the package or a folder."""
    found = [file for base in (ROOT, PACKAGE) for file in base.glob(path)]
    return found or [known for known in SOURCE if f"/{path}" in str(known) and known.name in path]


# The documented test, and the command that shows an optimizer's fields, in one process.
TRY = """
import sys, pytest
from hf_precond.cli.main import main
sys.exit(pytest.main(sys.argv[1:]) or main(["list", "signum"]))
"""
MENTIONS = [
    (document, mention)
    for document in DOCUMENTS
    for mention in quoted(document)
    if re.fullmatch(r"[\w./*]+\.(py|md|txt|toml|yml|yaml|cff)(:[\w.]+)?|[\w.]+/[\w./*]*", mention)
]


@pytest.mark.parametrize(("document", "mention"), MENTIONS)
def test_files_and_functions_that_are_named_exist(document, mention):
    path, _, name = mention.partition(":")
    if path in shown_files() or any(shown.startswith(path) for shown in shown_files()):
        return
    files = find(path)
    assert files, f"{document}: there is no {path}"
    if name:
        assert any(name in definitions(file) for file in files), f"{path} has no {name}"


@pytest.mark.parametrize("document", DOCUMENTS)
def test_names_of_the_code_are_its_names(document):
    everything = "\n".join([*SOURCE.values(), *shown_files().values()])
    words = set(re.findall(r"\w+", everything))
    names = [n for n in quoted(document) if re.fullmatch(r"@?[A-Za-z_][\w.]*(\(\))?", n)]
    missing = [n for n in names if not set(re.findall(r"\w+", n)) <= words]
    assert names and not [n for n in missing if (document, n) not in MENTIONS]


def test_architecture_is_short():
    text = read("ARCHITECTURE.md")
    assert max(map(len, text.splitlines())) <= 80
    assert sum(any(c.isalnum() for c in word) for word in text.split()) <= 1500


MARKDOWN = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *(ROOT / "examples").rglob("*.md")]


def headings(document):
    """The anchors of a document's headings."""
    titles = re.findall(r"^#+ (.*)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).strip().lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_and_tests_that_are_named_exist(document):
    text = document.read_text()
    for link, _, heading in re.findall(r"\]\(([^)#:]*)(#([^)]+))?\)", text):
        target = document.parent / link if link else document
        assert target.exists(), link
        assert not heading or heading in headings(target), f"{link}#{heading}"
    for path in re.findall(r"\btests/[\w./]*\w", text):
        assert (ROOT / path).exists() or any(s.startswith(path) for s in shown_files()), path


def test_the_example_of_an_optimizer_works(tmp_path):
    """A copy of the package with the documented files in it, tested by the documented test."""
    skip = shutil.ignore_patterns("__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "hf_precond", ignore=skip)
    (tmp_path / "tests").mkdir()
    for name in ("setup.cfg", "pyproject.toml", "tests/conftest.py"):
        shutil.copy(ROOT / name, tmp_path / name)
    shutil.copytree(ROOT / "tests/optimizers", tmp_path / "tests/optimizers", ignore=skip)
    files = shown_files()
    for path, text in files.items():
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    def run(*command):
        environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(tmp_path)}
        words = [sys.executable, *command]
        done = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    (test,) = (path for path in files if path.startswith("tests/"))
    said = run("-c", TRY, "-q", "-p", "no:cacheprovider", test)
    assert "1 passed" in said and "momentum" in said
    run("-m", "ruff", "check", "--no-cache", *files)


def test_the_citation_is_of_this_package():
    citation = yaml.safe_load(read("CITATION.cff"))
    project = tomllib.loads(read("pyproject.toml"))["project"]
    assert citation["title"] == project["name"]
    released = re.search(r"^## (\d\S*) - ", read("CHANGELOG.md"), re.MULTILINE)
    assert citation["version"] == released[1]
    assert hf_precond.__version__.removesuffix(".dev0") >= released[1]
    assert citation["license"] == project["license"]
    readme = read("README.md")
    for reference in citation["references"]:
        (source,) = {reference.get("doi"), reference.get("url")} - {None}
        assert source.rpartition("/")[2] in readme


def test_documents_are_in_the_archive():
    assert set(DOCUMENTS) | {"CITATION.cff"} <= set(read("MANIFEST.in").split())
