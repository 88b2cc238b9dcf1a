"""Options of a config file."""

import pytest

from jaxreason.options import parse, unknown_name_message


def options(arg):
    return parse(arg, choices={"size": ("tiny", "small")}, size="tiny", smoke=False, fast=True, seed=0, lr=1e-3)


def test_defaults():
    for arg in ("", None, " , "):
        assert vars(options(arg)) == {"size": "tiny", "smoke": False, "fast": True, "seed": 0, "lr": 1e-3}


def test_values_take_the_type_of_their_default():
    values = options(" size=small ,smoke,fast=false,seed=7,lr=3")
    assert vars(values) == {"size": "small", "smoke": True, "fast": False, "seed": 7, "lr": 3.0}
    assert isinstance(values.lr, float)
    assert options("smoke=1").smoke is True
    assert options("smoke=0").smoke is False


def test_a_value_may_hold_an_equals_sign():
    assert parse("path=a=b", path="").path == "a=b"


@pytest.mark.parametrize(
    ("arg", "message"),
    [
        ("sise=small", r"unknown config option 'sise' \(did you mean 'size'\?\); one of: fast, lr, seed, size, smoke"),
        ("size=huge", "unknown value of config option size 'huge'; one of: small, tiny"),
        ("seed=1.5", "config option seed got '1.5'; allowed: int"),
        ("seed", "config option seed needs a value"),
        ("smoke=maybe", "config option smoke got 'maybe'; allowed: true, false"),
    ],
)
def test_errors_say_what_is_allowed(arg, message):
    with pytest.raises(ValueError, match=message):
        options(arg)


def test_unknown_names_the_nearest_only_if_one_is_near():
    assert (
        unknown_name_message("objective", "grop", ("dapo", "grpo"))
        == "unknown objective 'grop' (did you mean 'grpo'?); one of: dapo, grpo"
    )
    assert unknown_name_message("objective", "xyz", ("dapo", "grpo")) == "unknown objective 'xyz'; one of: dapo, grpo"
    assert unknown_name_message("task", "x", ()) == "unknown task 'x'; one of: none"
