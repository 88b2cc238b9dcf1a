"""House rules: sizes of functions and files, and the width of prose."""

import ast
import io
import tokenize

import pytest
from runs import ROOT

LONGEST_FUNCTION = 90  # lines
ROOT_MODULES = 27  # entry points included
WIDTH = 88  # columns of docstrings, comments and Markdown; code may use 130
FILES = sorted((ROOT / "jaxreason").rglob("*.py"))
CONFIGS = sorted((ROOT / "configs").glob("*.py"))
MARKDOWN = [
    ROOT / "README.md",
    *sorted(p for folder in ("jaxreason", "experiments", "tests") for p in (ROOT / folder).rglob("*.md")),
]


def names(paths):
    return [str(path.relative_to(ROOT)) for path in paths]


@pytest.mark.parametrize("path", FILES, ids=names(FILES))
def test_a_function_can_be_seen_whole(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            lines = node.end_lineno - node.lineno + 1
            assert lines <= LONGEST_FUNCTION, f"{node.name} has {lines} lines"


def test_the_loop_and_the_first_page_are_short():
    for name, most in (("jaxreason/train.py", 200), ("README.md", 150)):
        lines = len((ROOT / name).read_text().splitlines())
        assert lines <= most, f"{name} has {lines} lines"


def test_there_are_few_modules_at_the_root():
    modules = [path.stem for path in (ROOT / "jaxreason").glob("*.py") if not path.stem.startswith("__")]
    assert len(modules) <= ROOT_MODULES, sorted(modules)


def docstring_lines(tree):
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(node):
            yield from range(node.body[0].lineno, node.body[0].end_lineno + 1)


def comment_lines(text):
    """Yield the numbers of lines that hold only a comment."""
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type == tokenize.COMMENT and token.line.lstrip().startswith("#"):
            yield token.start[0]


@pytest.mark.parametrize("path", FILES + CONFIGS, ids=names(FILES + CONFIGS))
def test_prose_in_code_is_narrow(path):
    text = path.read_text()
    lines = text.splitlines()
    wide = [n for n in {*docstring_lines(ast.parse(text)), *comment_lines(text)} if len(lines[n - 1]) > WIDTH]
    assert not wide, f"wider than {WIDTH} columns: lines {sorted(wide)}"


@pytest.mark.parametrize("path", MARKDOWN, ids=names(MARKDOWN))
def test_markdown_is_narrow(path):
    """Tables and code blocks are exempt."""
    in_code, wide = False, []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if line.startswith("```"):
            in_code = not in_code
        elif not in_code and not line.startswith("|") and len(line) > WIDTH:
            wide.append(number)
    assert not wide, f"wider than {WIDTH} columns: lines {wide}"
