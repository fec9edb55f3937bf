"""A cluster profile: what a cluster needs to know, apart from what is trained on it."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from mtl_dist.config.settings import Settings

Count = Annotated[int, Field(ge=1)]

# Slurm reads 12:00 as twelve minutes, people as twelve hours: only what both read alike.
_TIME = re.compile(
    r"(?:(?P<days>\d+)-(?P<hours>\d+):(?P<minutes>\d\d)(?::(?P<seconds>\d\d))?"
    r"|(?P<h>\d+):(?P<m>\d\d):(?P<s>\d\d))$"
)


START_S = 60
"""What a run needs at least before its first step."""


class RequeueSettings(Settings):
    """How often a run is started again. Preemptions and time limits are not counted as long as it gets on:
    they are no failures."""

    crashes: Annotated[int, Field(ge=0)] = 3
    node_failures: Annotated[int, Field(ge=0)] = 20
    without_step: Annotated[int, Field(ge=1)] = 5
    """Attempts in a row that may end without a single step, whatever ended them: preemptions, too."""
    resubmit: Annotated[int, Field(ge=0)] = 0
    """How often `mtl status` submits a run again whose job ended with nobody left to requeue it: it hung at
    the time limit, its batch script was killed, Slurm gave it up. With 0 it says the line to type."""


class Pyxis(Settings):
    """A container by the pyxis plug-in of srun; its image needs this package's dependencies."""

    kind: Literal["pyxis"]
    image: str
    mounts: tuple[str, ...] = ()
    """`HOST:CONTAINER[:ro]`; the run folder and the data must be among them, at the same paths."""


class Prefix(Settings):
    """A container by a command in front of Python, such as `apptainer exec --nv image.sif`."""

    kind: Literal["prefix"]
    command: str


Container = Annotated[Pyxis | Prefix, Field(discriminator="kind")]


class ClusterProfile(Settings):
    """How jobs are submitted to one cluster, or to one partition of it."""

    time_limit: str = "1-00:00"
    """DAYS-HOURS:MINUTES or HOURS:MINUTES:SECONDS. A longer run stops before, and goes on in the same job."""
    signal_lead_s: Count = 180
    """Seconds before the end at which Slurm sends SIGUSR2; it may come up to a minute early."""
    save_margin_s: Count = 60
    """Seconds before the end at which the ranks stop by themselves, should no signal have come."""
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    gpus_per_task: Annotated[int, Field(ge=0)] = 1
    """GPUs of each rank: 1, or 0 to train on CPUs."""
    cpus_per_task: Count = 8
    """CPUs of each rank, shared by its data workers."""
    memory_gb: Count | None = None
    """Memory of each node; null: the cluster's default."""
    network_interface: str | None = None
    """The interface between the nodes, for NCCL and gloo, such as `ib0`; null: they choose."""
    modules: tuple[str, ...] = ()
    """Loaded by `module load`, in order."""
    environment: dict[str, str] = Field(default={})
    setup: tuple[str, ...] = ()
    """Lines of shell that run on the first node before the ranks start."""
    python: str | None = None
    """The Python command on the nodes (in the container); null: the one that submits."""
    container: Container | None = None
    sbatch: dict[str, str | int | bool] = Field(default={})
    """Further options of sbatch, such as `{nodelist: gpu07, exclusive: true}`."""
    srun: tuple[str, ...] = ()
    """Further arguments of srun."""
    requeue: RequeueSettings = RequeueSettings()
    check_data: bool = True
    """Look for the data at submission; false where it is on the nodes alone, or `setup` brings it there."""

    @field_validator("time_limit")
    @classmethod
    def _slurm_time(cls, value: str) -> str:
        if _TIME.match(value) is None:
            raise ValueError(f"expected DAYS-HOURS:MINUTES or HOURS:MINUTES:SECONDS, found {value!r}.")
        return value

    @model_validator(mode="after")
    def _time_to_save(self) -> ClusterProfile:
        if self.time_limit_s <= self.save_margin_s:
            raise ValueError(
                f"save_margin_s: expected less than time_limit ({self.time_limit_s} s), found "
                f"{self.save_margin_s}. Lower it: a run would stop as soon as it starts."
            )
        needed = self.signal_lead_s + START_S
        if self.time_limit_s < needed:
            raise ValueError(
                f"time_limit: expected at least signal_lead_s and {START_S} s to start ({needed} s), found "
                f"{self.time_limit_s} s. Raise it, or lower signal_lead_s: a run would be asked to stop "
                "before its first step."
            )
        return self

    @property
    def time_limit_s(self) -> int:
        """The time limit in seconds."""
        match = _TIME.match(self.time_limit)
        assert match is not None, "checked when the profile was built"
        days, *long = match.group("days", "hours", "minutes", "seconds")
        hours, minutes, seconds = (int(part or 0) for part in (long if days else match.group("h", "m", "s")))
        return ((int(days or 0) * 24 + hours) * 60 + minutes) * 60 + seconds
