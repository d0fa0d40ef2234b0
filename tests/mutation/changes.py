"""Small changes to a Python file.

Left alone: annotations, docstrings, messages (f-strings and what is raised), decorators, bases, type aliases, logging.
"""

from __future__ import annotations

import ast
import copy
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

OPERATORS: dict[type, type] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult, ast.Pow: ast.Mult, ast.LShift: ast.RShift, ast.RShift: ast.LShift, ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitAnd,
}  # fmt: skip
PAIRS = [("min", "max"), ("minimum", "maximum"), ("any", "all"), ("sin", "cos"), ("floor", "ceil"), ("zeros", "ones")]
NAMES = {a: b for pair in PAIRS for a, b in (pair, pair[::-1])}
# whose first two arguments may change places, or whose exchange fails wherever it runs
UNORDERED = {"min", "max", "minimum", "maximum", "hypot", "array_equal", "multiply", "bitwise_xor", "bitwise_and"}
UNORDERED |= {"isinstance", "getattr", "hasattr", "allclose", "equal"}
ANYWHERE = (0, 1 << 30)  # lines of what runs when a module is imported


@dataclass(frozen=True)
class Mutant:
    """One change: `old` and `new` are the statement, in a line and without its body; `where` is its function."""

    file: str
    where: str
    old: str
    new: str
    lines: tuple[int, int]  # first and last, of which a test must run one

    @property
    def key(self) -> tuple[str, str, str, str]:
        return self.file, self.where, self.old, self.new

    @property
    def rank(self) -> str:
        """Orders mutants in a way that edits elsewhere in the file do not change."""
        return hashlib.sha256("\0".join(self.key).encode()).hexdigest()


def variants(node: ast.AST) -> Iterator[ast.AST]:
    """What may stand in a node's place."""

    def but(**changes: Any) -> Any:
        new = copy.deepcopy(node)
        for name, value in changes.items():
            setattr(new, name, value)
        return new

    match node:
        case ast.Compare(ops=ops):
            for i, op in enumerate(ops):
                yield but(ops=[*ops[:i], OPERATORS[type(op)](), *ops[i + 1 :]])
        case ast.BinOp(op=op) | ast.BoolOp(op=op) | ast.AugAssign(op=op) if type(op) in OPERATORS:
            texts = [n for n in ast.iter_child_nodes(node) if isinstance(n, ast.Constant) and isinstance(n.value, str)]
            if not texts:
                yield but(op=OPERATORS[type(op)]())
        case ast.UnaryOp(op=ast.Not() | ast.USub(), operand=operand):
            yield operand
        case ast.Constant(value=bool(value)):
            yield ast.Constant(not value)
        case ast.Constant(value=int(value)):
            yield from (ast.Constant(value + by) for by in ((1, -1) if value else (1,)))
        case ast.Constant(value=float(value)):
            yield ast.Constant(value + 1 if abs(value) < 1e15 else 2 * value)
        case ast.IfExp(body=body, orelse=orelse):
            yield but(body=orelse, orelse=body)
        case ast.If(test=ast.Name() | ast.Call() | ast.Attribute()) | ast.While(test=ast.Name() | ast.Call()):
            yield but(test=ast.UnaryOp(ast.Not(), node.test))
        case ast.Slice():
            yield from (but(**{end: None}) for end in ("lower", "upper", "step") if getattr(node, end) is not None)
        case ast.Name(id=name) if name in NAMES:
            yield but(id=NAMES[name])
        case ast.Attribute(attr=name) if name in NAMES:
            yield but(attr=NAMES[name])
        case ast.Call(func=func, args=[one, two, *rest]):
            plain = not isinstance(one, ast.Starred) and not isinstance(two, ast.Starred)
            name = getattr(func, "attr", getattr(func, "id", ""))
            if plain and name not in UNORDERED and ast.dump(one) != ast.dump(two):
                yield but(args=[two, one, *rest])
    match node:  # statements whose absence leaves a program
        case ast.Raise() | ast.Continue() | ast.Break() | ast.AugAssign() | ast.Expr(value=ast.Call()):
            yield ast.Pass()
        case ast.Assign(targets=[ast.Subscript() | ast.Attribute()]):
            yield ast.Pass()


def left_alone(parent: ast.AST, field: str, node: ast.AST) -> bool:
    match parent:
        case ast.Raise():
            return True
        case ast.ClassDef() if field in ("bases", "keywords"):
            return True
        case ast.Module() if isinstance(node, ast.Assign):
            name = getattr(node.targets[0], "id", "")
            return name == "__all__" or (name[:1].isupper() and not name.isupper())  # type aliases
    match node:
        case ast.JoinedStr() | ast.Import() | ast.ImportFrom():
            return True
        case ast.keyword(arg="strict"):  # of zip: a net below the checks
            return True
        case ast.Expr(value=ast.Call(func=func)):
            return ast.unparse(func).startswith(("logging.", "log.", "logger."))
    return field in ("annotation", "returns", "decorator_list", "type_params")


def header(statement: ast.stmt) -> str:
    bare = copy.copy(statement)
    for field in ("body", "orelse", "finalbody", "handlers", "decorator_list", "cases"):
        if isinstance(getattr(bare, field, None), list):
            setattr(bare, field, [])
    return " ".join(ast.unparse(bare).split())


def mutants(file: str, text: str) -> list[Mutant]:
    """All mutants of a file's text."""
    return list({mutant.key: mutant for mutant, _ in _changed(file, text)}.values())


def sources(file: str, text: str, wanted: set[tuple[str, str, str, str]]) -> dict[tuple[str, str, str, str], str]:
    """The whole text of some mutants, by their keys."""
    return {mutant.key: ast.unparse(tree) for mutant, tree in _changed(file, text) if mutant.key in wanted}


def _changed(file: str, text: str) -> Iterator[tuple[Mutant, ast.Module]]:
    """Each mutant, and the file's tree, which is that mutant until the next is asked for."""
    tree = ast.parse(text)

    def visit(
        parent: ast.AST, where: str, statement: ast.stmt | None, lines: tuple[int, int]
    ) -> Iterator[tuple[Mutant, ast.Module]]:
        for field, value in ast.iter_fields(parent):
            nodes = value if isinstance(value, list) else [value]
            for i, node in enumerate(nodes):
                if not isinstance(node, ast.AST) or left_alone(parent, field, node):
                    continue
                inside, at, span = where, statement, lines
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    inside, at = f"{where}.{node.name}".lstrip("."), node
                    if not isinstance(node, ast.ClassDef):  # its defaults: whatever runs it
                        span = node.lineno, node.end_lineno or 0
                elif isinstance(node, ast.stmt):
                    at, body = node, getattr(node, "body", None)
                    if where and not isinstance(parent, ast.ClassDef):
                        span = node.lineno, max(node.lineno, body[0].lineno - 1) if body else node.end_lineno or 0
                for new in variants(node):
                    old = "" if at is None else header(at)
                    _put(parent, field, i, ast.fix_missing_locations(new))
                    after = header(new if at is node else at)  # type: ignore[arg-type]
                    yield Mutant(file, inside, old, after, span), tree
                    _put(parent, field, i, node)
                yield from visit(node, inside, at, span)

    yield from visit(tree, "", None, ANYWHERE)


def _put(parent: ast.AST, field: str, i: int, node: ast.AST) -> None:
    value = getattr(parent, field)
    if isinstance(value, list):
        value[i] = node
    else:
        setattr(parent, field, node)
