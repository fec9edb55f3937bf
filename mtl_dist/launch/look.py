"""The next look at runs whose job ended with nobody left to requeue it: where the profile allows, once more.

Ranks that hang at the time limit are killed with their batch script, and so is one by `kill -9`: then nobody
has given a verdict. Whoever looks next (`mtl status`) gives it, from what Slurm says of the job.
"""

from __future__ import annotations

import json
from dataclasses import replace

from mtl_dist.durable import Locked, locked
from mtl_dist.errors import UserError
from mtl_dist.launch.attempts import Cause, close_lost, read_budget, why_not_again
from mtl_dist.launch.jobs import RunView, view_runs
from mtl_dist.launch.profile import ClusterProfile
from mtl_dist.launch.records import read_jobs, read_submission
from mtl_dist.launch.squeue import cluster_name
from mtl_dist.plural import plural


def after_look(view: RunView) -> RunView:
    """The run as it stands after it was looked at: submitted again if its job was lost and it may be.

    Whoever cannot write to its folder changes nothing.
    """
    if view.lost is None:
        return view
    try:
        with locked(view.run, wait=False):
            return _after_look(view, view.lost)
    except UserError as error:
        return _with(view, f"not submitted again: {error}")
    except (Locked, OSError):
        return view


def _after_look(view: RunView, cause: Cause) -> RunView:
    run, jobs = view.run, read_jobs(view.run)
    job = next(job for job in reversed(jobs) if job.kind == "train")
    if job.id != view.job:
        return view_runs([run])[0]  # somebody else has looked before
    attempts = close_lost(run, job.id, cause, view.detail)
    budget = read_budget(run / job.submission)
    again = sum(each.again for each in jobs)
    if again >= budget.resubmit:
        times = plural(again, "time")
        bound = f"it was submitted again {times}, as requeue.resubmit allows; " if again else ""
        return _with(view, f"{bound}`mtl submit {run} --cluster PROFILE` goes on")
    hopeless = why_not_again(attempts, budget)
    if hopeless:
        return _with(view, f"not submitted again: {hopeless}")
    from mtl_dist.launch.slurm import submit_again  # submitit

    profile = ClusterProfile.model_validate_json(json.dumps(read_submission(run / job.submission).profile))
    new = submit_again(run, profile, job, cluster_name())
    (now,) = view_runs([run])
    return _with(now, f"submitted again as job {new} after job {job.id} was lost: {view.detail}")


def _with(view: RunView, what: str) -> RunView:
    return replace(view, detail=f"{view.detail}; {what}" if view.detail else what)
