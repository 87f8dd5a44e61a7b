"""Tests of functions: what travels between tests and program, what is counted, and which verdict is given."""

from __future__ import annotations

import tracemalloc

import pytest

from ra3_megatron.config.errors import UserError
from ra3_megatron.rlvr.sandbox import FunctionTests, Isolation, Limits, Program, Sandbox, StdinTests, Verdict
from ra3_megatron.rlvr.sandboxing.inside.tests import names_used
from tests.rlvr.programs import RIGHT, functions, script

pytestmark = pytest.mark.multiprocess

SAME = "def same(x):\n    return x\n"


@pytest.mark.parametrize(
    "test",
    [
        "assert same([1, 'a', 2.5, None, True, b'x', (1, {2: [3]}), {4, 5}, frozenset({6})]) == "
        "[1, 'a', 2.5, None, True, b'x', (1, {2: [3]}), {4, 5}, frozenset({6})]",
        "for value in (0, -1, 255, 256, -256, 2 ** 64, -(2 ** 64), 1j, -0.0, 1e300, '', '\\0', range(3, 9, 2), ...):\n"
        "    assert same(value) == value and type(same(value)) is type(value)",
        "assert same(int) is int and same(dict) is dict",
        "from decimal import Decimal\nassert same(Decimal('1.10')) == Decimal('1.10')",
        "from fractions import Fraction\nassert same(Fraction(1, 3)) == Fraction(1, 3)",
        "from datetime import *\nfor value in (date(2024, 2, 29), datetime(2024, 1, 2, 3, 4, 5, 6), time(1, 2), "
        "timedelta(-1, 5, 7)):\n    assert same(value) == value and type(same(value)) is type(value)",
        "from collections import *\nfor value in (deque([1, 2], 5), Counter('aab'), OrderedDict(a=1), "
        "defaultdict(int, {1: 2})):\n    assert same(value) == value and type(same(value)) is type(value)",
        "from collections import *\nassert same(deque([1], 5)).maxlen == 5 and same(defaultdict(list))[3] == []",
        "from collections import namedtuple\nassert same(namedtuple('P', 'x y')(1, 2)) == (1, 2)",
        "x = [1]\nassert same(x) is x and same([x, x])[1] is x",
        "x = []\nx.append(x)\nassert same(x) is x",
    ],
)
def test_values_travel(sandbox: Sandbox, test: str) -> None:
    outcome = sandbox.grade_one(functions(SAME, test))
    assert outcome.verdict is Verdict.PASSED, outcome


@pytest.mark.parametrize(
    ("code", "test"),
    [
        ("def f(x):\n    x.sort()", "x = [3, 1]\nf(x)\nassert x == [1, 3]"),
        ("def f(x):\n    x[0].append(1)", "x = [[]]\ny = x[0]\nf(x)\nassert y == [1] and x[0] is y"),
        ("def f(x):\n    x.sort()", "a, b = [2], [1]\nx = [a, b]\nf(x)\nassert x[0] is b and a == [2] and b == [1]"),
        ("def f(x):\n    x['k'] = x.pop('j')", "x = {'j': 1}\nf(x)\nassert x == {'k': 1}"),
        ("def f(x):\n    x.clear()", "x = {1, 2}\nf(x)\nassert x == set()"),
        ("def f(x):\n    x[1:] = b'zz'", "x = bytearray(b'ab')\nf(x)\nassert x == b'azz'"),
        (
            "def f(x):\n    x.appendleft(0)",
            "from collections import deque\nx = deque([1])\nf(x)\nassert list(x) == [0, 1]",
        ),
        (
            "def f(x, *, y):\n    y.append(x)\n    y[0] = True",
            "x, y = {}, [1]\nf(x, y=y)\nassert y == [True, {}] and y[1] is x",
        ),
        (
            "def f(x):\n    x[:] = [x[:]]\n    raise KeyError",
            "x = [1]\ntry:\n    f(x)\nexcept KeyError:\n    assert x == [1]",
        ),
    ],
)
def test_changed_arguments_are_changed(sandbox: Sandbox, code: str, test: str) -> None:
    """In place, with the identities that they had; not when the call raised."""
    outcome = sandbox.grade_one(functions(code, test))
    assert outcome.verdict is Verdict.PASSED, outcome


NODES = """
class Node:
    count = 0
    def __init__(self, value, *children):
        self.value, self.children = value, list(children)
        Node.count += 1
    def __len__(self):
        return 1 + sum(map(len, self.children))
    def __iter__(self):
        yield self.value
        for child in self.children:
            yield from child
    def __getitem__(self, place):
        return self.children[place]
    def __setitem__(self, place, child):
        self.children[place] = child
    def __call__(self):
        return self
    def __str__(self):
        return f"<{self.value}>"
def height(node):
    return 1 + max(map(height, node.children), default=0)
def numbers():
    yield from range(3)
"""


@pytest.mark.parametrize(
    "test",
    [
        "assert height(Node(1, Node(2), Node(3, Node(4)))) == 3",
        "n = Node(1, Node(2))\nassert len(n) == 2 and list(n) == [1, 2] and n[0].value == 2 and str(n) == '<1>' and n",
        "n = Node(1, Node(2))\nn[0] = Node(5)\nn.value = 9\nassert list(n) == [9, 5]",
        "n = Node(1)\nassert n == n and n != Node(1) and n != 1 and 1 in n and n in [n] and len({n, n}) == 1",
        "assert list(numbers()) == [0, 1, 2] and next(numbers()) == 0 and sum(numbers()) == 3 and 2 in numbers()",
        "assert list(zip(numbers(), 'abc')) == [(0, 'a'), (1, 'b'), (2, 'c')]",
        "Node(1)\nassert Node.count == 1",
    ],
)
def test_objects_stay_with_the_program(sandbox: Sandbox, test: str) -> None:
    """The tests hold handles: calls, attributes, items, iteration, length, text; equal to themselves only."""
    outcome = sandbox.grade_one(functions(NODES, test))
    assert outcome.verdict is Verdict.PASSED, outcome


COUNTED = """
class Large:
    alive = []
    def __init__(self):
        self.held = [0] * (4 << 20)
        Large.alive.append(self.number)
    number = property(id)
    def __del__(self):
        Large.alive.remove(self.number)
    def same(self, x):
        return x
    def itself(self):
        return [self, self]
    def __iter__(self):
        return iter([self])
kept = Large()
"""


def test_objects_that_no_test_holds_any_more_are_gone(sandbox: Sandbox) -> None:
    """Sixteen of them pass the memory of the sandbox; those that a test or the program holds stay what they are."""
    tests = [f"assert Large().same({number}) == {number}" for number in range(40)]
    tests += [
        "x = Large()\ny = x.itself()\nz = [e for e in y[0]]",
        "del y\nassert len(Large.alive) == 2 and x.same(1) == z[0].same(1) == kept.same(1) == 1",
        "del x\nassert len(Large.alive) == 2 and z[0].same(2) == 2",
        "del z, kept\nassert len(Large.alive) == 1",
        "for n in range(3000):\n    Large.same",
        "assert [e.same(3) for n in range(20) for e in Large()] == [3] * 20 and len(Large.alive) <= 2",
        "assert len(Large.alive) == 1",
    ]
    outcome = sandbox.grade_one(functions(COUNTED, *tests))
    assert outcome.verdict is Verdict.PASSED, outcome


@pytest.mark.parametrize(
    ("error", "caught"),
    [
        ("ValueError('no')", "ValueError"),
        ("KeyError('k')", "LookupError"),
        ("__import__('json').JSONDecodeError('no', 'x', 0)", "ValueError"),
        ("type('Mine', (TypeError,), {})()", "TypeError"),
        ("UnicodeDecodeError('utf-8', b'x', 0, 1, 'no')", "ValueError"),
        ("SystemExit(0)", "Exception"),
    ],
)
def test_exceptions_arrive(sandbox: Sandbox, error: str, caught: str) -> None:
    """As the nearest builtin class, to be caught by the tests."""
    code = f"def f():\n    raise {error}"
    test = f"try:\n    f()\nexcept {caught}:\n    pass\nelse:\n    assert False"
    outcome = sandbox.grade_one(functions(code, test))
    assert outcome.verdict is Verdict.PASSED, outcome
    assert sandbox.grade_one(functions(code, "f()")).verdict is Verdict.CRASHED


def test_what_is_counted_and_told(sandbox: Sandbox) -> None:
    """All tests run; the first failure gives the verdict and the words."""
    code = "def f(x):\n    return 1 // x"
    outcome = sandbox.grade_one(
        functions(code, "assert f(1) == 1", "assert f(0) == 0", "assert f(2) == 5", "assert f(1)")
    )
    assert (outcome.verdict, outcome.passed, outcome.total) == (Verdict.CRASHED, 2, 4)
    assert "ZeroDivisionError" in outcome.detail and "line 2" in outcome.detail and "test 2" in outcome.detail
    outcome = sandbox.grade_one(functions(code, "assert f(1) == 2, 'not one'", "f(0)"))
    assert (outcome.verdict, outcome.passed) == (Verdict.WRONG, 0) and "not one" in outcome.detail


@pytest.mark.parametrize(
    "result", ["10 ** 5000", "type('X', (), {'__str__': lambda self: 1 / 0})()"], ids=["too long", "without a text"]
)
def test_a_message_that_cannot_be_told_is_a_wrong_answer(sandbox: Sandbox, result: str) -> None:
    tests = ("assert f(0) == 0", "assert f(1) == 1, f(1)", "assert f(2) == 2")
    outcome = sandbox.grade_one(functions(f"def f(x):\n    return x if x != 1 else {result}\n", *tests))
    assert outcome.verdict is Verdict.WRONG and (outcome.passed, outcome.total) == (2, 3), outcome


def test_more_cpu_time_than_seconds() -> None:
    with Sandbox(Isolation.BUBBLEWRAP, Limits(seconds=3, cpu_seconds=30), workers=1) as sandbox:
        assert sandbox.grade_one(functions(SAME, "assert same(1) == 1")).verdict is Verdict.PASSED


def test_a_program_that_does_not_load(sandbox: Sandbox) -> None:
    outcome = sandbox.grade_one(functions("def f(x:\n    return 1", "assert f(1) == 1", "assert True"))
    assert (outcome.verdict, outcome.passed, outcome.total) == (Verdict.CRASHED, 0, 2)
    assert "SyntaxError" in outcome.detail and "line 1" in outcome.detail
    outcome = sandbox.grade_one(functions("import numpy", "assert True"))
    assert outcome.verdict is Verdict.CRASHED and "numpy" in outcome.detail


def test_annotations_are_evaluated(sandbox: Sandbox) -> None:
    """As Python does without a `from __future__`: those of our own modules are none of the program's."""
    code = "def add(a: {0}, b: {0}) -> {0}:\n    return a + b\n"
    whole = code + "print(add(1, 2), add.__annotations__['a'] is int)"
    programs = [functions(code.format(name), RIGHT) for name in ("List[int]", "int")]
    programs += [script(whole.format(name), ("", "3 True")) for name in ("List[int]", "int")]
    outcomes = sandbox.grade(programs)
    assert [outcome.verdict for outcome in outcomes] == [Verdict.CRASHED, Verdict.PASSED] * 2
    assert all("NameError" in outcome.detail for outcome in outcomes[::2])
    setup = "def kind(x: int): pass\nassert kind.__annotations__ == {'x': int}"
    assert sandbox.grade_one(functions(code.format("int"), RIGHT, setup=setup)).verdict is Verdict.PASSED


def test_a_missing_function(sandbox: Sandbox) -> None:
    outcome = sandbox.grade_one(functions("def g(): pass", "assert f(1) == 1"))
    assert outcome.verdict is Verdict.CRASHED and "NameError" in outcome.detail


def test_entry_points(sandbox: Sandbox) -> None:
    """With entry points, helpers of the setup stay even where the program has its own; builtins can be replaced."""
    setup = "def helper(x):\n    return x + 1\ndef f(x):\n    'a stub of the prompt'\n"
    code = "def helper(x):\n    return 0\ndef f(x):\n    return x + 1\ndef sum(a, b):\n    return a * b"
    test = "assert f(1) == helper(1) == 2"
    assert sandbox.grade_one(functions(code, test, setup=setup, entry_points=("f",))).verdict is Verdict.PASSED
    assert sandbox.grade_one(functions(code, "assert sum(2, 3) == 6")).verdict is Verdict.CRASHED
    assert sandbox.grade_one(functions(code, "assert sum(2, 3) == 6", entry_points=("sum",))).verdict is Verdict.PASSED


def test_a_variable_with_the_name_of_a_module_that_is_not_here(sandbox: Sandbox) -> None:
    """`nt` is Windows' own."""
    outcome = sandbox.grade_one(functions(SAME, "nt = [1]\nnt.append(2)\nassert same(nt) == [1, 2]"))
    assert outcome.verdict is Verdict.PASSED, outcome


@pytest.mark.parametrize(
    ("source", "modules"),
    [
        ("assert f(1.5) == 'math' and x.math", []),
        ("math.pi", ["math"]),
        ("f(math . \\\n pi)", ["math"]),
        ("f'{math.pi}'", ["math"]),
        ("(\nmath\n#\n.pi)", ["math"]),
        ("\uff4d\u1d43th.pi", ["math"]),  # as Python reads names: NFKC
        ("_thread.x\nbase64.y", ["_thread", "base64"]),
    ],
)
def test_modules_of_tests_are_found_with_and_without_the_names(source: str, modules: list[str]) -> None:
    assert [sorted(names_used(["g(h)", source], only)[1]) for only in (True, False)] == [modules] * 2


def test_names_are_read_from_one_tree_at_a_time() -> None:
    """Of large tests all trees together passed the memory of a sandbox."""

    def peak(count: int, modules_only: bool) -> int:
        tracemalloc.start()
        assert names_used([source] * count, modules_only)[1] == []
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    source = f"assert f({list(range(5000))}) == 1"
    assert peak(6, False) < 1.5 * peak(1, False)
    assert peak(6, True) < peak(1, False) / 3, "no tree where no module can be"


def test_strings_hash_alike(sandbox: Sandbox) -> None:
    """What depends on the order of a set of strings is the same in every run."""
    program = functions("def f():\n    return list({'a', 'b', 'c', 'd', 'e'})", "assert 0, ''.join(f())")
    assert len({outcome.detail for outcome in sandbox.grade([program] * 3)}) == 1


def test_order_is_kept(sandbox: Sandbox) -> None:
    """Several at once, the slow first."""
    programs = [
        functions(
            f"import time\ndef f():\n    time.sleep({delay})\n    return {number}",
            f"assert 0, 'number {number} ' + str(f())",
        )
        for number, delay in enumerate((0.6, 0, 0.3, 0))
    ]
    details = [outcome.detail for outcome in sandbox.grade(programs)]
    assert all(f"number {number} {number}" in detail for number, detail in enumerate(details))


def test_without_isolation(caplog: pytest.LogCaptureFixture) -> None:
    """The same protocol and verdicts as a plain subprocess, said once."""
    with Sandbox(Isolation.UNSAFE, Limits(seconds=3), workers=2) as sandbox:
        outcomes = sandbox.grade(
            [
                functions("def add(a, b):\n    return a + b", "assert add(1, 2) == 3"),
                functions("import sys\nsys.exit(0)", "assert add(1, 2) == 3"),
                functions("import os\nos.kill(os.getppid(), 9)", "assert add(1, 2) == 3"),
                functions("while True:\n    pass", "assert add(1, 2) == 3"),
                functions("x = bytearray(1 << 30)", "assert add(1, 2) == 3"),
                functions("while True:\n    print('x' * 1000)", "assert add(1, 2) == 3"),
                Program("print(input())", StdinTests((("1", "1"), ("2", "3")))),
            ]
        )
    passed, crashed = Verdict.PASSED, Verdict.CRASHED
    expected = [passed, crashed, crashed, Verdict.TIMEOUT, Verdict.MEMORY, Verdict.FLOOD, Verdict.WRONG]
    assert [outcome.verdict for outcome in outcomes] == expected
    assert sum("subprocess-unsafe" in record.message for record in caplog.records) <= 1


def test_tests_that_test_nothing_are_refused() -> None:
    """No test, no Python, no checker: mistakes of who wrote the tests, never a verdict."""
    with pytest.raises(UserError, match="there is none"):
        FunctionTests("", ())
    with pytest.raises(UserError, match="test 2 of functions: no Python"):
        FunctionTests("", ("assert True", "assert ("))
    with pytest.raises(UserError, match="setup of tests"):
        FunctionTests("def", ("assert True",))
    with pytest.raises(UserError, match="there is no case"):
        StdinTests(())
    with pytest.raises(UserError, match="defines no function check"):
        StdinTests((("", ""),), checker="x = 1")
    for limits in ({"seconds": 0}, {"processes": 2}, {"memory_mib": 1}, {"disk_mib": 0}, {"seconds": float("nan")}):
        with pytest.raises(UserError, match=next(iter(limits))):
            Limits(**limits)  # type: ignore[arg-type]


def test_a_sandbox_is_opened_first() -> None:
    with pytest.raises(RuntimeError, match="not open"):
        Sandbox(Isolation.BUBBLEWRAP, Limits(), 1).grade_one(functions("", "assert True"))
