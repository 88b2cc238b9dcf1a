"""Notices that a run is to end: Ctrl-C, SIGTERM, and the maintenance event of a Cloud
TPU VM.

The loop asks `stop()` after every step; once it is true on any process, all of them
save and end. What a notice interrupts is never the step itself, unless that takes too
long after a Ctrl-C. A second signal ends the process at once, and so does the first one
before there is anything to save. A thread of its own hears the signals: the main one
may be compiling, or wait for a verifier that never returns.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator

import jax
import numpy as np

from jaxreason.runtime import processes

QUIET = ("NONE", "")  # what the metadata server says when nothing is planned
HOWS = ("", "stopped", "interrupted")  # what `stop()` returns
GRACE_S = 60.0  # that a step may take after a Ctrl-C, and three times as long as the longest one so far


@contextlib.contextmanager
def watch(ending: Callable[[], str] = lambda: "the run ends") -> Iterator[Callable[[], str]]:
    """Listen, in the main thread; yield `stop()`, which all processes must call
    together after each step.

    It returns "" while the run is to go on, then "interrupted" if a Ctrl-C has been
    heard, or "stopped". `ending()` is called when the process is ended at once; what it
    returns is said.
    """
    heard, steps_s = [0], [0.0]  # the index in HOWS; how long steps have taken
    asked_s, timers = [None], []
    alone = jax.process_count() == 1  # else all end together, after a step

    def notice(what: str, how: str) -> None:
        heard[0] = max(heard[0], HOWS.index(how))
        tell(f"{what}: saving after this step, then ending; once more ends at once")

    def on_signal(signum: int) -> None:
        if heard[0] or (alone and asked_s[0] is None):
            end(signum)
        if signum == signal.SIGTERM:
            notice("got SIGTERM", "stopped")
        else:
            notice("got Ctrl-C", "interrupted")
            timers.append(threading.Timer(GRACE_S + 3 * max(steps_s), end, (signum,)))
            timers[0].daemon = True
            timers[0].start()

    def end(signum: int) -> None:
        line = ending()
        if processes.writes():
            tell(line)
        flush = threading.Thread(target=lambda: [file.flush() for file in (sys.stdout, sys.stderr)], daemon=True)
        flush.start()
        flush.join(1.0)  # whoever reads them may have stopped
        os._exit(128 + signum)

    def stop() -> str:
        now_s = time.monotonic()
        steps_s.append(0.0 if asked_s[0] is None else now_s - asked_s[0])
        del steps_s[:-100]
        asked_s[0] = now_s
        return HOWS[processes.all_gather_host(np.array([heard[0]], np.int32)).max()]

    with hearing({signal.SIGTERM: on_signal, signal.SIGINT: on_signal}):
        if processes.on_tpu_vm():
            threading.Thread(target=await_maintenance, args=(lambda what: notice(what, "stopped"),), daemon=True).start()
        yield stop
    for timer in timers:
        timer.cancel()


@contextlib.contextmanager
def hearing(calls: dict[int, Callable[[int], None]]) -> Iterator[None]:
    """Have signals call functions in a thread of their own, whatever the main one is
    busy with.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while number := reader.recv(1):
            if number[0] in calls:
                calls[number[0]](number[0])

    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # written to as a signal comes
    handlers = {signum: signal.signal(signum, lambda *_: None) for signum in calls}  # or else they would end the process
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before)
        writer.close()  # which ends the thread


def tell(line: str) -> None:
    """Write a line to stderr, by itself: the live line and the cursor may be anywhere,
    and locks may be held.
    """
    clear = "\r\x1b[2K\x1b[?25h" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{line}\n".encode())


def await_maintenance(notice: Callable[[str], None], pause_s: float = 10.0) -> None:
    """Ask the metadata server until it tells of maintenance
    (cloud.google.com/compute/docs/metadata: maintenance-event).
    """
    server = os.environ.get("GCE_METADATA_IP", "metadata.google.internal")
    url = f"http://{server}/computeMetadata/v1/instance/maintenance-event"
    while True:
        try:
            request = urllib.request.Request(url, headers={"Metadata-Flavor": "Google"})
            with urllib.request.urlopen(request, timeout=pause_s) as answer:
                event = answer.read().decode().strip()
        except (OSError, urllib.error.URLError):
            event = ""  # no cloud around, or it does not answer now
        if event not in QUIET:
            notice(f"maintenance of this machine is coming ({event})")
            return
        time.sleep(pause_s)
