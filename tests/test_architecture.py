"""The tree is what docs/architecture.md says: imports point one way, without a circle, and every place exists."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCE = ROOT / "src"
MODULES = {
    ".".join(path.relative_to(SOURCE).with_suffix("").parts).removesuffix(".__init__"): path
    for path in (SOURCE / "fluxvae").rglob("*.py")
}
FOLDERS = ("src", "comfyui", "tests", "benchmarks", "tools", "examples", "deploy", "docs", "triton_models")
LEVELS = (
    ("arrays", "devices", "errors", "system"),
    ("claims", "extras", "forked", "latents", "options", "photographs", "pictures", "pixels"),
    ("engine",),
    ("checkpoints",),
    ("half", "install"),
    ("decoder", "encoder"),
    ("fluxvae",),
    ("bench", "plans", "verify"),
    ("demo",),
    ("batch", "serve"),
    ("cli", "client"),
    ("diffusers_blocks",),
)
"""The parts of the package: a part imports only from lines above its own, and from itself."""
ENGINE = (
    ("torch_library",),
    ("thread_count",),
    ("way",),
    ("calls", "clock", "frames", "records", "settings"),
    ("memory", "plan", "statistics"),
    ("kernels",),
    ("sweep",),
    ("layers",),
    ("module_state",),
    ("network",),
    ("planner", "reference", "runner"),
    ("graphs", "preview"),
    ("planned",),
    ("bounded",),
    ("exact",),
)
"""The same within the engine."""


def imports(module: str) -> Iterator[str]:
    """Every module of the package that ``module`` imports anywhere: also in a function, or for its types alone."""
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module


GRAPH = {module: set(imports(module)) - {module} for module in MODULES}


def part(module: str, depth: int) -> str:
    """The part of the package, or of the engine, that a module belongs to."""
    names = module.split(".")
    return names[depth] if len(names) > depth else names[-1]


def test_no_module_imports_itself_by_way_of_others() -> None:
    try:
        TopologicalSorter(GRAPH).prepare()
    except CycleError as error:
        pytest.fail(" <- ".join(error.args[1]))


@pytest.mark.parametrize(("within", "levels"), [("fluxvae", LEVELS), ("fluxvae.engine", ENGINE)])
def test_imports_point_one_way(within: str, levels: tuple[tuple[str, ...], ...]) -> None:
    level = {name: index for index, names in enumerate(levels) for name in names}
    depth = within.count(".") + 1
    inside = {module: deps for module, deps in GRAPH.items() if module.startswith(f"{within}.") or within == "fluxvae"}
    wrong = [
        f"{module} imports {other}"
        for module, others in inside.items()
        for other in others & inside.keys()
        if part(module, depth) != part(other, depth) and level[part(other, depth)] >= level[part(module, depth)]
    ]
    assert not wrong


@pytest.mark.parametrize("page", ["docs/architecture.md", "docs/engine.md", "CONTRIBUTING.md"])
def test_every_place_that_is_named_exists(page: str) -> None:
    found = (path for folder in FOLDERS for path in (ROOT / folder, *(ROOT / folder).rglob("*")))
    places = [path.relative_to(ROOT).as_posix() for path in found]
    named = set(re.findall(r"`([\w./-]+(?:\.py|/))`", (ROOT / page).read_text()))
    missing = [name for name in named if not any(f"/{place}/".endswith(f"/{name.rstrip('/')}/") for place in places)]
    assert not missing


def test_every_place_in_the_package_is_named() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    tops = {path.stem for path in (SOURCE / "fluxvae").iterdir() if not path.name.startswith("_")}
    assert not [name for name in sorted(tops) if f"{name}.py" not in text and f"{name}/" not in text]
