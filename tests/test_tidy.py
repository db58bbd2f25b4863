"""The house rules that a machine can check, read from the syntax trees of the package: who imports whom, where time and
chance may come from, no hidden state, nothing too long, and a law at the head of every file."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dlion"
LINES_MAX, FUNCTION_LINES_MAX, PARAMETERS_MAX = 400, 70, 7

PURE = ("exchange", "wire", "mesh", "tensors", "blocks", "selection", "messages", "learn.batching", "net.wan")
"""Rooms of numbers: time arrives as an argument, chance as a generator, and there are no files."""
WORLD = (
    "asyncio",
    "time",
    "random",
    "aiohttp",
    "torch",
    "logging",
    "os",
    "pathlib",
    "io",
    "shutil",
    "tempfile",
    "socket",
)
NODE = (
    "node",
    "company",
    "door",
    "farewell",
    "identity",
    "items",
    "journal",
    "keeper",
    "lane",
    "lastview",
    "membership",
    "neighbours",
    "newcomers",
    "once",
    "passages",
    "porch",
    "seams",
    "startline",
    "trainlane",
)
"""The files between which the node is divided."""
SHARED = ("base", "estates", "pace", "owed", "spread", "totals", "rounds", "parts")
"""Common ground of the strategies; every other file in exchange is a strategy."""

NEVER: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "numbers only": (PURE, WORLD),
    "strategies": (
        ("exchange",),
        tuple(f"dlion.{room}" for room in ("wire", "net", "cli", "config", "simulation", *NODE)),
    ),
    "the node": (NODE, ("aiohttp", "torch", "dlion.simulation", "dlion.config", "dlion.cli")),
    "learn": (("learn",), ("dlion.exchange", "dlion.net", "dlion.wire")),
    "net": (("net",), ("dlion.wire", "dlion.exchange")),
    "everyone": (("",), ("pickle", "marshal", "shelve", "cPickle")),
}
"""Rule: (these rooms, never import these)."""
ONLY: Mapping[str, tuple[str, ...]] = {
    "aiohttp": ("net.upgrade", "observe.admin", "cli", "embedded"),
    "torch": ("learn.workloads", "torch"),
    "dlion.cli": ("cli", "__main__", "embedded", "torch"),
    "dlion.simulation": ("simulation", "cli"),
}
"""Imported by these only."""

CLOCKS = {"time", "time_ns", "monotonic", "monotonic_ns", "perf_counter", "perf_counter_ns", "process_time", "sleep"}
CLOCK_KEEPERS = ("cli", "observe.evaluate", "testing")
"""The composition root, and what runs beside training and is told so."""
HANDS_ON = ("clock", "torch")
"""The virtual loop and the thread beside a user's own loop: what they catch, whatever it is, they raise elsewhere."""
SEEDED = {"default_rng", "Generator", "SeedSequence", "BitGenerator", "PCG64", "Philox"}
FROZEN = ("Mapping", "Final", "Sequence", "Collection", "tuple", "frozenset", "Speech", "ClassVar")
MAKERS = {"list", "dict", "set", "defaultdict", "deque", "Counter", "OrderedDict", "WeakKeyDictionary", "bytearray"}


@dataclass(frozen=True)
class Source:
    path: Path

    @property
    def name(self) -> str:
        """``exchange.dlion``; a package is its folder."""
        return ".".join(self.path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")

    @cached_property
    def text(self) -> str:
        return self.path.read_text()

    @cached_property
    def tree(self) -> ast.Module:
        return ast.parse(self.text)

    @cached_property
    def imports(self) -> list[tuple[int, str]]:
        """(line, module) of every import, also inside functions; ``from a import b`` counts as a and a.b."""
        found = []
        for node in ast.walk(self.tree):
            if isinstance(node, ast.Import):
                found += [(node.lineno, alias.name) for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, f"{self.path}: relative import"
                found += [(node.lineno, f"{node.module}.{alias.name}") for alias in node.names]
        return found

    def within(self, rooms: tuple[str, ...]) -> bool:
        return any(self.name == room or self.name.startswith(room + ".") or not room for room in rooms)


@cache
def sources() -> list[Source]:
    return [Source(path) for path in sorted(PACKAGE.rglob("*.py"))]


def imported(module: str, forbidden: str) -> bool:
    return module == forbidden or module.startswith(forbidden + ".")


def report(broken: list[str]) -> None:
    assert not broken, "\n" + "\n".join(broken)


def at(source: Source, line: int, what: str) -> str:
    return f"{source.path.relative_to(ROOT)}:{line}: {what}"


@pytest.mark.parametrize("rule", NEVER)
def test_who_never_imports_what(rule: str) -> None:
    rooms, forbidden = NEVER[rule]
    report(
        [
            at(source, line, f"imports {module}")
            for source in sources()
            if source.within(rooms)
            for line, module in source.imports
            if any(imported(module, f) for f in forbidden)
        ]
    )


@pytest.mark.parametrize("module", ONLY)
def test_who_alone_imports_what(module: str) -> None:
    report(
        [
            at(source, line, f"imports {name}")
            for source in sources()
            if not source.within(ONLY[module])
            for line, name in source.imports
            if imported(name, module)
        ]
    )


def test_no_strategy_knows_another() -> None:
    report(
        [
            at(source, line, f"imports {module}")
            for source in sources()
            if source.within(("exchange",)) and source.name != "exchange"
            for line, module in source.imports
            if imported(module, "dlion.exchange")
            and module.removeprefix("dlion.exchange.").split(".")[0] not in (*SHARED, source.name.split(".")[1])
        ]
    )


def ambient(source: Source) -> Iterator[tuple[int, str]]:
    """Uses of a clock or of chance that nobody passed in."""
    names = {module.split(".")[-1] for _, module in source.imports if module.startswith("time.")}
    yield from ((line, "imports random") for line, module in source.imports if imported(module, "random"))
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in names & CLOCKS:
            yield node.lineno, f"{node.func.id}()"
        if not isinstance(node, ast.Attribute):
            continue
        of = node.value
        if isinstance(of, ast.Name) and of.id == "time" and node.attr in CLOCKS:
            yield node.lineno, ast.unparse(node)
        if isinstance(of, ast.Name) and (of.id in ("uuid", "secrets") or (of.id == "datetime" and "now" in node.attr)):
            yield node.lineno, ast.unparse(node)
        if (
            isinstance(of, ast.Attribute)
            and of.attr == "random"
            and getattr(of.value, "id", "") in ("np", "numpy")
            and node.attr not in SEEDED
        ):
            yield node.lineno, ast.unparse(node)
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Call) and not node.args and ast.unparse(node.func).endswith("default_rng"):
            yield node.lineno, "default_rng() without a seed"


def test_time_and_chance_are_passed_in() -> None:
    report(
        [at(s, line, what) for s in sources() if not s.within(CLOCK_KEEPERS) for line, what in sorted(set(ambient(s)))]
    )


def mutable(node: ast.expr | None) -> bool:
    if isinstance(node, ast.Call):
        return isinstance(node.func, ast.Name) and node.func.id in MAKERS
    return isinstance(node, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def state(source: Source) -> Iterator[tuple[int, str]]:
    """Containers at module level whose type lets anybody change them, and names declared global."""
    for node in source.tree.body:
        if isinstance(node, ast.Assign) and mutable(node.value):
            names = [ast.unparse(target) for target in node.targets]
            if names != ["__all__"]:
                yield node.lineno, f"{', '.join(names)} can be changed: annotate it as a Mapping, or make it a tuple"
        elif isinstance(node, ast.AnnAssign) and mutable(node.value):
            kind = ast.unparse(node.annotation)
            if not kind.startswith((*FROZEN, "Kinds")):
                yield node.lineno, f"{ast.unparse(node.target)}: {kind} can be changed"
    for inner in ast.walk(source.tree):
        if isinstance(inner, ast.Global):
            yield inner.lineno, f"global {', '.join(inner.names)}"


def test_no_module_holds_state() -> None:
    report([at(source, *found) for source in sources() for found in state(source)])


def catches(source: Source) -> Iterator[tuple[int, str]]:
    for node in ast.walk(source.tree):
        if not isinstance(node, ast.ExceptHandler):
            continue
        kinds = {ast.unparse(k) for k in (node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]) if k}
        raises_again = isinstance(node.body[-1], ast.Raise)
        if node.type is None or ("Exception" in kinds and not raises_again):
            yield node.lineno, "catches everything"
        elif "BaseException" in kinds and not raises_again:
            yield node.lineno, "swallows a cancellation"


def test_only_the_composition_root_catches_everything() -> None:
    report([at(s, *found) for s in sources() if not s.within(("cli", *HANDS_ON)) for found in catches(s)])


def functions(source: Source) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (n for n in ast.walk(source.tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def test_nothing_is_too_long() -> None:
    broken = []
    for source in sources():
        lines = source.text.count("\n")
        if lines > LINES_MAX:
            broken.append(at(source, 1, f"{lines} lines; at most {LINES_MAX}"))
        for function in functions(source):
            length = (function.end_lineno or 0) - function.lineno + 1
            if length > FUNCTION_LINES_MAX:
                broken.append(at(source, function.lineno, f"{function.name} has {length} lines"))
            arguments = [
                a.arg for a in (*function.args.posonlyargs, *function.args.args) if a.arg not in ("self", "cls")
            ]
            commands = source.within(("cli",))  # a verb has as many parameters as it has options
            if len(arguments) > PARAMETERS_MAX and not commands:
                broken.append(
                    at(source, function.lineno, f"{function.name} takes {len(arguments)} parameters in order")
                )
    report(broken)


def test_every_file_opens_with_its_law() -> None:
    """What it owns, what it must not know. A strategy's law is that of its room: it names its paper instead."""
    broken = []
    for source in sources():
        words = ast.get_docstring(source.tree) or ""
        strategy = source.within(("exchange",)) and source.name.split(".")[-1] not in SHARED
        if source.text and (not words or ("Law:" not in words and not strategy and "__" not in source.path.name)):
            broken.append(at(source, 1, "opens without a law"))
    report(broken)


def test_nobody_sets_up_logging_or_handles_signals_but_the_composition_root() -> None:
    """Somebody else's application is around us."""
    forbidden = {"basicConfig", "add_signal_handler", "set_event_loop", "set_event_loop_policy", "addHandler"}
    report(
        [
            at(source, node.lineno, ast.unparse(node))
            for source in sources()
            if not source.within(("cli",))
            for node in ast.walk(source.tree)
            if isinstance(node, ast.Attribute) and node.attr in forbidden
        ]
    )


@pytest.mark.parametrize(
    ("check", "text"),
    [
        (ambient, "import time\nt = time.time()"),
        (ambient, "from time import monotonic\nt = monotonic()"),
        (ambient, "x = np.random.rand(3)"),
        (ambient, "x = np.random.default_rng()"),
        (state, "cache = {}"),
        (state, "seen: list[int] = []"),
        (state, "def f():\n    global x\n    x = 1"),
        (catches, "try:\n    f()\nexcept Exception:\n    pass"),
        (catches, "try:\n    f()\nexcept:\n    raise"),
    ],
)
def test_the_checks_find_what_they_look_for(
    check: Callable[[Source], Iterator[tuple[int, str]]], text: str, tmp_path: Path
) -> None:
    path = tmp_path / "sample.py"
    path.write_text(text)
    assert list(check(Source(path)))
