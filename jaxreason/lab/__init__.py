"""A lab for an assistant: an MCP server that proposes, runs and reads experiments of
this repository within a budget that the user set.

    python -m jaxreason.lab --budget=flops=2e15 [--folder=sweeps/lab]

An MCP host starts it by an entry such as

    {"command": "python", "args": ["-m", "jaxreason.lab", "--budget=flops=2e15"]}

    gate        which configs, options, fields and values may be run
    audit       audit.jsonl: requests, reservations and costs, with the client
    budget      reservations and costs, added up from audit.jsonl
    cost        the cost of a sweep, read from the ledgers of its runs
    supervisor  a process per sweep that stops it at its reservation
    sweeps      start, watch, stop and read sweeps
    rollouts    pages of rollouts; texts of a model are marked as data
    server      the tools, over the protocol

`python tests/lab_client.py` prints an exchange of such a host with the server.

The lab is a thin layer: a sweep is `python -m jaxreason.sweep` in a process of its own,
which outlives the server. Nothing is passed to a shell. Files in `configs/` and
`experiments/` are the user's own code and are trusted.
"""
