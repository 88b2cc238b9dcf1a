"""The interpreter that a model calls: it keeps names, says errors in a line, and starts
anew when it is lost.
"""

import threading
import time

import pytest
from programs import BOMBS

from jaxreason.sandbox import bwrap
from jaxreason.tools.python import open_session, unfenced

BACKENDS = [pytest.param("bwrap", marks=pytest.mark.skipif(bool(bwrap.refusal()), reason=bwrap.refusal())), "rlimits"]


@pytest.fixture(params=BACKENDS)
def tool(request):
    made = open_session(request.param, timeout_s=60.0, max_chars=100, memory_mb=1024)
    yield made
    made.close()


def test_names_are_kept(tool):
    assert tool.call("x = 20") == "(no output)"
    assert tool.call("x + 1") == "21"
    assert tool.call("```python\nprint(x)\nx * 2\n```") == "20\n40"


def test_an_error_is_one_line(tool):
    assert tool.call("print('a')\n1 / 0") == "a\nZeroDivisionError: division by zero (line 2)"
    assert tool.call("x =") == "SyntaxError: invalid syntax (line 1)"
    assert tool.call("'{x}'.format()") == "KeyError: 'x' (line 1)"
    assert tool.call("raise ValueError('{timeout_s}')") == "ValueError: {timeout_s} (line 1)"


def test_a_lost_interpreter_starts_anew(tool):
    assert tool.call("x = 1") == "(no output)"
    assert tool.call("import os; os._exit(3)") == "the interpreter ended; the names of this interpreter are lost"
    assert tool.call("x") == "NameError: name 'x' is not defined (line 1)"
    assert tool.call("x = 2\nx") == "2"


def test_an_answer_is_cut(tool):
    said = tool.call("print('a' * 1000 + 'b' * 1000)")
    assert len(said) < 120
    assert said.startswith("aaa")


def test_a_time_out_is_said():
    tool = open_session("rlimits", timeout_s=0.5)
    assert tool.call("while True: pass") == "no answer in 0.5 s; the names of this interpreter are lost"
    tool.close()


def test_close_ends_a_running_call(tool):
    said = []
    thread = threading.Thread(target=lambda: said.append(tool.call("while True: pass")))
    tool.call("1")
    thread.start()
    time.sleep(0.3)
    tool.close()
    thread.join(30)
    assert said == ["the interpreter ended; the names of this interpreter are lost"]


@pytest.mark.process
@pytest.mark.skipif(bool(bwrap.refusal()), reason=bwrap.refusal())
def test_hostile_code_is_answered():
    tool = open_session(timeout_s=2.0, max_chars=200)
    for name in (
        "NUL bytes",
        "lone surrogates",
        "parentheses",
        "a megabyte",
        "removes all builtins",
        "closes everything",
        "list bomb",
        "endless output",
    ):
        assert isinstance(tool.call(BOMBS[name][0]), str)
        assert tool.call("1 + 1") in ("2", "NameError: __build_class__ not found") or name == "removes all builtins"
    tool.close()


def test_only_a_whole_block_is_unfenced():
    assert unfenced("```py\nx\n```") == "x"
    assert unfenced("x\n```") == "x\n```"
    assert unfenced("```") == "```"


def test_impossible_limits_are_one_line():
    with pytest.raises(ValueError, match="tool 'python' got max_chars=0; allowed: 1 or more"):
        open_session("rlimits", max_chars=0)


@pytest.mark.parametrize("backend", BACKENDS)
def test_python_is_a_tool_that_keeps_names_within_a_rollout(backend):
    from jaxreason import tools
    from jaxreason.types import Task

    (tool,) = tools.make_all([{"name": "python", "sandbox": backend, "timeout_s": 60.0, "memory_mb": 1024}])
    one, other = tool.open(Task("q", "a")), tool.open(Task("q", "a"))
    call = lambda session, code: tools.run(tool, session, {"code": code}, lambda thread: None)  # noqa: E731
    assert call(one, "x = 6\nx * 7").text == "42"
    assert call(one, "x + 1").text == "7"
    assert "NameError" in call(other, "x").text
    assert not call(other, "import os; os._exit(3)").failure
    one.close()
    other.close()
