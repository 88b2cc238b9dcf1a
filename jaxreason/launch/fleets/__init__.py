"""Jobs for other engines: SkyPilot, xpk on GKE, and Slurm.

    job      what a job is, its types and options, and the checks of its values
    yaml     writes YAML
    sky      a managed job of SkyPilot: the task file and its commands
    xpk      a workload of xpk on GKE: the command
    slurm    a batch script and its commands

An engine turns a `Job` into a file and lists the commands that submit, watch and stop
it. Their packages clash with ours (xpk pins many versions, SkyPilot needs an older
click than wandb), so none is a dependency: `sky` and `xpk` are programs on the PATH,
each installed in an environment of its own.

A job ends with exit code 75 if it was asked to stop and saved itself (SIGTERM, or
maintenance of a Cloud TPU), and each engine is told to start such a job again.
"""

from jaxreason.launch.fleets import sky, slurm, xpk
from jaxreason.launch.fleets.job import Engine, Job

ENGINES: dict[str, Engine] = {"sky": sky.ENGINE, "slurm": slurm.ENGINE, "xpk": xpk.ENGINE}

__all__ = ["ENGINES", "Engine", "Job"]
