"""Notices that this machine is about to be taken away: SIGTERM, and the maintenance event of a Cloud TPU VM.

The loop asks `stop()` after every step; once it is true on any process, all of them save and end. What a notice interrupts is
never the step itself. A second SIGTERM ends the process at once.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable

import numpy as np

from jaxreason import processes

QUIET = ("NONE", "")  # what the metadata server says when nothing is planned
ENDED_BY_SIGTERM = 128 + signal.SIGTERM


def watch() -> Callable[[], bool]:
    """Begin to listen, in the main thread; return `stop()`, which all processes must call together."""
    noticed = threading.Event()

    def notice(what: str) -> None:
        noticed.set()
        print(f"{what}: saving after this step, then ending; SIGTERM again ends at once", file=sys.stderr, flush=True)

    def on_sigterm(signum, frame):
        if noticed.is_set():
            os._exit(ENDED_BY_SIGTERM)
        notice("got SIGTERM")

    signal.signal(signal.SIGTERM, on_sigterm)
    if processes.on_tpu_vm():
        threading.Thread(target=await_maintenance, args=(notice,), daemon=True).start()
    return lambda: bool(processes.exchange(np.array([noticed.is_set()], np.int32)).any())


def await_maintenance(notice: Callable[[str], None], pause_s: float = 10.0) -> None:
    """Ask the metadata server until it tells of maintenance (cloud.google.com/compute/docs/metadata: maintenance-event)."""
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
