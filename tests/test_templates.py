"""Chat templates of many makers: turns that reasoning models open, dates, arguments,
and templates that never end.
"""

import datetime
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
from ml_collections import ConfigDict, config_dict

from jaxreason import build as builder
from jaxreason import main, text
from jaxreason.build import make_text, start
from jaxreason.runtime import workdir
from jaxreason.text.chat import chat
from jaxreason.text.template import clock, render
from jaxreason.types import Message, Task

GOLDEN = Path(__file__).parent / "golden"
CHAT = GOLDEN / "chat"
TASK = Task("What is 3 + 4?", "7", solution="3 + 4 = 7.\n#### 7")

# As the distilled models of R1 have it: reasoning is opened in the prompt, and no turn
# is rendered with any.
R1 = """{% for m in messages %}{% if m['role'] == 'user' %}<|start|>user
{{ m['content'] }}{% else %}<|start|>assistant
{{ m['content'].split('</think>')[-1] }}<|end|>{% endif %}{% endfor %}{% if add_generation_prompt %}<|start|>assistant
<think>
{% endif %}"""
THINKING = """{% for m in messages %}<|start|>{{ m.role }}
{{ m.content }}<|end|>
{% endfor %}{% if add_generation_prompt %}<|start|>assistant
{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"""
DATED = "{% for m in messages %}{{ strftime_now('%d %b %Y %H:%M') }} {{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def bpe():
    return text.load(CHAT)


@pytest.fixture
def folder(tmp_path):
    """Make a checkpoint with a chat template to replace."""
    made = tmp_path / "checkpoint"
    shutil.copytree(CHAT, made)
    shutil.copy(GOLDEN / "qwen2" / "config.json", made)
    return made


def with_template(folder, source, **section):
    (folder / "chat_template.jinja").write_text(source)
    return make_text(folder=folder, tokenizer="pretrained", format="chat", **section)


# ----------------------------------------------------------------------------------------------------------- reasoning


def test_a_template_that_opens_reasoning_has_prompts_but_no_demonstrations(folder):
    tokenizer, form = with_template(folder, R1)
    assert tokenizer.decode(form.prompt(TASK)) == "<|start|>user\nWhat is 3 + 4?<|start|>assistant\n<think>\n"
    with pytest.raises(ValueError, match=r"chat_template.jinja: the chat template renders what stands before message 1 diff"):
        form.demonstration(TASK)


def test_demonstrations_of_such_a_template_are_refused_when_the_run_is_built(folder, monkeypatch):
    tokenizer, form = with_template(folder, R1)
    monkeypatch.setattr(builder.tasks, "load_tasks", lambda section, **defaults: [TASK])
    parts = SimpleNamespace(format=form, tokenizer=tokenizer, seed=0, held_out=(), loaded=[], say=print)
    with pytest.raises(ValueError, match=r"chat_template.jinja: .*renders what stands before message 1"):
        builder.demonstrations(parts=parts, objective=None, microbatches=1, steps=1, task={"name": "x"}, rows=1, max_tokens=64)


def test_a_template_that_never_ends_a_turn_is_refused_all_the_same(bpe):
    with pytest.raises(ValueError, match=r"none of the tokenizer's eos tokens \(<\|end\|>, <\|pad\|>\)"):
        chat(bpe, R1.replace("<|end|>", ""))


def test_a_demonstration_is_what_the_template_writes(bpe):
    """It includes what the template adds around a solution (Qwen3 an empty thought,
    Llama 2 spaces) and lacks what it strips.
    """
    around = (
        "{% for m in messages %}{% if m.role == 'user' %}{{ m.content }}: {% else %}[{{ m.content.strip() }} ]<|end|>\n"
        "{% endif %}{% endfor %}"
    )
    ids, trainable = chat(bpe, around).demonstration(Task("two", "4", solution=" is four \n"))
    assert bpe.decode(ids) == "two: [is four ]<|end|>"
    assert bpe.decode([i for i, t in zip(ids, trainable, strict=True) if t]) == "[is four ]<|end|>"


def test_forced_spans_of_a_demonstration_are_not_trained_on(bpe):
    task = Task("two", "4", solution="is <|end|><|end|>four", data={"forced": [(3, 10)]})
    ids, trainable = chat(bpe, THINKING).demonstration(task)
    assert bpe.decode(ids) == "<|start|>user\ntwo<|end|>\n<|start|>assistant\nis <|end|><|end|>four<|end|>"
    assert ids.count(bpe.eos_ids[0]) == 2
    assert bpe.decode([i for i, t in zip(ids, trainable, strict=True) if t]) == "is <|end|>four<|end|>"
    with pytest.raises(ValueError, match="forced span"):
        chat(bpe, THINKING).demonstration(Task("two", "4", solution="four", data={"forced": [(3, 10)]}))


def test_a_template_that_leaves_out_a_message_is_refused(bpe):
    """A template for pictures iterates over the characters of a text as if they were
    parts, and writes none.
    """
    parts = "{% for m in messages %}{% for part in m.content %}{{ part.text }}{% endfor %}<|end|>{% endfor %}"
    with pytest.raises(ValueError, match="leaves out the user's message, or changes it"):
        chat(bpe, parts)
    silent = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|end|>{% endfor %}"
    chat(bpe, silent)
    with pytest.raises(ValueError, match="leaves out the system's message"):
        chat(bpe, silent, system="Be brief.")
    with pytest.raises(ValueError, match="leaves out what the assistant wrote"):
        chat(bpe, "{% for m in messages if m.role == 'user' %}{{ m.content }}<|end|>{% endfor %}")


# ----------------------------------------------------------------------------------------------------------- arguments


def test_tools_and_documents_are_none_as_in_transformers():
    """Templates ask `tools is not none`, which an undefined value satisfies."""
    source = "{% if tools is not none %}tools{% endif %}{% if documents is not none %}documents{% endif %}{{ x is defined }}"
    assert render(source, [], False) == "False"
    assert render(source, [], False, tools=[1]) == "toolsFalse"


def test_a_config_passes_arguments_to_a_template(folder):
    prompts = [with_template(folder, THINKING, template=t)[1].prompt(TASK) for t in (None, {"enable_thinking": False})]
    tokenizer = text.load(folder)
    assert [tokenizer.decode(ids).rpartition("\n")[2] for ids in prompts] == ["", "<think></think>"]
    with pytest.raises(ValueError, match=r"jinja: unknown argument .*'enable_thinkin' \(did you mean 'enable_thinking'\?\)"):
        with_template(folder, THINKING, template={"enable_thinkin": False})
    with pytest.raises(ValueError, match="unknown argument of the chat template 'messages'"):
        with_template(folder, THINKING, template={"messages": []})


def test_a_plain_format_takes_an_instruction_and_says_what_it_does_not_read():
    given = {"folder": None, "alphabet": "Q:1+ A"}
    tokenizer, form = make_text(**given, instruction="Q: {question} A:")
    assert tokenizer.decode(form.prompt(Task("1+1", "2"))) == "<bos>Q: 1+1 A:"
    with pytest.raises(ValueError, match=r"must contain \{question\}"):
        make_text(**given, instruction="Q")
    for section in ({"system": "A"}, {"template": {"x": 1}}):
        with pytest.raises(ValueError, match=rf"'plain', which reads no text.{next(iter(section))}"):
            make_text(**given, **section)


# ---------------------------------------------------------------------------------------------------------------- date


def test_a_prompt_does_not_depend_on_the_day(folder, monkeypatch):
    def prompt(**section):
        tokenizer, form = with_template(folder, DATED, **section)
        return tokenizer.decode(form.prompt(TASK))

    assert prompt(date="2024-02-29") == "29 Feb 2024 00:00 What is 3 + 4?<|end|>"
    _, form = with_template(folder, DATED)  # begins today
    before = form.prompt(TASK)

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.datetime(2100, 1, 1, 12)

    monkeypatch.setattr(datetime, "datetime", Tomorrow)
    assert form.prompt(TASK) == before
    with pytest.raises(ValueError, match=r"text.date got '29 Feb'; allowed: YYYY-MM-DD"):
        prompt(date="29 Feb")


def chat_config(**fields):
    return ConfigDict({"text": {"format": "chat", **fields}})


def test_the_date_of_a_run_is_that_of_its_beginning(tmp_path):
    """A resume after midnight continues the same run: its config records the date."""
    asked = chat_config(date=config_dict.placeholder(str))
    day = workdir.begun(tmp_path, "2026-11-27")
    (tmp_path / "config.json").write_text(main.config_text(start.dated(asked, day)))
    again = main.config_text(start.dated(asked, workdir.begun(tmp_path, "2026-11-28")))
    assert json.loads(again)["text"]["date"] == "2026-11-27"
    workdir.check(tmp_path, again, resume="auto", accept_config_change=False, say=pytest.fail)
    assert asked.text.date is None  # the text that names the folder does not change with the day
    # A date that the config names stays, and so does a run that began without one.
    assert start.dated(chat_config(date="2020-01-01"), day).text.date == "2020-01-01"
    (tmp_path / "config.json").write_text(main.config_text(chat_config()))
    assert start.dated(chat_config(), workdir.begun(tmp_path, "2026-11-28")).text.date is None
    plain = ConfigDict({"text": {"format": "plain"}})
    assert start.dated(plain, day) is plain


def test_nothing_in_a_template_is_drawn_at_random():
    for source in ("{{ [1, 2] | random }}", "{{ lipsum() }}"):
        with pytest.raises(ValueError, match="the chat template failed"):
            render(source, [], False)
    assert clock(datetime.date(2026, 1, 2))("%H:%M %j") == "00:00 002"


# -------------------------------------------------------------------------------------------------------------- errors

BAD = [
    ("{% if %}", r"\(line 1\): Expected an expression"),
    ("{{ 1 // 0 }}", "by zero"),
    ("{{ 1 / 0 }}", "division by zero"),
    ("{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}", "recursion"),
    ("{% continue %}", "'continue' not properly in loop"),
    ("{% break %}", "'break' outside loop"),
    ("{% for i in range(10**10) %}x{% endfor %}", "Range too big"),
    ("{{ messages + 1 }}", "can only concatenate list"),
    ("{{ messages[0].content.foo.bar }}", "has no attribute 'foo'"),
    ("{{ nothing() }}", "'nothing' is undefined"),
    ("{{ messages[9].content }}", "has no element 9"),
    ("{% for k, v in [1] %}{% endfor %}", "cannot unpack"),
    ("{% include 'x' %}", "no loader"),
    ("{{ strftime_now(3) }}", "must be str"),
    ("{{ '%d' % 'x' }}", "number is required"),
    ("{{ {}['a']['b'] }}", "has no attribute"),
    ("{{ " + "(" * 5000 + ")" * 5000 + " }}", "recursion|nested"),
    ("{{ raise_exception('a\nb') }}", "a b"),
]
ENDLESS = [
    "{% for i in range(9999) %}{% for j in range(9999) %}{% endfor %}{% endfor %}",
    "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "{% for i in [1, 2] recursive %}{% if loop.depth < 60 %}{{ loop([1, 2]) }}{% endif %}{% endfor %}",
    "{% set ns = namespace(x='a') %}{% for i in range(99) %}{% set ns.x = ns.x ~ ns.x %}{% endfor %}",
    "{% for i in range(9999) %}{% set x = ('a' * 3999999) | list %}{% endfor %}",
    "{% for i in range(9999) %}{{ 'a' * 99999 }}{% endfor %}",
    "{{ 'a' * 10**10 }}",
    "{{ ['a'] * 10**8 }}",
    "{{ 10 ** (10 ** 10) }}",
    "{{ '%9999999999d' % 1 }}",
    "{{ '%9999999999d' | format(1) }}",
    "{{ '{:9999999999}'.format(1) }}",
    "{{ 'x'.ljust(10**10) }}",
    "{{ 'x' | center(10**10) }}",
]


@pytest.mark.parametrize(("source", "message"), BAD)
def test_an_error_in_a_template_is_a_line_that_names_its_file_when_the_run_is_built(folder, source, message):
    with pytest.raises(ValueError, match=message) as error:
        with_template(folder, "{{ messages[0].content }}" + source)
    said = str(error.value)
    assert said.startswith(f"{folder / 'chat_template.jinja'}: the chat template failed")
    assert "\n" not in said
    assert len(said) < 600


@pytest.mark.parametrize("source", ENDLESS)
def test_a_template_that_does_not_end_is_ended(source):
    """Steps and sizes limit it, not a clock, so a busy machine ends no ordinary
    template.
    """
    with pytest.raises(ValueError, match=r"takes more than|makes a|writes more than|pads a text"):
        render(source, [], False)


def test_the_budget_does_not_change_ordinary_templates():
    """Long conversations, long texts and all features of a loop render as without a
    budget.
    """
    source = (
        "{% for m in messages %}{% set c = m.content ~ '!' %}{{ loop.index }}/{{ loop.length }}{{ '' if loop.last else ',' }}"
        "{{ loop.previtem.role if not loop.first }}{{ c | trim | length }}{% endfor %}"
        "{% for k, v in {'a': 1}.items() %}{{ k }}={{ v }}{% endfor %}"
        "{% for m in messages | selectattr('role', 'equalto', 'x') %}"
        "{{ loop.last }}{% else %}none{% endfor %}{{ '%s-%03d' % ('a', 7) }}{{ '{:>3}'.format(1) }}{{ 2 ** 10 * 3 }}"
    )
    messages = [Message("user", "x" * 100_000)] * 90
    said = render(source, messages, False)
    assert said.startswith("1/90,1000012/90,user1000013/90")
    assert said.endswith("90/90user100001a=1nonea-007  13072")


@pytest.mark.parametrize(
    ("entry", "message"),
    [(3, "chat_template got 3"), ({"a": 1}, "chat_template got {'a': 1}"), ([3], r"chat_template got 0"), (True, "got True")],
)
def test_a_template_that_is_no_text_is_named(folder, entry, message):
    (folder / "chat_template.jinja").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": entry}))
    with pytest.raises(ValueError, match=message) as error:
        text.load_template(folder)
    assert str(folder / "tokenizer_config.json") in str(error.value)


def test_a_template_of_another_encoding_is_named(folder):
    (folder / "chat_template.jinja").write_bytes(b"{{ '\xe9' }}")
    with pytest.raises(ValueError, match=r"chat_template.jinja is not UTF-8"):
        text.load_template(folder)


# ----------------------------------------------------------------------------------------------------------------- eos


def eos(folder, *more):
    return make_text(folder=folder, tokenizer="pretrained", eos=more)[0].eos_ids


def test_the_list_of_config_json_counts_where_no_generation_config_does(folder):
    (folder / "generation_config.json").unlink()
    there = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(there | {"eos_token_id": [2, 1]}))
    assert eos(folder) == (2, 1)  # eos_token of tokenizer_config.json first
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    assert eos(folder) == (2, 1)
    (folder / "generation_config.json").write_text('{"eos_token_id": 0}')
    assert eos(folder) == (2, 0)


def test_a_config_adds_ends(folder):
    assert eos(folder, "<|start|>", 5, " plus", 2) == (2, 0, 1, 5, text.load(folder).encode(" plus")[0])
    assert make_text(folder=None, alphabet="ab\n", eos=("\n",))[0].eos_ids == (2, 5)
    for wrong, message in [
        ("<|nope|>", r"text.eos got '<\|nope\|>', which is no token of the tokenizer; its own: .*<\|end\|>"),
        ("two plus", "'two plus', which is no token"),
        ("", "text.eos got ''"),
        (-1, "text.eos got -1; allowed: ids of the tokenizer's tokens, below 298"),
        (99999999, "text.eos got 99999999"),
        (True, "text.eos got True"),
        (1.0, "text.eos got 1.0"),
    ]:
        with pytest.raises(ValueError, match=message):
            eos(folder, wrong)
    with pytest.raises(ValueError, match=r"text.eos got 'ab'; allowed: a tuple"):
        make_text(folder=None, eos="ab")
    with pytest.raises(ValueError, match=r"text.eos got 'é', which is no token"):
        make_text(folder=None, eos=("é",))


@pytest.mark.parametrize("name", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("value", [-1, 99999999, "2", [2, "<|end|>"], True, 2.0, [[2]], {"a": 2}])
def test_ends_that_are_no_tokens_are_named(folder, name, value):
    (folder / "generation_config.json").unlink()
    (folder / name).write_text(json.dumps({"eos_token_id": value}))
    with pytest.raises(ValueError, match=rf"{name}: eos_token_id got .*; allowed: ids of tokenizer.json's tokens, 0 to 297"):
        eos(folder)


@pytest.mark.parametrize("name", ["special_tokens_map.json", "tokenizer_config.json"])
def test_tokens_that_the_tokenizer_does_not_have_are_named(folder, name):
    (folder / name).write_text(json.dumps({"eos_token": "\ud800"}))
    with pytest.raises(ValueError, match=rf"{name}: eos_token got"):
        eos(folder)
    for value in ("<|other|>", {"content": "<|other|>"}):
        for key in ("eos_token", "bos_token"):
            (folder / "tokenizer_config.json").unlink(missing_ok=True)
            (folder / name).write_text(json.dumps({key: value}))
            with pytest.raises(ValueError, match=rf"{name}: {key} got '<\|other\|>', which is no token of tokenizer.json"):
                eos(folder)
    (folder / name).write_text(json.dumps({"eos_token": 2}))
    with pytest.raises(ValueError, match="eos_token got 2; allowed: the text of a token"):
        eos(folder)
    (folder / name).write_text(json.dumps({"eos_token": "<|end|>", "pad_token": "[PAD]"}))
    assert text.load(folder).pad_id == 2  # a pad token that does not exist is ignored
