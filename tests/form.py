"""What counts as packed code: found by reading the syntax tree, in modules and in cells alike."""

import ast
import re
from collections.abc import Iterator

DISPLAYS = {
    ast.List: "list",
    ast.ListComp: "list",
    ast.Dict: "dict",
    ast.DictComp: "dict",
    ast.Set: "set",
    ast.SetComp: "set",
    ast.Tuple: "tuple",
    ast.JoinedStr: "str",
    ast.Lambda: "function",
}


def packed(source: str) -> list[str]:
    """Each packed statement of a source text, as "line 3: what is wrong"."""
    tree = tree_of(source)
    return [f"line {line}: {fault}" for line, fault in sorted(faults(tree))]


def tree_of(source: str) -> ast.AST:
    """The syntax tree; IPython's own lines, with % or ! in front or behind `=`, are left out."""
    own = re.compile(r"\s*(\w+\s*=\s*)?[%!]")
    lines = ["" if own.match(line) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def faults(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, fault) of every assignment that does two things at once."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Assign):
            continue
        if len(node.targets) == 1 and is_name(node.targets[0], "_"):
            yield node.lineno, "a statement hidden behind `_ =`"
        if isinstance(node.value, ast.Tuple) and isinstance(node.targets[0], ast.Tuple):
            calls = [any(isinstance(n, ast.Call) for n in ast.walk(v)) for v in node.value.elts]
            if any(calls) and len(calls) > 1:
                yield node.lineno, "several assignments in one: one name a line"


def is_name(node: ast.AST, name: str) -> bool:
    """Whether a target is just this name."""
    return isinstance(node, ast.Name) and node.id == name


def rebound(source: str) -> list[str]:
    """Each name that a cell binds to two types, outside its functions, as "x: list, then call"."""
    kinds: dict[str, list[str]] = {}
    for name, kind in bindings(tree_of(source)):
        seen = kinds.setdefault(name, [])
        if kind is not None and kind not in seen:
            seen.append(kind)
    return [f"{name}: {', then '.join(seen)}" for name, seen in kinds.items() if len(seen) > 1]


def bindings(tree: ast.AST) -> Iterator[tuple[str, str | None]]:
    """(name, kind) of every binding outside functions; a kind of None says nothing."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node.name, "function"
            continue
        if isinstance(node, ast.Lambda | ast.ListComp | ast.DictComp | ast.SetComp):
            continue
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, kind_of(node.value)
        if isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            counts = isinstance(node.iter, ast.Call) and is_name(node.iter.func, "range")
            yield node.target.id, "int" if counts else None
        yield from bindings(node)


def kind_of(value: ast.expr) -> str | None:
    """What a display, a string or a call to torch is; None where the text alone does not say."""
    if type(value) in DISPLAYS:
        return DISPLAYS[type(value)]
    if isinstance(value, ast.Constant):
        return type(value.value).__name__ if isinstance(value.value, str | bool) else None
    if isinstance(value, ast.Call) and isinstance(value.func, ast.Attribute):
        return "tensor" if is_name(value.func.value, "torch") else None
    return None
