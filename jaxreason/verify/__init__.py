"""Verifiers by name: `verify(answer_text, task) -> Verdict`, with a reward of 1.0 for a
right answer and 0.0 for any other.

Total in the text: whatever a model wrote, a verdict comes back in bounded time, with
one of a few words as its `reason`. What can hang (computer algebra, patterns) runs in
killable child processes: see `pool`. A task that lacks what its verifier needs is our
own mistake, and raises. One whose key no answer could equal has the reason "bad key",
whatever the text: the key is looked at first. To add a verifier, write a file with one
maker and name it here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from jaxreason.options import call_with_section, find
from jaxreason.types import Task, Verdict
from jaxreason.verify import countdown, exact, expression, form, number
from jaxreason.verify.exact import BAD_KEY

VERIFIERS = {
    "exact": exact.exact,
    "number": number.number,
    "countdown": countdown.countdown,
    "math": expression.math,
    "format": form.format,
}

BOUNDED = ("math", "format")  # they keep to a limit of their own, and wait for children that are busy


def make(
    name: str,  # one of the verifiers, or module:maker of your own
    **kwargs,
) -> Callable[[str, Task], Verdict]:
    """Make the verifier of that name, or of a user's `module:maker`; the keywords are
    those of its maker.

    Raises:
      ValueError: an unknown name or keyword, or a missing optional dependency.
    """
    made = call_with_section(find("verifier", name, VERIFIERS), kwargs, f"verifier {name!r}")
    if not callable(made):
        raise ValueError(f"verifier {name!r} made a {type(made).__name__}; allowed: a function verify(text, task) -> Verdict")
    return made


def bad_keys(verify: Callable[[str, Task], Verdict], tasks: Sequence[Task]) -> list[Task]:
    """Return the tasks of `tasks` whose keys a verifier of this package can't judge."""
    return [task for task in tasks if verify("", task).reason == BAD_KEY]
