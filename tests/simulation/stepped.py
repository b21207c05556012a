"""pgha's own sources, loaded a second time: over `kernel` in place of trio, and over the model in place of PostgreSQL and /proc.

Nothing of them is copied or changed: the files are compiled as they are, and what they import is looked up here first.
`hands` says what stands in for what. Level (b) runs the very same sources, imported as usual, over trio.
"""

from __future__ import annotations

import builtins
import importlib
import types
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

from tests.simulation import kernel

ROOT = Path(__file__).parents[2]

#: What waits, and therefore is loaded again; in the order of their imports.
SOURCES = (
    "pgha.dcs.outage", "tests.simulation.store", "pgha.lock.renewer", "pgha.lock.promise", "pgha.lock.failsafe", "pgha.lock.fence", "pgha.lock.watchdog", "pgha.announce", "pgha.observe.cluster",
    "pgha.act.context", "pgha.act.steps", "pgha.act.vet", "pgha.act.scripts", "pgha.act.hooks", "pgha.act.keys", "pgha.act.start", "pgha.act.stop", "pgha.act.demote", "pgha.act.promote", "pgha.act.follow",
    "pgha.act.inspect", "pgha.act.methods", "pgha.act.clone", "pgha.act.rewind", "pgha.act.abandon", "pgha.act.bootstrap",
    "pgha.act",
)


class Loader:
    """`stand_ins`: full module name → what is given in its place."""

    def __init__(self, stand_ins: dict[str, Any]) -> None:
        self.modules: dict[str, Any] = {"trio": kernel, **stand_ins}
        self._builtins = {**vars(builtins), "__import__": self._import}

    def load(self, name: str) -> ModuleType:
        path = ROOT / (name.replace(".", "/") + ".py")
        if not path.exists():
            path = ROOT / name.replace(".", "/") / "__init__.py"
        module = types.ModuleType(f"stepped.{name}")
        module.__file__ = str(path)
        module.__dict__["__builtins__"] = self._builtins
        import sys
        sys.modules[module.__name__] = module       # msgspec looks annotations up there
        self.modules[name] = module
        exec(compile(path.read_text(), str(path), "exec"), module.__dict__)
        return module

    def _import(self, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
        if name in self.modules and (fromlist or "." not in name):
            return self.modules[name]
        if fromlist:
            real = importlib.import_module(name)
            ours = {item: self.modules[f"{name}.{item}"] for item in fromlist if f"{name}.{item}" in self.modules}
            if not ours:
                return real
            return SimpleNamespace(**{item: ours.get(item) or getattr(real, item, None) or importlib.import_module(f"{name}.{item}") for item in fromlist})
        return builtins.__import__(name, globals, locals, fromlist, level)


_loaded: SimpleNamespace | None = None


def sources() -> SimpleNamespace:
    """The loaded modules, by the last part of their names; loaded once a process."""
    global _loaded
    if _loaded is None:
        from tests.simulation import hands

        loader = Loader(hands.stand_ins())
        _loaded = SimpleNamespace(**{"_".join(name.split(".")[-2:]): loader.load(name) for name in SOURCES}, loader=loader)
    return _loaded
