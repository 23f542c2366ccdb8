"""What a picture shows, in words: taken from the code that draws it.

A function of nsa_lite.show says in its docstring what it draws. Other pictures are described by
their titles, axes and labels; one without such words by the sentence that its cell prints under it.
The numbers of every picture are printed there, so a description need not hold them.
"""

import ast
from functools import cache

from course import ROOT

DRAWINGS = ("plots", "curves", "needle_map")
# The keywords that put words into a picture, and how they are read out.
WORDS = {"title": "", "xlabel": "across: ", "ylabel": "upwards: ", "label": "shown: "}


def described(source: str, printed: str = "") -> str:
    """One or two sentences on the picture that a cell draws; `printed` is what it prints."""
    calls = [node for node in ast.walk(parsed(source)) if isinstance(node, ast.Call)]
    drawn = list(dict.fromkeys(text for call in calls if (text := docstring(call))))
    words = words_of(calls, ("title",) if drawn else tuple(WORDS))
    if not drawn:
        drawn = [f"Figure: {words or printed.strip().split(chr(10))[0] or 'see the code above'}"]
        words = ""
    sentences = [" ".join(text.split()).strip(" .") for text in (*drawn, words) if text]
    return ". ".join(sentences) + "."


def parsed(source: str) -> ast.AST:
    """The syntax tree of a cell; IPython's own lines are left out."""
    lines = ["" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()]
    return ast.parse("\n".join(lines))


def docstring(call: ast.Call) -> str:
    """The first sentence of the docstring of a drawing function that is called; "" of others."""
    match call.func:
        case ast.Attribute(value=ast.Name(id=module), attr=name) if module in DRAWINGS:
            return drawing_functions().get(name, "")
    return ""


@cache
def drawing_functions() -> dict[str, str]:
    """What each public draw_ function of nsa_lite.show draws."""
    found = {}
    for module in DRAWINGS:
        tree = ast.parse((ROOT / f"nsa_lite/show/{module}.py").read_text("utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("draw_"):
                found[node.name] = first_sentence(ast.get_docstring(node) or "")
    return found


def first_sentence(text: str) -> str:
    """The first paragraph, without what a caller hands in after a semicolon or a colon."""
    paragraph = " ".join(text.split("\n\n")[0].split())
    return paragraph.split(";")[0].split(": masks")[0]


def words_of(calls: list[ast.Call], names: tuple[str, ...]) -> str:
    """The texts that calls put into a picture under these names."""
    found: dict[str, list[str]] = {name: [] for name in names}
    for call in calls:
        for name, text in texts(call):
            if name in found and text not in found[name]:
                found[name].append(text)
    return "; ".join(WORDS[name] + ", ".join(seen) for name, seen in found.items() if seen)


def texts(call: ast.Call) -> list[tuple[str, str]]:
    """(name, text) of each text that a call hands over, set_xlabel("...") among them."""
    pairs = [(keyword.arg or "", literal(keyword.value)) for keyword in call.keywords]
    method = call.func.attr if isinstance(call.func, ast.Attribute) else ""
    named = "title" if method.startswith("draw_") else method.removeprefix("set_")
    pairs += [(named, literal(value)) for value in call.args]
    if method == "legend":
        lists = [value.elts for value in call.args if isinstance(value, ast.List)]
        pairs += [("label", literal(value)) for values in lists for value in values]
    return [(name, text) for name, text in pairs if text]


def literal(node: ast.expr) -> str:
    """A text in the code; what an f-string fills in is left open."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(literal(value) or "…" for value in node.values)
    return ""
