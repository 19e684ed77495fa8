"""Formatting, lint and the import rule, as `make lint` checks them."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BIN = Path(sys.executable).parent
MAX_FUNCTION, MAX_FILE = 60, 400


@pytest.mark.parametrize("command", ["ruff check .", "ruff format --check .", "lint-imports"])
def test_lint(command):
    done = subprocess.run([BIN / command.split()[0], *command.split()[1:]], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]


def test_files_and_functions_stay_short():
    long = []
    for file in sorted((ROOT / "muralist").rglob("*.py")):
        text = file.read_text()
        if text.count("\n") > MAX_FILE:
            long.append(f"{file}: {text.count(chr(10))} lines")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno - node.lineno >= MAX_FUNCTION:
                long.append(f"{file}:{node.lineno} {node.name}: {node.end_lineno - node.lineno + 1} lines")
    assert not long, "\n".join(long)


def test_no_pickle_and_no_evaluated_text():
    """Nothing in the library can run code that came with a file; one stand-alone script reads pickles, weights alone, in a process of its own."""
    found, safe = [], (ROOT / "muralist" / "store" / "pickle_copy.py", "torch.load")
    for file in sorted((ROOT / "muralist").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text())):
            modules = [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module] if isinstance(node, ast.ImportFrom) else []
            called = ast.unparse(node.func) if isinstance(node, ast.Call) else ""
            if {"pickle", "dill", "marshal", "shelve", "joblib"} & set(modules) or called in ("eval", "exec", "compile", "torch.load", "np.load", "yaml.load"):
                if (file, called) == safe and {k.arg: ast.unparse(k.value) for k in node.keywords}.get("weights_only") == "True":
                    continue
                found.append(f"{file}:{node.lineno}")
    assert not found, "\n".join(found)
