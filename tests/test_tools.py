"""Tools: exact and bounded whatever the model asks, and calls in every dialect."""

import contextlib
import itertools
import json
import os
import random
import sys
import threading
import time
from fractions import Fraction
from types import SimpleNamespace

import pytest

from jaxreason import tools
from jaxreason.options import fields
from jaxreason.tools import Session, Tool, ToolError, run
from jaxreason.tools import human as human_
from jaxreason.tools.calculator import TooLarge, evaluate, written
from jaxreason.tools.calls import DIALECTS, Call, Malformed, described, schema
from jaxreason.tools.interface import shortened, stateless
from jaxreason.types import Task

TASK = Task("How many?", "7")


def call(tool, **arguments):
    return run(tool, tool.open(TASK), arguments, lambda thread: None)


# ------------------------------------------------------------------------------------------------------------- calculator


def drawn(rng, depth):
    """Draw an expression, as text for the calculator and for Python's fractions."""
    if depth == 0 or rng.random() < 0.2:
        number = rng.choice([str(rng.randrange(1000)), f"{rng.randrange(100)}.{rng.randrange(100):02d}"])
        return number, f"Fraction('{number}')"
    one, other = drawn(rng, depth - 1), drawn(rng, depth - 1)
    kind = rng.randrange(7)
    if kind == 0:
        return f"-({one[0]})", f"(-({one[1]}))"
    if kind == 1:
        power = rng.randrange(-2, 4)
        return f"({one[0]})^{power}", f"(({one[1]})**({power}))"
    operator = "+-*/%"[kind - 2]
    return f"({one[0]}){operator}({other[0]})", f"(({one[1]}){operator}({other[1]}))"


def test_the_calculator_is_exact():
    rng, judged = random.Random(0), 0
    for _ in range(2000):
        text, code = drawn(rng, 3)
        try:
            expected = eval(code, {"Fraction": Fraction})
        except ZeroDivisionError:
            with pytest.raises(ToolError, match="division by zero"):
                evaluate(text)
            continue
        with contextlib.suppress(TooLarge):
            assert evaluate(text) == expected, text
            judged += 1
    assert judged > 1500


@pytest.mark.parametrize(
    ("expression", "expected"),
    [
        ("2+3*4", "14"),
        ("(2+3)*4", "20"),
        ("-2^2", "-4"),
        ("2^3^2", "512"),
        ("2**-2", "0.25"),
        ("0^0", "1"),
        ("0^5", "0"),
        ("(-1)^99999999999", "-1"),
        ("7%3", "1"),
        ("10-4-3", "3"),
        ("100/10/5", "2"),
        ("0.1+0.2", "0.3"),
        ("1/3", "0.333333333333"),
        ("2/3", "0.666666666667"),
        ("-1/3", "-0.333333333333"),
        ("1/7000000", "0.000000142857142857"),
        ("1,234,567 + 1", "1234568"),
        ("$3.50 * 2", "7"),
        ("6 × 7 ÷ 2 − 1", "20"),
        ("--3", "3"),
        ("+5", "5"),
        (".5*4", "2"),
        ("99999999999999999999/3", "33333333333333333333"),
        ("1234567890123456/7", "176366841446208"),
        ("3*4=", "12"),
    ],
)
def test_expressions(expression, expected):
    assert call(tools.make("calculator"), expression=expression).text == expected


HOSTILE_EXPRESSIONS = [
    "9**9**9**9**9",
    "2^99999999999999999999",
    "2^-99999999999999999999",
    "(1/3)^999999",
    "10^600*10^600",
    "9" * 1000,
    "(" * 900 + "1" + ")" * 900,
    "-" * 999 + "1",
    "1" * 2_000_000,
    "1/0",
    "0^-1",
    "5%0",
    "2^0.5",
    "",
    " ",
    "()",
    "1+",
    "*1",
    "1 2",
    "1)(",
    "(1",
    "1)",
    "abs(1)",
    "__import__('os').system('true')",
    "1e999",
    "inf",
    "nan",
    "1\x002",
    "\ud800",
    "٣+٤",
    "１+１",
    "1\u200b+1",
    "x=5",
    "1..2",
    "1.2.3",
    "0x10",
    "1_000",
    "[1]",
    "1;2",
    "\n".join(["1"] * 10),
]


@pytest.mark.parametrize("expression", HOSTILE_EXPRESSIONS, ids=range(len(HOSTILE_EXPRESSIONS)))
def test_a_hostile_expression_gets_a_short_answer(expression):
    started = time.perf_counter()
    result = call(tools.make("calculator"), expression=expression)
    assert time.perf_counter() - started < 5
    assert not result.failure
    assert len(result.text) < 700
    assert result.is_error or result.text in ("1", "-1")


def test_values_are_written_as_decimals_that_round_trip():
    rng = random.Random(1)
    for _ in range(500):
        value = Fraction(rng.randrange(-(10**6), 10**6), rng.choice([1, 2, 4, 5, 8, 10, 100]))
        assert Fraction(written(value)) == value
    for _ in range(500):
        value = Fraction(rng.randrange(-(10**9), 10**9), rng.randrange(1, 10**9))
        assert abs(Fraction(written(value)) - value) <= abs(value) / 10**11


# ------------------------------------------------------------------------------------------------------------- search


@pytest.fixture
def notes(tmp_path):
    (tmp_path / "rivers").mkdir()
    (tmp_path / "rivers" / "europe.md").write_text(
        "# Rivers\n\nThe Danube flows through ten countries.\n\nThe Rhine is shorter.\n"
    )
    (tmp_path / "tea.txt").write_text("Green tea is steeped at 80 degrees.\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    return tmp_path


def test_search_names_its_sources(notes):
    tool = tools.make("search", folder=str(notes), words=4)
    assert call(tool, query="which countries does the danube cross").text.startswith("[rivers/europe.md:")
    assert "ten countries" in call(tool, query="danube").text
    assert call(tool, query="green tea").text == "[tea.txt:1] Green tea is steeped at 80 degrees."


@pytest.mark.parametrize("query", ["", "   ", "the", "zzzz", "\x00", "\ud800", "🙂", "tea " * 100_000])
def test_any_query_is_answered(notes, query):
    result = call(tools.make("search", folder=str(notes)), query=query)
    assert not result.failure
    assert result.is_error or "[" in result.text


def test_a_folder_without_text_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no text in"):
        tools.make("search", folder=str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        tools.make("search", folder=str(tmp_path / "missing"))
    with pytest.raises(ValueError, match="results=0"):
        tools.make("search", folder=str(tmp_path), results=0)

    (tmp_path / "common.txt").write_text("the of a")
    with pytest.raises(ValueError, match="has no word to search for"):
        tools.make("search", folder=str(tmp_path))
    with pytest.raises(ValueError, match="no folder"):
        tools.make("search", folder="~nobody_of_this_name/x")


def test_an_index_is_made_in_silence(tmp_path, caplog):
    (tmp_path / "a.txt").write_text("The heron is blue.")
    caplog.set_level("DEBUG")
    assert "blue" in call(tools.make("search", folder=str(tmp_path)), query="heron").text
    assert not [record for record in caplog.records if record.name.startswith("bm25s")]


def test_long_files_are_split(tmp_path):
    (tmp_path / "long.txt").write_text(" ".join(f"word{i}" for i in range(1000)))
    found = call(tools.make("search", folder=str(tmp_path), words=20), query="word777").text
    assert "word777" in found
    assert len(found.split()) < 60


# ------------------------------------------------------------------------------------------------------------- human


def test_a_person_answers_through_files(tmp_path):
    tool = tools.make("human", folder=str(tmp_path), timeout_s=20.0)

    def person():
        while not (asked := list(tmp_path.glob("*.question"))):
            time.sleep(0.01)
        assert asked[0].read_text() == "What is it?"
        asked[0].with_suffix(".answer").write_text("a heron\n")

    thread = threading.Thread(target=person)
    thread.start()
    assert call(tool, question="What is it?") == ("a heron", False, "")
    thread.join()
    assert not list(tmp_path.glob("*.question"))


def test_an_answer_that_is_still_being_written_is_waited_for(tmp_path, monkeypatch):
    path, written = tmp_path / "x.answer", iter(["", "4", "42", "42"])
    now, seen = itertools.count(), []

    def sleep(seconds):
        seen.append(next(written))
        path.write_text(seen[-1])

    monkeypatch.setattr(human_, "time", SimpleNamespace(monotonic=lambda: next(now), sleep=sleep))
    assert human_.wait_for(path, 100.0) == "42"
    assert len(seen) == 4


def test_nobody_answers(tmp_path):
    result = call(tools.make("human", folder=str(tmp_path), timeout_s=0.05), question="Anyone?")
    assert (result.text, result.is_error) == (human_.NOBODY, True)
    assert not list(tmp_path.iterdir())


@pytest.fixture
def terminal(monkeypatch):
    """Let a person sit at the terminal: `person(text)` types before the next question,
    and `answers` are typed when one is shown.
    """
    reader, writer = os.pipe()
    answers, shown = [], []

    def show(*words, **_):
        shown.append(" ".join(words))
        if "the model asks" in shown[-1] and answers:
            os.write(writer, answers.pop(0))

    with os.fdopen(reader) as stdin:
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        monkeypatch.setattr(human_, "print", show, raising=False)
        yield SimpleNamespace(answers=answers, shown=shown, type=lambda text: os.write(writer, text))
    os.close(writer)


def test_a_person_answers_at_the_terminal(terminal):
    terminal.answers.append(b"forty-two\n")
    assert call(tools.make("human", timeout_s=5.0), question="\x1b[31mred?").text == "forty-two"
    assert "\x1b" not in "".join(terminal.shown)
    assert call(tools.make("human", timeout_s=0.05), question="again?").text == human_.NOBODY


def test_a_late_answer_is_not_taken_for_the_next_question(terminal):
    answer, late = human_.ask, []
    assert answer("How many?", 0.0, late) == ""  # its time is over at once
    assert terminal.shown[-1].strip() == "too late; press Enter for the next question"
    terminal.type(b"seven\n")
    terminal.answers.append(b"blue\n")
    assert answer("Which colour?", time.monotonic() + 20, late) == "blue\n"
    assert len([said for said in terminal.shown if "asks" in said]) == 2


def test_a_question_after_one_without_an_answer_waits_for_enter(terminal):
    late = ["How many?"]
    assert human_.ask("Which colour?", 0.0, late) == ""
    assert not terminal.shown
    assert late


def test_what_was_typed_before_a_question_is_no_answer(terminal):
    terminal.type(b"hm\n")
    terminal.answers.append(b"blue\n")
    assert call(tools.make("human", timeout_s=20.0), question="Which colour?").text == "blue"


def test_a_question_that_waits_for_its_turn_has_the_same_time(monkeypatch):
    """A person answers one question at a time; eight rollouts may ask at once."""
    reader, writer = os.pipe()
    with os.fdopen(reader) as stdin:
        stdin.isatty = lambda: True
        monkeypatch.setattr(sys, "stdin", stdin)
        tool, results, started_s = tools.make("human", timeout_s=1.0), [], time.monotonic()
        threads = [threading.Thread(target=lambda: results.append(call(tool, question="?").text)) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [human_.NOBODY] * 8
        assert time.monotonic() - started_s < 7
    os.close(writer)


def test_a_human_needs_a_way_to_answer(monkeypatch):
    with open(os.devnull) as nothing:
        monkeypatch.setattr(sys, "stdin", nothing)
        with pytest.raises(ValueError, match="no terminal to ask at; set folder="):
            tools.make("human")
    with pytest.raises(ValueError, match="timeout_s got 0"):
        tools.make("human", folder="x", timeout_s=0.0)
    with pytest.raises(ValueError, match="timeout_s got inf"):
        tools.make("human", folder="x", timeout_s=float("inf"))


# ------------------------------------------------------------------------------------------------------------- limits


def own(function, **more):
    return Tool("own", "Does it.", stateless(function), {"text": "a text"}, **more)


def test_a_tool_that_hangs_is_given_up():
    given_up, end = [], threading.Event()
    tool = own(lambda text: end.wait(60) and "", timeout_s=0.05)
    result = run(tool, tool.open(TASK), {"text": ""}, given_up.append)
    assert (result.text, result.is_error) == ("no answer in 0.05 s", True)
    assert given_up[0].is_alive()
    end.set()


@pytest.mark.parametrize("keeps_time", [True, False])
def test_a_tool_that_crashes_says_so(keeps_time):
    def crash(text):
        raise SystemExit(3) if text == "exit" else KeyError(text)

    for text, error in (("exit", "SystemExit"), ("x", "KeyError")):
        result = call(own(crash, keeps_time=keeps_time), text=text)
        assert (result.text, result.is_error) == (f"the tool failed with {error}", True)
        assert error in result.failure
    assert "returned a int" in call(own(lambda text: 3), text="").failure


def test_a_long_result_is_cut_in_its_middle():
    text = call(own(lambda text: "a" * 50 + "b" * 50, max_chars=25), text="").text
    assert (text, len(text)) == ("a" * 10 + " ... " + "b" * 10, 25)
    assert shortened("abc", 3) == "abc"


def test_wrong_arguments_are_explained():
    tool = own(lambda text: text)
    assert call(tool, text="x", colour="red").text == "unknown argument colour; own takes: text"
    assert call(tool).text == "missing argument text; own takes: text"
    assert call(tool, text=12).text == "12"
    for value in ("true", "null", "1.5", "NaN", '{"a": [1, "é"]}', "9" * 4300):
        assert call(tool, text=json.loads(value)).text == value


def test_an_argument_of_any_depth_is_answered():
    """JSON is written from deeper in the stack than it was read."""
    tool, deepest = own(lambda text: "answered"), 0
    for depth in range(sys.getrecursionlimit() - 200, sys.getrecursionlimit()):
        for opening, closing in ("[", "]"), ('{"a":', "}"):
            (read,) = DIALECTS["llama3"]().read(
                f'{{"name": "own", "parameters": {{"text": {opening * depth}1{closing * depth}}}}}', []
            )
            if isinstance(read, Call):
                deepest = max(deepest, depth)
                assert call(tool, **read.arguments).text in ("answered", "an argument is nested too deep")
    assert deepest
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert call(tool, text=deep) == ("an argument is nested too deep", True, "")


def test_tools_of_a_config(tmp_path):
    made = tools.make_all(["calculator", {"name": "human", "folder": str(tmp_path)}])
    assert [tool.name for tool in made] == ["calculator", "human"]
    with pytest.raises(ValueError, match="two tools are called 'calculator'"):
        tools.make_all(["calculator", "calculator"])
    assert len(tools.make_all(["calculator", {"name": "calculator", "as_name": "sum"}])) == 2
    with pytest.raises(ValueError, match=r"unknown tool 'calculater' \(did you mean 'calculator'\?\)"):
        tools.make_all(["calculater"])
    with pytest.raises(ValueError, match="tools is empty"):
        tools.make_all([])
    with pytest.raises(ValueError, match="tools got 'calculator'"):
        tools.make_all("calculator")
    with pytest.raises(ValueError, match="field of tool 'calculator'"):
        tools.make_all([{"name": "calculator", "digits": 3}])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", ""),
        ("name", 3),
        ("name", "a: b"),
        ("name", "</tool>"),
        ("help", None),
        ("help", ""),
        ("help", "two\nlines"),
        ("open", "open"),
        ("parameters", {}),
        ("parameters", ["text"]),
        ("parameters", {"text": 3}),
        ("timeout_s", 0),
        ("timeout_s", float("inf")),
        ("timeout_s", float("nan")),
        ("timeout_s", "3"),
        ("timeout_s", True),
        ("max_chars", 0),
        ("max_chars", 2.5),
    ],
)
def test_a_wrong_tool_of_a_user_is_refused(tmp_path, monkeypatch, field, value):
    (tmp_path / "my_tool.py").write_text(
        "from jaxreason.tools import Session, Tool\n"
        "def make(**more):\n"
        "    return Tool('own', 'Does it.', lambda task: Session(str))._replace(**more)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "my_tool", raising=False)
    import my_tool

    monkeypatch.setattr(my_tool, "broken", lambda: my_tool.make(**{field: value}), raising=False)
    assert tools.make("my_tool:make").name == "own"
    with pytest.raises(ValueError, match=f"tool 'my_tool:broken': {field} got "):
        tools.make("my_tool:broken")


def test_every_tool_is_documented():
    for maker in tools.TOOLS.values():
        assert maker.__doc__
        assert all(field.help for field in fields.parameters(maker))


# ------------------------------------------------------------------------------------------------------------- dialects

CALCULATOR, SEARCH = own(lambda text: text)._replace(name="calculator"), own(lambda text: text)._replace(name="search")
TWO = (CALCULATOR, SEARCH)


@pytest.mark.parametrize(
    ("dialect", "text", "expected"),
    [
        ("brackets", "so [47*83=", [Call("calculator", {"text": "47*83"})]),
        ("brackets", "[1+1=2][2+2=", [Call("calculator", {"text": "2+2"})]),
        ("brackets", "[[3=", [Call("calculator", {"text": "3"})]),
        ("brackets", "[=", [Call("calculator", {"text": ""})]),
        ("brackets", "1+1=", []),
        ("brackets", "[1=2", []),
        ("angles", "pays <<3*4=", [Call("calculator", {"text": "3*4"})]),
        ("tags", "let me see <tool>search: two: words</tool>", [Call("search", {"text": "two: words"})]),
        ("tags", "<tool>dig: x</tool>", [Call("dig", {})]),
        ("tags", "<tool>just words</tool>", [Malformed("write <tool>name: argument</tool>")]),
        ("tags", "<tool>a<tool>search:b</tool>", [Call("search", {"text": "b"})]),
        ("tags", "<tool>search: x</tool> and more", []),
        ("hermes", '<tool_call>\n{"name": "search", "arguments": {"text": "x"}}\n</tool_call>', [Call("search", {"text": "x"})]),
        (
            "hermes",
            '<tool_call>{"name": "a"}</tool_call><tool_call>{"name": "b", "arguments": {}}</tool_call>',
            [Call("a", {}), Call("b", {})],
        ),
        ("hermes", "<think><tool_call>{}</tool_call></think>no call", []),
        ("hermes", "<tool_call>{nonsense}</tool_call>", [Malformed("the call is not JSON")]),
        ("hermes", "<tool_call>[1]</tool_call>", [Malformed('the call has no "name"')]),
        ("hermes", '<tool_call>{"name": 3}</tool_call>', [Malformed('the call has no "name"')]),
        ("hermes", '<tool_call>{"name": "a", "arguments": "x"}</tool_call>', [Malformed('"arguments" must be an object')]),
        ("hermes", '<tool_call>{"name": "a"}', [Malformed("</tool_call> is missing")]),
        ("hermes", "<tool_call>" + "[" * 100_000 + "</tool_call>", []),
        ("hermes", "<tool_call>" + "[" * 50_000 + "</tool_call>", [Malformed("the call is not JSON")]),
        ("llama3", '{"name": "search", "parameters": {"text": "x"}}', [Call("search", {"text": "x"})]),
        ("llama3", '<|python_tag|>{"name": "search", "parameters": {"text": "x"}}', [Call("search", {"text": "x"})]),
        ("llama3", '{"name": "search", "parameters": {', [Malformed("the call is not JSON")]),
        ("llama3", "The name is {x}.", []),
    ],
)
def test_calls_are_read(dialect, text, expected):
    assert DIALECTS[dialect]().read(text, TWO) == expected


@pytest.mark.parametrize("dialect", DIALECTS)
def test_no_text_stops_a_dialect(dialect):
    rng = random.Random(0)
    pieces = [
        "[",
        "]",
        "=",
        "<tool>",
        "</tool>",
        ":",
        "<tool_call>",
        "</tool_call>",
        "{",
        "}",
        '"name"',
        "\ud800",
        "\0",
        "<<",
        ">>",
        "1",
    ]
    made = DIALECTS[dialect]()
    for _ in range(2000):
        made.read("".join(rng.choices(pieces, k=rng.randrange(30))), TWO)
    for piece in pieces:
        started = time.perf_counter()
        made.read(piece * (1_000_000 // len(piece)), TWO)
        assert time.perf_counter() - started < 5


@pytest.mark.parametrize("dialect", DIALECTS)
def test_what_a_dialect_shows_as_an_example_it_reads(dialect):
    made = DIALECTS[dialect]()
    assert made.read(made.example(CALCULATOR), TWO) == [
        Call("calculator", {"text": made.read(made.example(CALCULATOR), TWO)[0].arguments["text"]})
    ]
    assert made.example(CALCULATOR) in described([CALCULATOR], made)


def test_a_result_can_not_close_its_own_tags():
    assert DIALECTS["tags"]().write("a</result>b", False) == "<result>ab</result>"


def test_the_schema_of_a_tool():
    assert schema(CALCULATOR)["function"]["parameters"]["required"] == ["text"]


def test_sessions_are_closed_once():
    closed = []
    session = Session(lambda text: text, lambda: closed.append(1))
    assert session.call("x") == "x"
    session.close()
    assert closed == [1]
