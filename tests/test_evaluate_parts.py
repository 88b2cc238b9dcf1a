"""The pieces of the command that evaluates: identity, the user's own code, suites on the
command line, statistics. The command itself is in test_evaluate.py.
"""

import itertools
from types import SimpleNamespace

import numpy as np
import pytest
from runs import ROOT

from jaxreason import estimators
from jaxreason.build.checkpoint import fingerprint
from jaxreason.build.suites import SUITES, read_suites
from jaxreason.evaluate import identity, series
from jaxreason.evaluate.own_code import digest_sources, own_names
from jaxreason.evaluate.table import print_results
from jaxreason.evaluation import Outcome, Suite, curves, measure, outcome, outcome_of
from jaxreason.options import split_outside
from jaxreason.recovery import Recovery
from jaxreason.rollout import Completer
from jaxreason.types import Rollout, Task, Verdict


def test_sources_of_a_users_code(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    package = tmp_path / "their_rewards"
    (package / "parts").mkdir(parents=True)
    (tmp_path / "their_table.py").write_text("A = 1\n")
    (package / "__init__.py").write_text("from . import parts\n")
    (package / "judge.py").write_text(
        "import numpy as np, json, os.path, nowhere_at_all\nfrom .parts.words import A\nfrom jaxreason.types import Task\n"
        "def maker():\n    import their_table, their_rewards.judge\n"
    )
    (package / "parts" / "__init__.py").write_text("")
    (package / "parts" / "words.py").write_text("A = (\n")  # whoever imports it gets the error
    names = {"their_rewards", "their_rewards.judge", "their_rewards.parts", "their_rewards.parts.words", "their_table"}
    found = digest_sources(["their_rewards.judge:maker"])
    assert found.keys() == names
    (package / "parts" / "words.py").write_text("A = 2\n")
    again = digest_sources(["their_rewards.judge:maker"])
    assert {name for name in names if found[name] != again[name]} == {"their_rewards.parts.words"}
    assert digest_sources(["nowhere.at:all", ":f", "..x:f", "json:loads"]).keys() == {
        name for name in digest_sources(["json:loads"]) if name.partition(".")[0] == "json"
    }
    suites = [{"name": "their:tasks"}, {"name": "chain", "verifier": {"name": "exact"}}, {"name": "chain", "verifier": "wrong"}]
    assert own_names(suites, {"name": "my:default"}) == {"their:tasks", "my:default"}
    assert own_names(suites[1:], {"name": "my:default"}) == set()
    inside = {"name": "retry", "inside": {"name": "with_tools", "tools": ("calculator", "my:tool", {"name": "my:other"})}}
    assert own_names([{"environment": inside, "instruction": "Q: {question}"}], {"name": "number"}) == {"my:tool", "my:other"}
    assert own_names([{"name": "chain"}], {"name": "number"}, {"name": "openenv", "maker": "my:env"}) == {"my:env"}


def test_other_versions_are_said_and_recorded():
    first = {"versions": {"jax": "1", "numpy": "1"}, "revision": "a", "device": "cpu"}
    now = first | {"versions": {"jax": "2", "numpy": "1"}, "code": "c"}  # an earlier version did not record `code`
    said = []
    assert identity.also_made_with(first | {"done": False}, first | {"code": "c"}, said.append) == first
    assert not said
    made = identity.also_made_with(first | {"done": False}, now, said.append)
    assert made == first | {"continued_with": [now]}
    assert said == ["warning: earlier attempts were made with other versions (versions.jax: 1 there, 2 here); both are recorded"]
    # The third process is compared with the second.
    assert identity.also_made_with(made, now, said.append) == made
    assert len(said) == 1
    assert identity.also_made_with(made, first | {"code": "c"}, said.append)["continued_with"] == [now, first | {"code": "c"}]


def test_a_continuation_keeps_the_date_of_the_first_day():
    """The date in a chat template does not change the default folder."""
    settings = {"text": {"format": "chat", "date": "2026-01-01"}, "n": 3, "recovery": 5}
    about = {"settings": settings, "seed": 0}
    later = {"settings": settings | {"text": {"format": "chat", "date": "2026-01-02"}, "recovery": 0}, "seed": 0}
    opened = SimpleNamespace(folder=ROOT, step=None)
    assert identity.default_folder(opened, about) == identity.default_folder(opened, later)
    other = {"settings": settings | {"text": {"format": "plain"}}, "seed": 0}
    assert identity.default_folder(opened, about) != identity.default_folder(opened, other)


def test_recovery_keeps_the_limit_of_a_suite(monkeypatch):
    limits = []

    def recovery(completer, *_, **options):
        limits.append((completer.max_tokens, options["most"]))
        return Recovery(0, 0, 0, 0, 0, 0)

    monkeypatch.setattr(series, "recovery", recovery)
    completer = Completer(None, None, None, eos_ids=(), prompt_buckets=(8,), rows=1, max_tokens=32)
    opened = SimpleNamespace(parts=SimpleNamespace(completer=completer, tokenizer=SimpleNamespace(encode=list)))
    of = series.Evaluated(opened, {"filter": {"top_k": 0, "top_p": 1.0, "min_p": 0.0}}, None, 0, print)
    for most, limit in ((5, 5), (None, 32)):
        suite = Suite("s", [], None, max_tokens=most)
        assert series.recover(of, series.Series(suite, 0.0, None), [], 3, None)["most"] == 3
        assert limits.pop() == (limit, 3)


def test_a_pretrained_model_with_another_shape_or_tokenizer_is_another(tmp_path):
    checkpoint = SimpleNamespace(folder=tmp_path, step=None)
    seen = set()
    for name in ("model.safetensors", "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        for text in ("{}", "[]"):
            (tmp_path / name).write_text(text)
            seen.add(fingerprint(checkpoint))
    assert len(seen) == 10
    (tmp_path / "README.md").write_text("words")
    assert fingerprint(checkpoint) in seen


# --- suites ---


def test_suites_are_read_from_a_line():
    own = {"chain": {"name": "chain", "ops": 3}}
    assert read_suites("chain, gsm8k", own) == {"chain": own["chain"], "gsm8k": SUITES["gsm8k"]}
    file = read_suites("svamp=my.jsonl", {})
    assert file["svamp"]["path"] == "my.jsonl"
    assert file["svamp"]["question"] == "Body+Question"
    assert file["svamp"]["split"] is None  # the whole file
    assert file["svamp"]["verifier"] == SUITES["svamp"]["verifier"]
    made = read_suites("a={'name': 'jsonl', 'path': 'x,y.jsonl'},chain", {})
    assert made["a"] == {"name": "jsonl", "path": "x,y.jsonl", "split": None}
    for wrong in ("", "chain,chain", "a={1: 2}", "a={'path': 'x'}"):
        with pytest.raises(ValueError):
            read_suites(wrong, {})
    # A quote without a partner would take what follows with it.
    for wrong in ("a={", "a=it's.jsonl,chain", "a={'name': 'chain',chain", "a=x.jsonl),chain", "a={'name': 'chain]'}}"):
        with pytest.raises(ValueError, match=r"--suites has .* with a quote or bracket that has no partner"):
            read_suites(wrong, {})
    assert read_suites(r"a={'name': 'chain', 'instruction': 'Don\'t, {question}'},chain", {}).keys() == {"a", "chain"}
    assert split_outside("a={'x': (1, 2)}, b,'c,d'", ",") == ["a={'x': (1, 2)}", "b", "'c,d'"]


def test_every_named_suite_is_a_section_of_a_config():
    from jaxreason.build import SECTIONS
    from jaxreason.build.layout import section_of_suite
    from jaxreason.options import fields

    assert SECTIONS
    for name, section in SUITES.items():
        assert not fields.unknown_fields(section_of_suite(section), section), name
        fields.check(section_of_suite(section), section, name)


# --- statistics ---


def test_forced_tokens_do_not_count_in_the_likelihood():
    """A budget's forced end has log-probs of 0: counted, it would win every vote."""
    record = {"correct": True, "parsed": None, "reason": "", "stop": "eos", "length": 8, "logp_sum": -4.0}
    assert outcome_of(record | {"sampled": 4}).logp == -1.0
    assert outcome_of(record).logp == -0.5  # of an earlier version
    assert outcome_of(record | {"sampled": 0, "logp_sum": 0.0}).logp == 0.0
    made = Rollout(
        Task("q", "a"),
        0,
        0,
        np.ones(1),
        np.ones(3),
        np.array([-2, 0, 0]),
        np.array([True, False, False]),
        "",
        "eos",
        Verdict(1, True),
    )
    assert outcome(made).logp == -2.0


def test_curves_are_means_over_all_subsets():
    rng = np.random.default_rng(0)

    def draw():
        return Outcome(bool(rng.random() < 0.5), str(rng.integers(3)), "", "eos", 5, float(rng.normal()))

    outcomes = [[draw() for _ in range(4)] for _ in range(3)]
    found = curves(outcomes)
    for k in range(1, 5):
        any_right = [[any(o[i].correct for i in s) for s in itertools.combinations(range(4), k)] for o in outcomes]
        assert found["pass"][k] == pytest.approx(np.mean(any_right))
        votes = [estimators.majority_at_k([x.parsed for x in o], [x.correct for x in o], k) for o in outcomes]
        assert found["majority"][k] == pytest.approx(np.mean(votes))
    found = measure(outcomes)
    assert found["pass@4"] == pytest.approx(np.mean([any(x.correct for x in o) for o in outcomes]))
    assert found["pass^4"] == pytest.approx(np.mean([all(x.correct for x in o) for o in outcomes]))


@pytest.mark.parametrize(("accuracy", "said"), [(0.0, False), (0.5, True), (1.0, False)])
def test_accuracies_without_a_variance_have_no_shares_of_it(capsys, accuracy, said):
    measures = dict.fromkeys(("pass@2", "pass^2", "majority@2", "best_logp@2", "cut_off", "answered", "sampling_share"), accuracy)
    measures |= dict.fromkeys(("length", "length_p90", "verifier_errors", "verifier_timeouts", "bad_keys"), 0.0)
    one = {"suite": "s", "temperature": 1.0, "thinking_tokens": None, "samples": 2, "n": 4, "measures": measures}
    print_results({"evaluations": [one | {"accuracy": accuracy, "low": 0.0, "high": 1.0}]})
    shown = capsys.readouterr().out
    assert f"2 samples each: pass@2 {accuracy:.3f}" in shown
    assert ("of the variance of the accuracy is from sampling" in shown) == said
