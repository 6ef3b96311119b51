"""Which statements of this package the rehearsal has run, in all of its processes, and which it has not.

A module of the package is changed while it is imported: before every statement it says that it got there. That works in
every Python and costs nothing elsewhere. A statement that cannot run without a card has the comment `MARK` and why.
"""

from __future__ import annotations

import ast
import builtins
import importlib.machinery
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import CodeType, ModuleType
from typing import Any

__all__ = ["MARK", "missed", "watch"]

HERE = Path(__file__).parent
VARIABLE = "FLUXVAE_REHEARSED_LINES"
"""The environment variable with the file that all processes of a rehearsal append to."""
MARK = "# not rehearsed: "
_CALL = "_rehearsed_"
_UNWATCHED = ("__init__.py", "lines.py")


def watch() -> None:
    """Note from now on what is imported of this package, and what of it runs, in the file that the variable names."""
    file = os.open(os.environ[VARIABLE], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    seen: set[tuple[str, int]] = set()

    def note(name: str, line: int) -> None:
        if (name, line) not in seen:
            seen.add((name, line))
            os.write(file, f"{name}:{line}\n".encode())

    setattr(builtins, _CALL, note)
    sys.meta_path.insert(0, _Finder())  # type: ignore[arg-type]


def missed(noted: Path) -> tuple[list[str], list[str], int]:
    """The statements that did not run and should have; those that are marked, with their reasons; the number of all."""
    ran = set(noted.read_text().split())
    left, marked, count = [], [], 0
    for path in sorted(HERE.glob("*.py")):
        if path.name in _UNWATCHED:
            continue
        text = path.read_text()
        lines = text.splitlines()
        for statement in sorted({one.lineno for _, _, one in _statements(ast.parse(text))}):
            count += 1
            place = f"{path.name}:{statement}"
            if place not in ran:
                source = lines[statement - 1].strip()
                (marked if MARK in source else left).append(f"{place}: {source}")
    return left, marked, count


class _Finder:
    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> Any:
        spec = importlib.machinery.PathFinder.find_spec(name, path) if name.startswith("gpu_run.") else None
        if spec is None or spec.origin is None or Path(spec.origin).name in _UNWATCHED:
            return None
        spec.loader = _Loader(name, spec.origin)
        return spec


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        """The module's code with the notes; never from or into a file of bytecode."""
        tree = ast.parse(self.get_data(self.path))
        for body, place, statement in reversed(list(_statements(tree))):
            call = ast.Call(
                ast.Name(_CALL, ast.Load()), [ast.Constant(Path(self.path).name), ast.Constant(statement.lineno)], []
            )
            body.insert(place, ast.copy_location(ast.Expr(call), statement))
        code: CodeType = compile(ast.fix_missing_locations(tree), self.path, "exec")
        return code


def _statements(tree: ast.AST) -> Iterator[tuple[list[ast.stmt], int, ast.stmt]]:
    """Every statement with the list that it stands in and its place there.

    Left out are docstrings, future imports, and what a module does where it is run as a script, since that is where the
    watching begins.
    """
    script = {id(one) for node in ast.walk(tree) if _is_script(node) for one in ast.walk(node)}
    for node in (node for node in ast.walk(tree) if id(node) not in script):
        for body in (getattr(node, name, None) for name in ("body", "orelse", "finalbody")):
            for place, one in enumerate(body if isinstance(body, list) else ()):
                text = isinstance(one, ast.Expr) and isinstance(one.value, ast.Constant)
                if not text and not (isinstance(one, ast.ImportFrom) and one.module == "__future__"):
                    yield body, place, one


def _is_script(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Compare) and ast.unparse(node.test.left) == "__name__"
