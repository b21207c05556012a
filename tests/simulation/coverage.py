"""Which (rule, outcome) pairs of decide/ were reached, and which cannot be, and why."""

from __future__ import annotations

import ast
import re
from pathlib import Path

DECIDE = Path(__file__).parents[2] / "pgha" / "decide"

_REFUSAL_ONLY = "asked in every such pass, told only where it refuses"
_ORDER_ONLY = "decide/failsafe.order asks it and hands on the order alone: no decision tells it"

#: (rule, outcome) → why no simulation of level (a) reaches it. Each has its rows in tests/decide/.
#: Fewer passes than this are rare.
RARE = 100

UNREACHABLE: dict[tuple[str, str], str] = {
    ("broken.licence_was_renewed_since", "holds"): _REFUSAL_ONLY,
    ("broken.start_is_overdue", "holds"): _REFUSAL_ONLY,
    ("lease.licence_is_valid", "holds"): _REFUSAL_ONLY,
    ("synchronous.is_to_be_let_go", "holds"): _REFUSAL_ONLY,
    ("synchronous.may_start", "holds"): _REFUSAL_ONLY,
    ("asked.is_in_time", "holds"): _REFUSAL_ONLY,
    ("asked.is_the_one_meant", "holds"): _REFUSAL_ONLY,
    ("empty.never_initialised", "refuses"): "told only where it holds: else a copy is to be made, and that says what it lacks",
    ("failsafe.is_licensed", "holds"): _ORDER_ONLY, ("failsafe.is_licensed", "refuses"): _ORDER_ONLY,
    ("failsafe.leader_is_listed", "holds"): _ORDER_ONLY, ("failsafe.leader_is_listed", "refuses"): _ORDER_ONLY,
    ("failsafe.mode_is_on", "holds"): _ORDER_ONLY, ("failsafe.mode_is_on", "refuses"): _ORDER_ONLY,
    ("failsafe.no_former_list_is_on_its_way", "holds"): _ORDER_ONLY, ("failsafe.no_former_list_is_on_its_way", "refuses"): _ORDER_ONLY,
    ("failsafe.nothing_ends_it", "holds"): _ORDER_ONLY, ("failsafe.nothing_ends_it", "refuses"): _ORDER_ONLY,
    ("restart.lock_seen_held", "refuses"): "a licence is acquired by an action, after its pass was decided: the next pass has a higher number",
    ("switchover.names_another_candidate", "refuses"): "leading clears a request that names this leader before it asks the conditions",
    ("switchover.names_this_leader", "refuses"): "leading clears a request that names another leader before it asks the conditions",
    ("broken.no_orphans", "refuses"): "the observer ends orphans before it tells of them; what is left would be processes that SIGKILL does not end",
    ("broken.control_is_readable", "refuses"): "the model's pg_control is readable or its whole disk is not",
    ("paused.server_answers", "refuses"): "needs a server that is replaced between two looks at it; the model's observer is woken by every exit, and the holder then stands down",
    ("capacity.history_is_compacted", "refuses"): "needs two days without compaction; runs last for an hour, and the model's store compacts itself",
}


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


def table(reached: dict[tuple[str, str], int], seed_of: dict[tuple[str, str], int] | None = None) -> str:
    """`seed_of`: the first random program that reached a pair; told of what is rare."""
    lines = []
    for rule, outcomes in sorted(rules().items()):
        for outcome in sorted(outcomes):
            number = reached.get((rule, outcome), 0)
            why = UNREACHABLE.get((rule, outcome), "")
            seed = (seed_of or {}).get((rule, outcome))
            told = "" if not number or number >= RARE else f"  first by seed {seed}" if seed is not None else "  by its own program only"
            lines.append(f"{rule:<45} {outcome:<8} {number or ('unreachable: ' + why if why else 'NOT REACHED')}{told}")
    for kind in ("situation", "action"):
        lines += [f"{kind + ' ' + name:<45} {'':<8} {number}" for (k, name), number in sorted(reached.items()) if k == kind]
    lost = missing(reached)
    lines.append(f"{len(lost)} pairs not reached: {', '.join(f'{r} {o}' for r, o in lost)}" if lost else "every pair reached, or named unreachable")
    return "\n".join(lines)
