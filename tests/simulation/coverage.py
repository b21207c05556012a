"""Which (rule, outcome) pairs of decide/ were reached, and which cannot be, and why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DECIDE = Path(__file__).parents[2] / "pgha" / "decide"

#: (rule, outcome) → why no simulation of level (a) reaches it.
UNREACHABLE: dict[tuple[str, str], str] = {}


def rules() -> dict[str, set[str]]:
    """Every rule that decide/ names, with the outcomes that its calls allow: a literal True or False, else both."""
    found: dict[str, set[str]] = {}
    for path in sorted(DECIDE.glob("*.py")):
        tree = ast.parse(path.read_text())
        for function in [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]:
            names = {t.id: v.value for n in ast.walk(function) if isinstance(n, ast.Assign) for t, v in _pairs(n) if isinstance(v, ast.Constant) and isinstance(v.value, str)}
            for call in [n for n in ast.walk(function) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name) and n.func.id == "reason" and len(n.args) >= 2]:
                first, holds = call.args[0], call.args[1]
                name = first.value if isinstance(first, ast.Constant) else names.get(first.id) if isinstance(first, ast.Name) else None
                if not isinstance(name, str) or not re.fullmatch(r"\w+\.\w+", name):
                    continue
                outcomes = {"holds", "refuses"}
                if isinstance(holds, ast.Constant):
                    outcomes = {"holds"} if holds.value else {"refuses"}
                found.setdefault(name, set()).update(outcomes)
    return found


def _pairs(node: ast.Assign) -> list[tuple[ast.Name, ast.expr]]:
    target = node.targets[0]
    if isinstance(target, ast.Name):
        return [(target, node.value)]
    if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
        return [(t, v) for t, v in zip(target.elts, node.value.elts, strict=False) if isinstance(t, ast.Name)]
    return []


def missing(reached: dict[tuple[str, str], int]) -> list[tuple[str, str]]:
    """Pairs that were neither reached nor named unreachable."""
    wanted = {(rule, outcome) for rule, outcomes in rules().items() for outcome in outcomes}
    return sorted(wanted - set(reached) - set(UNREACHABLE))


def table(reached: dict[tuple[str, str], int]) -> str:
    lines = []
    for rule, outcomes in sorted(rules().items()):
        for outcome in sorted(outcomes):
            number = reached.get((rule, outcome), 0)
            why = UNREACHABLE.get((rule, outcome), "")
            lines.append(f"{rule:<45} {outcome:<8} {number or ('unreachable: ' + why if why else 'NOT REACHED')}")
    for kind in ("situation", "action"):
        lines += [f"{kind + ' ' + name:<45} {'':<8} {number}" for (k, name), number in sorted(reached.items()) if k == kind]
    lost = missing(reached)
    lines.append(f"{len(lost)} pairs not reached: {', '.join(f'{r} {o}' for r, o in lost)}" if lost else "every pair reached, or named unreachable")
    return "\n".join(lines)
