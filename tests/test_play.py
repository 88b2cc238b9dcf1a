"""Talking to a checkpoint: answers as they are sampled, problems of a suite, a
conversation, and mistakes in one line.
"""

import json
import subprocess
import sys

import pytest
from runs import ROOT, load_config, read_lines, run_config

pytestmark = pytest.mark.process


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    summary = run_config(load_config("tiny", "smoke", **{"prior.steps": 2, "rl.steps": 1}), folder)
    (folder / "config.json").write_text(json.dumps(summary["config"] | {"revisions": {}}))
    return folder


def play(lines, *arguments):
    command = [sys.executable, "-m", "jaxreason.play", *map(str, arguments)]
    got = subprocess.run(command, cwd=ROOT, input="\n".join(lines), capture_output=True, text=True, timeout=600)
    return got.returncode, got.stdout, got.stderr


def test_a_conversation(trained):
    lines = ["/temperature 0", "/problem 2", "/problem", "/samples 3", "1+1:"]
    lines += ["/samples 9", "/what", "/problem 999999", "/quit", "2+2:"]
    code, out, err = play(lines, f"--checkpoint={trained}")
    assert (code, "Traceback" in err) == (0, False)
    # Greedy answers to the suite are those of the run's last evaluation.
    greedy = [r for r in read_lines(trained / "rollouts.jsonl") if r.get("suite") == "chain" and r["temperature"] == 0]
    last = {r["problem"]: r for r in greedy}
    for problem in (2, 3):
        shown = out.split(f"chain, problem {problem}: ")[1].split("\n[")[0]
        assert shown == f"{last[problem]['question']}\n{last[problem]['text']}"
    assert f"expected {last[2]['answer']}; {last[2]['length']} tokens" in out
    errors = [line for line in out.splitlines() if line.startswith("error: ")]
    three = next(line for line in out.splitlines() if line.count(" tokens") == 3)  # side by side
    assert "[" not in three
    assert len(errors) == 3
    assert "/samples got '9'" in errors[0]
    assert "unknown command '/what'" in errors[1]
    assert "no problem 999999" in errors[2]
    assert "2+2" not in out  # it came behind /quit


BAD = [
    ([], "no --checkpoint given"),
    (["--checkpoint={run}", "--suite=chian"], "did you mean 'chain'"),
    (["--checkpoint=/no"], "/no"),
    (["--checkpoint={run}", "--temperature=nan"], "--temperature got nan"),
    (["--checkpoint={run}", "--system=be brief"], "whose prompt has no messages"),
    (["--config=configs/tools.py", "--checkpoint={run}"], "got --checkpoint and --config"),
    (["--config=configs/tools.py", "--suite=no_tol"], "did you mean 'no_tool'"),
    (["--config=configs/tools.py", "--config.environment.tools=('calculater',)"], "did you mean 'calculator'"),
]


@pytest.mark.parametrize(("arguments", "said"), BAD)
def test_bad_input_is_one_line(trained, arguments, said):
    code, _, err = play([], *(a.replace("{run}", str(trained)) for a in arguments))
    assert code == 1
    assert said in err.splitlines()[-1]
    assert "Traceback" not in err


def test_a_chat_keeps_the_conversation_until_it_is_told_to_forget():
    """The prompt of the second question has the first one and its answer."""
    from types import SimpleNamespace

    from jaxreason.play.talk import Talk
    from jaxreason.types import Message

    seen = []
    format = SimpleNamespace(conversation=lambda messages: seen.append(list(messages)) or [1])
    talk = Talk(
        None, None, None, SimpleNamespace(format=format, environment=None), temperature=0, samples=1, system="be brief", seed=0
    )
    talk.sample = lambda *_: [SimpleNamespace(verdict=SimpleNamespace(parsed="forty-two"))]
    talk.ask("what?", print)
    talk.ask("why?", print)
    talk.messages.clear()
    talk.ask("who?", print)
    system = Message("system", "be brief")
    assert seen[1] == [system, Message("user", "what?"), Message("assistant", "forty-two"), Message("user", "why?")]
    assert seen[2] == [system, Message("user", "who?")]


def test_a_problem_that_does_not_exist_leaves_the_place_in_the_suite():
    from types import SimpleNamespace

    from jaxreason.play.talk import Talk

    tasks = [(SimpleNamespace(question=f"q{i}"), [i]) for i in range(3)]
    suite = SimpleNamespace(name="s", tasks=tasks, environment=None)
    talk = Talk(None, None, suite, None, temperature=0, samples=1, system="", seed=0)
    talk.sample = lambda task, *_: [task.question]
    assert talk.give(1, print, print) == ["q1"]
    with pytest.raises(ValueError, match="no problem 99"):
        talk.give(99, print, print)
    assert talk.give(None, print, print) == ["q2"]
    with pytest.raises(ValueError, match="no problem 3"):
        talk.give(None, print, print)
    assert talk.problem == 2


def test_lines_of_any_bytes_are_read(monkeypatch):
    import io

    from jaxreason.play.talk import lines

    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"a\xff\nb\n"), encoding="utf-8"))
    assert list(lines("> ")) == ["a\ufffd", "b"]


# ------------------------------------------------------------------------------------------------------- being the model


def test_a_person_plays_the_model_with_a_tool():
    """`told` are the lines behind each turn, from the first problem's prompt on."""
    lines = [
        "[2*3=",
        "[6+1=tail that is not read",
        "A0",
        "/problem 5",
        "A1\\",
        "2",
        "A12",
        "/what",
        "/problem 99999",
        "/quit",
        "A",
    ]
    code, out, err = play(lines, "--config=configs/tools.py")
    assert (code, "Traceback" in err) == (0, False)
    assert "it reads: 6]\nit reads: 7]\nwrong: answered 0, expected " in out
    assert ", tool_calls 2, tool_errors 0\n--- problem 1;" in out
    assert "--- problem 5; the model reads:\n<bos>" in out
    assert "error: the model can't write this: character '\\n' in 'A1\\n2'" in out
    assert "wrong: answered 12, expected" in out
    assert out.count("error: got '/") == 2


def test_a_suite_without_the_tool_answers_no_call():
    code, out, _ = play(["[2*3=6]A1"], "--config=configs/tools.py", "--suite=no_tool")
    assert (code, "it reads" in out) == (0, False)
    assert "wrong: answered 1, expected " in out


def test_a_person_reads_what_a_retry_says():
    retry = "--config.environment={'name': 'retry', 'attempts': 2, 'message': '?'}"
    code, out, _ = play(["A1", "A1"], "--config=configs/tools.py", retry)
    assert code == 0
    assert "it reads: ?\nwrong: answered 1" in out
    assert "tries 2, first_try_correct 0" in out
