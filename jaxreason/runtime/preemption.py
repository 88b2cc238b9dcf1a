"""Detection of requests to end the run: Ctrl-C, SIGTERM, and the maintenance event of a
Cloud TPU VM.

The loop calls `stop()` after every step. Once any process has a request, all processes
save and end. A request never interrupts the current step, unless the step takes too
long after a Ctrl-C. A second signal ends the process at once; so does the first one if
there is nothing to save yet. A separate thread handles the signals, because the main
thread may be compiling or waiting for a verifier that never returns.
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

from jaxreason.runtime import live, processes

QUIET = ("NONE", "")  # answers of the metadata server when no maintenance is planned
HOWS = ("", "stopped", "interrupted")  # return values of `stop()`
GRACE_S = 60.0  # time for a step to end after a Ctrl-C, in addition to three times the longest recent step


@contextlib.contextmanager
def watch(ending: Callable[[], str] = lambda: "the run ends") -> Iterator[Callable[[], str]]:
    """Listen for requests to end. Use it in the main thread. It yields `stop()`, which
    all processes must call together after each step.

    `stop()` returns "" while the run should continue, "interrupted" after a Ctrl-C, and
    "stopped" after any other request. If the process is ended at once, `ending()` is
    called and its result is printed.
    """
    heard, steps_s = [0], [0.0]  # index in HOWS; durations of steps
    asked_s, timers = [None], []
    alone = jax.process_count() == 1  # several processes end together, after a step

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
        flush = threading.Thread(target=lambda: [file.flush() for file in (sys.stdout, sys.stderr)], daemon=True)
        flush.start()
        flush.join(1.0)  # a stalled reader of these must not block the end
        if processes.writes():
            tell(line)  # last, so that the live table is not drawn again
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
    """Call functions on signals in a separate thread, even while the main thread is
    busy.
    """
    reader, writer = socket.socketpair()
    writer.setblocking(False)

    def listen() -> None:
        while number := reader.recv(1):
            if number[0] in calls:
                calls[number[0]](number[0])

    threading.Thread(target=listen, daemon=True).start()
    before = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)  # Python writes each signal's number to it
    handlers = {signum: signal.signal(signum, lambda *_: None) for signum in calls}  # the default handlers would end the process
    try:
        yield
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)
        signal.set_wakeup_fd(before)
        writer.close()  # ends the thread


def tell(line: str) -> None:
    """Write a line directly to stderr, over the live table. Locks may be held, so
    `print` is not safe here.
    """
    clear = f"\r{live.ERASE}" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{line}\n".encode())


def await_maintenance(notice: Callable[[str], None], pause_s: float = 10.0) -> None:
    """Poll the metadata server until it announces maintenance
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
            event = ""  # not in the cloud, or no answer at the moment
        if event not in QUIET:
            notice(f"maintenance of this machine is coming ({event})")
            return
        time.sleep(pause_s)
