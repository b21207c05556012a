"""Who may import whom, and what pure code may not touch: the rule in pgha/__init__.py, kept by reading the sources.

A failure says what to do instead. Where the rule proves wrong, change it there and here, and say why.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "pgha"

THIRD_PARTY = {"trio", "trio_websocket", "wsproto", "httpx", "h11", "psycopg", "msgspec", "tomli_w"}
#: In the archive, but optional elsewhere: the one file that may import each, inside a function.
OPTIONAL = {"yaml": "pgha.config.patroni_file"}
#: What nearly everybody needs: errors, instants, lines in the log.
COMMON = {"pgha", "pgha.errors", "pgha.clock", "pgha.log"}


class Rule(NamedTuple):
    """What a package may import of pgha besides itself, and what to do when it wants more."""

    may: set[str]
    instead: str


RULES = {
    "model": Rule({"pgha.clock"}, "model/ holds values without policy: put the behaviour where the value is used"),
    "decide": Rule({"pgha.model", "pgha.clock"}, "decide/ sees only its observation: let observe/ put the fact into it, or let an action ask for it"),
    "foresee": Rule({"pgha.model", "pgha.clock", "pgha.decide", "pgha.dcs"}, "foresee/ runs decide/ on what agents have seen: what it needs to know belongs into their observations"),
    "config": Rule(COMMON | {"pgha.model"}, "config/ says what is wanted: whoever uses the settings imports config's values, not the other way"),
    "dcs": Rule(COMMON | {"pgha.model"}, "dcs/ is a store without opinion: return a value and judge it in decide/ or lock/"),
    "postgres": Rule(COMMON | {"pgha.model"}, "postgres/ is mechanism without opinion: take what is needed as a parameter"),
    "lock": Rule(COMMON | {"pgha.model", "pgha.dcs", "pgha.systemd"}, "lock/ must work when nothing else does: take a callable or a value, and wire it in agent.py"),
    "observe": Rule(COMMON | {"pgha.model", "pgha.dcs", "pgha.postgres", "pgha.lock", "pgha.config.state", "pgha.machine"}, "observe/ only tells what is so: wire it in agent.py"),
    "act": Rule(COMMON | {"pgha.model", "pgha.config", "pgha.dcs", "pgha.postgres", "pgha.lock", "pgha.machine"}, "act/ carries out what it is given: put what it needs into the action, or wire it in agent.py"),
    "rest": Rule(COMMON | {"pgha.model", "pgha.decide", "pgha.foresee", "pgha.observe", "pgha.events"}, "rest/ answers from the last observation and never acts: a request becomes a fact of the next pass"),
    "ctl": Rule(COMMON | {"pgha.model", "pgha.config", "pgha.dcs", "pgha.foresee"}, "ctl/ is another program: what it needs of an agent it asks by HTTP"),
    "demo": Rule(COMMON | {"pgha.model", "pgha.config", "pgha.dcs", "pgha.postgres", "pgha.ctl"}, "demo/ is another program: it starts agents as processes and looks at them from outside"),
}
#: The only files outside the packages that know several of them.
FREE = {"pgha.__main__", "pgha.agent"}
#: Files directly in pgha/: what they may import. The agent's parts (inbox, announce, systemd) know neither loop nor rules.
LOOSE = {
    "pgha": set[str](),
    "pgha.errors": set[str](),
    "pgha.clock": set[str](),
    "pgha.log": {"pgha.systemd"},
    "pgha.leave": COMMON | {"pgha.config", "pgha.lock"},
    "pgha.replay": COMMON | {"pgha.model", "pgha.decide"},
    "pgha.announce": COMMON | {"pgha.model", "pgha.dcs"},
    "pgha.inbox": COMMON | {"pgha.model", "pgha.dcs", "pgha.config", "pgha.rest"},
    "pgha.provenance": COMMON | {"pgha.model", "pgha.config", "pgha.postgres", "pgha.rest"},
    "pgha.why": COMMON | {"pgha.model", "pgha.config", "pgha.ctl", "pgha.postgres"},
    "pgha.events": COMMON | {"pgha.model"},
    "pgha.chronicle": COMMON | {"pgha.model", "pgha.rest", "pgha.events"},
    "pgha.systemd": set[str](),
    "pgha.as_started": COMMON | {"pgha.config"},
    "pgha.reread": set[str](),
    "pgha.surface": COMMON | {"pgha.model", "pgha.config", "pgha.dcs", "pgha.machine", "pgha.rest"},
    "pgha.machine": COMMON | {"pgha.postgres", "pgha.lock", "pgha.rest", "pgha.systemd"},
}

#: Interfaces only: the drivers are chosen in agent.py and ctl/.
DRIVERS = {"pgha.dcs.memory", "pgha.dcs.etcd3", "pgha.dcs.consul", "pgha.dcs.zookeeper"}
NO_DRIVERS = {"lock", "observe", "act", "rest", "foresee"}

#: Modules whose import means a clock, I/O, chance or other threads.
IMPURE = {"asyncio", "ctypes", "fcntl", "glob", "http", "io", "locale", "logging", "multiprocessing", "os", "pathlib", "platform", "random",
          "secrets", "select", "selectors", "shutil", "signal", "socket", "sqlite3", "ssl", "subprocess", "sys", "tempfile", "threading", "time", "uuid",
          "trio", "trio_websocket", "httpx", "h11", "psycopg"}
IMPURE_CALLS = {"open", "print", "input", "exec", "eval", "__import__", "id"}
IMPURE_METHODS = {"now", "today", "utcnow"}
#: Of pgha.clock, what reads a clock; the arithmetic on instants is pure.
CLOCK_READERS = {"SystemClock", "Clock", "boot_id"}


class Import(NamedTuple):
    """`what` as a module, or a module and a name of it; from where."""

    what: str
    line: int


def modules() -> dict[str, Path]:
    """Every module of pgha by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()
TREES = {name: ast.parse(path.read_text(encoding="utf-8"), str(path)) for name, path in MODULES.items()}


def imports(name: str) -> Iterator[Import]:
    """Every import in the file, also inside functions and under TYPE_CHECKING."""
    for node in ast.walk(TREES[name]):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{place(name, node.lineno)}: relative import; write the whole name, so that grep finds it"
            for alias in node.names:
                yield Import(f"{node.module}.{alias.name}", node.lineno)


def module_of(what: str) -> str:
    """The module that is imported: `pgha.clock.Instant` → `pgha.clock`."""
    while what.startswith("pgha.") and what not in MODULES:
        what = what.rpartition(".")[0]
    return what


def package_of(name: str) -> str:
    """`pgha.lock.guard` → `lock`; a file directly in pgha/ → ``."""
    parts = name.split(".")
    return parts[1] if len(parts) > 2 or (len(parts) == 2 and MODULES[name].name == "__init__.py") else ""


def place(name: str, line: int) -> str:
    return f"{MODULES[name].relative_to(ROOT)}:{line}"


def covers(allowed: set[str], module: str) -> bool:
    """Is `module` one of these, or inside one of these packages?"""
    return any(module == each or (each != "pgha" and module.startswith(f"{each}.")) for each in allowed)


def test_every_package_has_a_rule() -> None:
    packages = {package_of(name) for name in MODULES} - {""}
    assert packages <= RULES.keys(), f"write down here and in pgha/__init__.py what these may import: {packages - RULES.keys()}"
    loose = {name for name in MODULES if package_of(name) == ""}
    assert loose <= FREE | LOOSE.keys(), f"a new file directly in pgha/: give it a package, or a rule here: {loose - FREE - LOOSE.keys()}"


@pytest.mark.parametrize("package", RULES)
def test_packages_import_only_what_they_may(package: str) -> None:
    rule = RULES[package]
    allowed = rule.may | {f"pgha.{package}"}
    wrong = []
    for name in MODULES:
        if package_of(name) != package:
            continue
        for what, line in imports(name):
            module = module_of(what)
            if module.split(".")[0] != "pgha":
                continue
            if not covers(allowed, module):
                wrong.append(f"{place(name, line)} imports {module}: {rule.instead}")
            if package in NO_DRIVERS and module in DRIVERS:
                wrong.append(f"{place(name, line)} imports {module}: take a `dcs.Store`; agent.py chooses the driver")
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("name", LOOSE)
def test_files_outside_the_packages_import_only_what_they_may(name: str) -> None:
    wrong = [
        f"{place(name, line)} imports {module}: only {', '.join(sorted(LOOSE[name])) or 'the standard library'}"
        for what, line in imports(name)
        if (module := module_of(what)).split(".")[0] == "pgha" and not covers(LOOSE[name], module)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_packages_that_are_in_the_archive_are_imported() -> None:
    wrong = [
        f"{place(name, line)} imports {what}: not one of {', '.join(sorted(THIRD_PARTY))}, which is all that the archive has"
        for name in MODULES
        for what, line in imports(name)
        if (top := what.split(".")[0]) not in THIRD_PARTY | {"pgha"} and top not in sys.stdlib_module_names and OPTIONAL.get(top) != name
    ]
    assert not wrong, "\n".join(wrong)


def test_an_optional_package_is_imported_only_when_it_is_needed() -> None:
    wrong = [
        f"{place(name, node.lineno)} imports {top} at the top: it may not be installed; import it where it is used, and say what to install"
        for name in MODULES
        for node in TREES[name].body
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for top in OPTIONAL
        if any(imported.split(".")[0] == top for imported in ([alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]))
    ]
    assert not wrong, "\n".join(wrong)


@pytest.mark.parametrize("package", ["model", "decide", "foresee"])
def test_pure_packages_touch_no_clock_no_chance_no_world(package: str) -> None:
    instead = "make it a field of Observation (observe/ fills it in) or an action (act/ carries it out)"
    wrong = []
    for name in MODULES:
        if package_of(name) != package:
            continue
        for what, line in imports(name):
            if what.split(".")[0] in IMPURE or what.startswith("urllib.request") or what == "pgha.log" or (module_of(what) == "pgha.clock" and what.rpartition(".")[2] in CLOCK_READERS):
                wrong.append(f"{place(name, line)} imports {what}: {instead}")
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.Global):
                wrong.append(f"{place(name, node.lineno)} has a global: what must be kept between passes belongs into Memory")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in IMPURE_CALLS:
                wrong.append(f"{place(name, node.lineno)} calls {node.func.id}(): {instead}")
            elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in IMPURE_METHODS:
                wrong.append(f"{place(name, node.lineno)} calls .{node.func.attr}(): `observation.now` is the only clock")
    assert not wrong, "\n".join(wrong)


def test_the_guard_needs_only_the_standard_library() -> None:
    """It must start in little memory, from the archive, with nothing unpacked: so everything it reaches is looked at."""
    if "pgha.lock.guard" not in MODULES:
        pytest.fail("pgha/lock/guard.py is gone: the fence depends on it")
    reached, wrong = set[str](), []
    todo = ["pgha.lock.guard"]
    while todo:
        name = todo.pop()
        if name in reached:
            continue
        reached.add(name)
        # Importing a module runs its packages' __init__ first.
        todo += [".".join(name.split(".")[:depth]) for depth in range(1, name.count(".") + 1)]
        for what, line in imports(name):
            module = module_of(what)
            if module.split(".")[0] == "pgha":
                todo.append(module)
                if package_of(module) not in ("", "lock"):
                    wrong.append(f"{place(name, line)} imports {module}, and the guard reaches it: pass plain values on its command line or socket")
            elif module.split(".")[0] not in sys.stdlib_module_names:
                wrong.append(f"{place(name, line)} imports {what}, and the guard reaches it: the standard library only")
    assert not wrong, "\n".join(wrong)


def test_starting_pgha_imports_little() -> None:
    """`pgha --version`, `ctl` and the guard pay for every import at the top of these."""
    for name in ("pgha", "pgha.__main__", "pgha.errors"):
        for node in TREES[name].body:
            if isinstance(node, ast.Import):
                heavy = [alias.name for alias in node.names if alias.name not in ("os", "sys")]
            elif isinstance(node, ast.ImportFrom):
                heavy = [node.module or ""] if node.module not in ("__future__", "collections.abc", "typing", "pgha", "pgha.errors") else []
            else:
                continue
            assert not heavy, f"{place(name, node.lineno)} imports {heavy} at the top: import it inside the command that needs it"


def test_tests_use_no_mocks() -> None:
    wrong = []
    for path in sorted((ROOT / "tests").rglob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
        relative = path.relative_to(ROOT)
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            if any(name.startswith(("unittest.mock", "mock.")) or name == "mock" for name in names):
                wrong.append(f"{relative}:{node.lineno} imports a mock: use the real thing, or a fake that passes the contract")
            if relative.is_relative_to("tests/decide") and isinstance(node, ast.arg) and node.arg == "monkeypatch":
                wrong.append(f"{relative}:{node.lineno} patches: decide/ takes values, so give it another value")
    assert not wrong, "\n".join(wrong)


def test_every_folder_of_tests_is_run_by_the_test_command() -> None:
    """`testpaths` is a list, because its order is: quick ones first."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["pytest"]["ini_options"]["testpaths"]
    folders = {f"tests/{path.relative_to(ROOT / 'tests').parts[0]}" for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders <= set(listed), f"add to testpaths in pyproject.toml: {sorted(folders - set(listed))}"
    assert "tests/test_*.py" in listed


def test_tests_need_only_this_checkout() -> None:
    """They run on a bare machine from a fresh clone, where no folder stands beside it."""
    wrong = [
        f"{path.relative_to(ROOT)}:{node.lineno} names {node.value}: copy what is needed into tests/"
        for path in sorted((ROOT / "tests").rglob("*.py"))
        if path.name != "test_architecture.py"
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path)))
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(("/work/", "/opt/pgha"))
    ]
    assert not wrong, "\n".join(wrong)
