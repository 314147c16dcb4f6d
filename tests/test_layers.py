"""The import table of the house, length limits and forbidden habits, read from the source."""

import ast
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ALLOWED = {
    "story": set(),
    "attention": {"torch"},
    "sampling": {"torch", "attention"},
    "models": {"torch", "attention"},
    "metrics": {"torch", "numpy", "models"},
    "host": {
        "torch",
        "torchaudio",
        "comfy",
        "folder_paths",
        "latent_preview",
        "server",
        "safetensors",
        "PIL",
        "numpy",
        "av",
        "transformers",
        "nltk",  # taggers that a user may have installed
        "spacy",
        "attention",
        "sampling",
        "models",
        "story",
    },
    "nodes": {
        "torch",
        "comfy",
        "comfy_api",
        "folder_paths",
        "server",
        "PIL",
        "numpy",
        "host",
        "story",
        "sampling",
        "attention",
        "models",
        "metrics",
    },
}
LAYERS = [*ALLOWED, "training"]
FILES = [path for layer in LAYERS for path in sorted((ROOT / layer).rglob("*.py"))]


def imported(path: Path) -> list[str]:
    """Top name of every import; a relative import is named after the layer it reaches."""
    layer = path.relative_to(ROOT).parts[0]
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append(node.module)
        elif isinstance(node, ast.ImportFrom):
            depth = len(path.relative_to(ROOT).parts) - node.level
            base = path.relative_to(ROOT).parts[:depth]
            target = [*base, *(node.module or "").split(".")] if node.module else [*base]
            found.append("." + (target[0] if target else layer))
    return found


@pytest.mark.parametrize(
    "path", [p for p in FILES if p.relative_to(ROOT).parts[0] in ALLOWED], ids=lambda p: str(p.relative_to(ROOT))
)
def test_a_file_imports_only_what_its_layer_may(path):
    layer = path.relative_to(ROOT).parts[0]
    for name in imported(path):
        top = name.lstrip(".").split(".")[0]
        if top == layer or top in sys.stdlib_module_names:
            continue
        assert top in ALLOWED[layer], f"{path.relative_to(ROOT)} imports {name}"


def test_no_node_file_imports_another():
    for path in (ROOT / "nodes").glob("*.py"):
        if path.name != "__init__.py":
            for node in ast.walk(ast.parse(path.read_text())):
                assert not (isinstance(node, ast.ImportFrom) and node.level == 1), f"{path.name} imports a sibling"


def test_the_root_imports_nothing_at_module_scope():
    tree = ast.parse((ROOT / "__init__.py").read_text())
    assert not [node for node in tree.body if isinstance(node, (ast.Import, ast.ImportFrom))]


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_files_and_functions_stay_short_and_say_what_they_catch(path):
    text = path.read_text()
    assert text.count("\n") <= 400
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name != "define_schema":
            assert node.end_lineno - node.lineno < 60, f"{path.name}:{node.name}"
        if isinstance(node, ast.ExceptHandler):
            names = (
                {name.id for name in ast.walk(node.type) if isinstance(name, ast.Name)} if node.type else {"everything"}
            )
            assert not names & {"Exception", "BaseException", "everything"}, f"{path.name}:{node.lineno}"
        assert not isinstance(node, ast.Global), f"{path.name}:{node.lineno}"
