"""Imports run one way, and private names stay in their module."""

import ast
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ROOMS = (
    "errors files lengths hardware compilation_cache config distributed mesh data model losses optim state checkpoint "
    "observability training inference evals bridge"
).split()
"""Files and folders of mla_jax: each imports only what stands before it. CONTRIBUTING.md names most of them."""
TOPS = ("mla_jax", "latent_attention", "experiments", "tools")


def name_of(file: Path) -> str:
    """`mla_jax/mesh.py` is mla_jax.mesh, `kernels/latent_attention/__init__.py` is latent_attention."""
    parts = [part for part in file.relative_to(ROOT).with_suffix("").parts if part != "kernels"]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {
    name_of(file): ast.parse(file.read_text())
    for folder in ("mla_jax", "kernels/latent_attention", "experiments", "tools")
    for file in sorted((ROOT / folder).rglob("*.py"))
}


def for_types_only(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)


def nodes(node: ast.AST) -> Iterator[ast.AST]:
    """All nodes below, in functions too, without those under `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if not for_types_only(child):
            yield child
            yield from nodes(child)


def imports(module: str) -> Iterator[tuple[int, str]]:
    """(line, full name) of everything that a module imports: modules, and names in modules."""
    for node in nodes(MODULES[module]):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 and node.module, f"{module}:{node.lineno}: imports are absolute"
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


def test_every_room_has_its_place():
    found = {module.split(".")[1] for module in MODULES if module.startswith("mla_jax.")}
    assert found <= set(ROOMS), "add it to ROOMS, and to the chain in CONTRIBUTING.md"


def test_contributing_names_the_rooms_in_this_order():
    chain = (ROOT / "CONTRIBUTING.md").read_text().split("run one way: ")[1].split(", each")[0]
    named = re.findall(r"`(\w+)`", chain)
    assert len(named) > 10 and named == [room for room in ROOMS if room in named]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_only_those_before_it(room):
    before = ROOMS[: ROOMS.index(room) + 1]
    of_room = [module for module in MODULES if module.startswith(f"mla_jax.{room}") and module.split(".")[1] == room]
    wrong = [
        f"{module}:{line} imports {name}"
        for module in of_room
        for line, name in imports(module)
        if name.startswith("mla_jax.") and name.split(".")[1] not in before
    ]
    assert not wrong


def test_the_kernels_import_nothing_of_ours_and_the_library_no_entry_point():
    above = {"latent_attention": {"mla_jax", "experiments", "tools"}, "mla_jax": {"experiments", "tools"}}
    wrong = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        for line, name in imports(module)
        if name.split(".")[0] in above.get(module.split(".")[0], set())
    ]
    assert not wrong


def private(name: str) -> bool:
    return name.startswith("_") and not name.endswith("__")


def defined(tree: ast.Module) -> set[str]:
    """Private names that a module makes: functions, classes, variables, parameters and attributes of self."""
    made = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            made.add(node.name)
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            made.add(node.id if isinstance(node, ast.Name) else node.attr)
    return {name for name in made if private(name)}


def test_private_names_are_used_in_their_module_only():
    makers = defaultdict(set)
    for module, tree in MODULES.items():
        for name in defined(tree):
            makers[name].add(module)
    wrong = [
        f"{module}:{line} imports {name}"
        for module in MODULES
        for line, name in imports(module)
        if name.split(".")[0] in TOPS and any(map(private, name.split(".")))
    ]
    wrong += [
        f"{module}:{node.lineno} uses {node.attr} of {', '.join(sorted(makers[node.attr]))}"
        for module, tree in MODULES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr in makers and module not in makers[node.attr]
    ]
    assert not wrong
