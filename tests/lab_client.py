"""A client of the lab: `python tests/lab_client.py [FOLDER]` starts the server as an MCP
host does, runs a 2 x 2 sweep of the smallest config within a budget, asks for one
beyond it, and prints the exchange.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
# Less than the config's own `smoke`: no checkpoint before the end, and few programs.
SMALL = {
    "model.layers": 1,
    "model.width": 16,
    "model.feed_forward": 16,
    "phases": ["rl"],
    "sampler.slots": 4,
    "sampler.max_tokens": 16,
    "rl.steps": 2,
    "rl.microbatches": 1,
    "rl.optimizer.warmup_steps": 1,
    "rl.source.problems": 2,
    "rl.source.group": 2,
    "rl.source.max_tokens": 16,
    "rl.source.task.size": 64,
    "evaluate.temperatures": [1.0],
    "evaluate.n": 4,
    "evaluate.final_n": 4,
    "log.tracker": "none",
    "log.report": False,
}
GRID = {"rl.optimizer.lr": [0.001, 0.0001], "rl.objective.name": ["rloo", "grpo"]}
ASKED = {"config": "tiny", "options": {"smoke": True}, "fields": SMALL, "grid": GRID, "seeds": 1}
KEPT = ("JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR", "XLA_FLAGS", "XDG_CACHE_HOME", "PYTHONPATH")


class Refused(Exception):
    """A tool refused a call, with this line."""


@contextlib.asynccontextmanager
async def connected(folder: Path, budget: str, errors: Path | None = None) -> AsyncIterator[Callable[..., Any]]:
    """Start a server as a host does, and yield `await call(tool, **arguments)`.

    What the server prints on stderr goes to the file `errors`.
    """
    from mcp import Client, Implementation, StdioServerParameters, stdio_client

    environment = {name: os.environ[name] for name in KEPT if name in os.environ}
    environment["XLA_FLAGS"] = environment.get("XLA_FLAGS", "").replace("device_count=8", "device_count=1")  # of conftest.py
    environment |= {"PYTHONPATH": os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])}
    words = ["-m", "jaxreason.lab", f"--budget={budget}", f"--folder={folder}"]
    server = StdioServerParameters(command=sys.executable, args=words, env=environment)
    with open(errors or os.devnull, "a") as log:
        who = Implementation(name="lab_client", version="1")
        async with Client(stdio_client(server, errlog=log), client_info=who) as client:

            async def call(tool: str, **arguments: Any) -> dict:
                result = await client.call_tool(tool, arguments)
                if result.is_error:
                    raise Refused(result.content[0].text)
                return result.structured_content

            call.client = client
            yield call


async def ended(call: Callable[..., Any], sweep: str, limit_s: float = 1200.0) -> dict:
    """Wait until a sweep has ended; return its last status."""
    end_s = time.monotonic() + limit_s
    while (found := await call("status", sweep=sweep))["status"] == "running":
        assert time.monotonic() < end_s, found
        await asyncio.sleep(1.0)
    return found


async def converse(folder: Path, say: Callable[[str], None] = print) -> None:
    """Hold the conversation, and print it."""

    def show(found: Any, most: int = 1500) -> None:
        text = json.dumps(found, indent=1)
        say(text if len(text) <= most else f"{text[:most]} ... ({len(text)} characters)")

    async def ask(call, tool: str, **arguments: Any) -> dict:
        say(f"\n>>> {tool} {json.dumps(arguments)}")
        try:
            found = await call(tool, **arguments)
        except Refused as line:
            say(f"refused: {line}")
            return {}
        show(found)
        return found

    async with connected(folder, "flops=1e12") as call:
        say(f"tools: {', '.join(tool.name for tool in (await call.client.list_tools()).tools)}")
        needed = (await ask(call, "dry_run", **ASKED))["flops_at_most"]
    budget = f"flops={1.5 * needed:.4g}"
    say(f"\nthe server is started again, with --budget={budget}")
    async with connected(folder, budget) as call:
        await ask(call, "list_experiments")
        await ask(call, "describe_fields", config="tiny", section="rl.optimizer")
        sweep = (await ask(call, "start_sweep", **ASKED, note="does the rate or the objective matter?"))["sweep"]
    say("\nthe server has ended while the sweep runs; another one finds it")
    async with connected(folder, budget) as call:
        await ask(call, "list_sweeps")
        await ended(call, sweep)
        await ask(call, "status", sweep=sweep)
        report = await ask(call, "read_report", sweep=sweep)
        say(report.get("text", ""))
        runs = [run["run"] for run in (await call("status", sweep=sweep))["runs"]]
        await ask(call, "compare_runs", sweep_a=sweep, run_a=runs[0], sweep_b=sweep, run_b=runs[1])
        await ask(call, "read_rollouts", sweep=sweep, run=runs[0], count=1)
        larger = ASKED | {"fields": SMALL | {"rl.steps": 200}}
        await ask(call, "start_sweep", **larger)
        await ask(call, "start_sweep", **ASKED | {"config": "../../etc/passwd"})
        await ask(call, "start_sweep", **ASKED | {"fields": {"rl.source.task.name": "my_file:f"}})
        await ask(call, "get_budget")
    say(f"\n{folder / 'audit.jsonl'}:")
    for line in (folder / "audit.jsonl").read_text().splitlines():
        say(line if len(line) < 400 else f"{line[:400]}...")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        asyncio.run(converse(Path(sys.argv[1] if len(sys.argv) > 1 else scratch).resolve()))
