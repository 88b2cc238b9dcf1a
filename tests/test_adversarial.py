"""Texts that try to crash, to stall or to deceive a verifier: every one gets a verdict
within the limits, and none of the wrong ones is accepted.
"""

import collections
import time

import pytest
from nasty import adversarial

from jaxreason.types import Task, Verdict
from jaxreason.verify import make

TEXTS = adversarial()
ENTRY = {"question": "2 + 3 =", "answer": "5", "metadata": {}}
DATA = {"numbers": (7, 2), "target": 5, "dataset": "chain_sum", "options": {}, "entry": ENTRY}
TASK = Task("?", "5", data=DATA)
DECEIVING = ("zero-width", "look-alike", "no number", "NUL", "lone surrogate", "enumerated")
HERE = ["exact", "number", "countdown", "format", "all_of"]
# Enumerations that end in the key: in running text the last number is the answer.
KNOWN = {"number": {"A4 or 5"}}


def make_one(name):
    more = {"exact": {"marker": "A"}, "all_of": {"of": ({"name": "number"}, {"name": "exact"})}}
    return make(name, **more.get(name, {}))


def test_there_are_enough_of_each_kind():
    kinds = collections.Counter(kind for kind, _ in TEXTS)
    assert len({text for _, text in TEXTS}) >= 250
    assert len(kinds) >= 11
    assert min(kinds.values()) >= 5


def accepted(name, verify) -> list[str]:
    """Judge every text; return those that were accepted and should not be."""
    found = []
    for kind, text in TEXTS:
        started_s = time.process_time()
        verdict = verify(text, TASK)
        assert time.process_time() - started_s < 5, (name, kind, text[:40])  # quadratic or worse; it takes milliseconds
        assert isinstance(verdict, Verdict)
        assert verdict.reason
        assert verdict.parsed is None or len(verdict.parsed) <= 200
        if kind in DECEIVING and verdict.correct:
            found.append(text)
    return found


@pytest.mark.parametrize("name", HERE)
def test_every_text_gets_a_verdict_in_this_process(name):
    assert set(accepted(name, make_one(name))) <= KNOWN.get(name, set())


@pytest.mark.parametrize("name", ["math", "reasoning_gym"])
def test_every_text_gets_a_verdict_from_children(name, monkeypatch):
    """A child is killed after its CPU time, so no text takes longer."""
    verify = make(name, timeout_s=1.0, memory_mb=1024)
    slow = [(kind, text) for kind, text in TEXTS if kind == "power tower" and not text.startswith(r"\boxed")]
    monkeypatch.setattr(f"{__name__}.TEXTS", [pair for pair in TEXTS if pair not in slow])  # each takes its whole limit
    assert not accepted(name, verify)
