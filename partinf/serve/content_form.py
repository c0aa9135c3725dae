"""In which form a chat template wants the content of messages: as one text, or as a list of parts that it walks over.

Clients may send either; a template that was written for one of them makes nothing, or nonsense, of the other. Which it is, its own syntax
tree says: whether it loops over what it has read from a message's `content`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from jinja2 import nodes


@dataclass(frozen=True)
class ContentForm:
    """What a template does with contents.

    Attributes:
        walks: it goes over a list of parts. tests: it asks whether a content is a string, and so takes both.
    """

    walks: bool = False
    tests: bool = False


def content_form(template: nodes.Template) -> ContentForm:
    """Of a parsed template."""
    names = _content_names(template)
    walks = any(_is_content(loop.iter, names) for loop in template.find_all(nodes.For)) or any(_reads_a_part(template, names))
    tests = any(test.name == "string" and _is_content(test.node, names) for test in template.find_all(nodes.Test))
    return ContentForm(walks, tests)


def _reads_a_part(template: nodes.Template, names: set[str]) -> Iterator[bool]:
    """`content[0].text`, once for every time."""
    reads: list[nodes.Getattr | nodes.Getitem] = [*template.find_all(nodes.Getattr), *template.find_all(nodes.Getitem)]
    for read in reads:
        place = read.node
        if _key(read) == "text" and isinstance(place, nodes.Getitem) and isinstance(_constant(place.arg), int):
            yield _is_content(place.node, names)


def _content_names(template: nodes.Template) -> set[str]:
    """Variables that a content is assigned to, and parameters of macros that it is given to."""
    macros = {macro.name: macro for macro in template.find_all(nodes.Macro)}
    names: set[str] = set()
    while True:
        found = set(names)
        for assign in template.find_all(nodes.Assign):
            if isinstance(assign.target, nodes.Name) and _is_content(assign.node, names):
                found.add(assign.target.name)
        for call in template.find_all(nodes.Call):
            macro = macros.get(call.node.name) if isinstance(call.node, nodes.Name) else None
            if macro is not None:
                found |= {known.name for known, given in zip(macro.args, call.args, strict=False) if _is_content(given, names)}
                found |= {given.key for given in call.kwargs if _is_content(given.value, names)}
        if found == names:
            return names
        names = found


def _is_content(node: nodes.Node | None, names: set[str]) -> bool:
    """Whether an expression is a message's content or a part of that list, as far as its form tells."""
    match node:
        case nodes.Name():
            return node.name in names
        case nodes.Filter():
            return _is_content(node.node, names)
        case nodes.CondExpr():
            return _is_content(node.expr1, names) or _is_content(node.expr2, names)
        case nodes.Or():
            return _is_content(node.left, names) or _is_content(node.right, names)
        case nodes.Call(node=nodes.Getattr(attr="get")):
            return bool(node.args) and _constant(node.args[0]) == "content"
        case nodes.Getitem(arg=nodes.Slice()):
            return _is_content(node.node, names)
        case nodes.Getattr() | nodes.Getitem():
            return _key(node) == "content"
    return False


def _key(node: nodes.Getattr | nodes.Getitem) -> object:
    """The name that is looked up."""
    return node.attr if isinstance(node, nodes.Getattr) else _constant(node.arg)


def _constant(node: nodes.Node) -> object:
    return node.value if isinstance(node, nodes.Const) else None
