"""The page of objectives names each of them, and its flags select them."""

from __future__ import annotations

import ast
import re
import shlex
import sys

import pytest
from runs import ROOT

from jaxreason import objectives
from jaxreason.build import build
from jaxreason.options import command

PAGE = (ROOT / "jaxreason" / "objectives" / "README.md").read_text()
NAMED = PAGE.split("## The named algorithms")[1].split("\n## ")[0]
ROWS = {line.split("`")[1]: line for line in NAMED.splitlines() if line.startswith("| `")}


def flags_of(row: str) -> list[str]:
    return [word for cell in re.findall(r"`(--config\.[^`]*)`", row) for word in shlex.split(cell)]


def test_every_objective_has_a_row_of_all_columns():
    assert list(ROWS) == [name for name in ROWS if name in objectives.OBJECTIVES]
    assert set(ROWS) == set(objectives.OBJECTIVES)
    columns = NAMED.split("| name |")[1].splitlines()[0].count("|")
    assert {row.count("|") - 2 for row in ROWS.values()} == {columns}


@pytest.mark.parametrize("name", ROWS)
def test_the_flags_of_a_row_select_its_objective(name):
    # A teacher would be a run; without one, `distil` takes a hint.
    hint = flags_of(ROWS["self_distil"])[1:] if name == "distil" else []
    words = command.split(["main", "--config=configs/tiny.py:smoke", *flags_of(ROWS[name]), *hint])
    config = command.read(words.config, words.changes)
    phase = "prior" if name in ("lm", "sft") else "rl"
    assert config[phase].objective.name == name
    run = build(config)
    made = next(p.objective for p in run.phases if p.name == phase)
    assert made.weigh is objectives.make(name).weigh


@pytest.mark.parametrize("fields", re.findall(r"\{'name': [^}]*\}", " ".join(NAMED.split("ScaleRL")[-1].split())))
def test_combinations_on_the_page_are_objectives(fields):
    assert objectives.make(**ast.literal_eval(fields)).needs_group


def test_the_objective_of_ones_own_on_the_page_is_built(tmp_path, monkeypatch):
    section = PAGE.split("## Your own")[1]
    (tmp_path / "mine.py").write_text(section.split("```python\n")[1].split("```")[0])
    (tmp_path / "tiny.py").write_text((ROOT / "configs/tiny.py").read_text())
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    words = command.split(["main", f"--config={tmp_path / 'tiny.py'}:smoke", *flags_of(section)])
    run = build(command.read(words.config, words.changes | {"rl.objective.kl_coefficient": "0.1"}))
    assert run.phases[1].objective.needs_reference
    sys.modules.pop("mine", None)
