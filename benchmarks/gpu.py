"""The first GPU: everything that wants one, part by part, into one gpu.json and one gpu.md.

Every part is a process with a time limit. What a part found before it failed or ran out of time is kept, its
failure is written beside it, and the next part goes on. With `MTL_BENCH_DEVICE=cpu` the CPU takes the GPU's
place: together with `tiny` a trial of the script on a machine without a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
import traceback
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.tables import Findings, Row
from mtl_dist.durable import write_text
from mtl_dist.errors import UserError

ROOT = Path(__file__).parents[1]
DEVICE = "MTL_BENCH_DEVICE"
TOTAL_S = 690.0
"""What all parts may take together."""


@dataclass(frozen=True)
class Sizes:
    """How much is measured."""

    backbones: tuple[str, ...] = ("resnet50", "efficientnet_b0")
    batch: int = 256
    image_size: int = 224
    steps: int = 20
    repeats: int = 5
    num_images: int = 12800
    workers: int = 14
    every: int = 20
    test_processes: int = 8
    product_size: int = 8192


TINY = Sizes(("simple_cnn",), 4, 32, 2, 1, 128, 1, 2, 2, 256)


@dataclass
class Part:
    """What one part found."""

    name: str
    seconds: float = 0.0
    findings: list[Findings] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    complete: bool = False

    def write(self, out: Path) -> None:
        """Where `read` finds it."""
        found = self.__dict__ | {"findings": [findings.to_json() for findings in self.findings]}
        write_text(_path(out, self.name), json.dumps(found, indent=1))

    @classmethod
    def read(cls, out: Path, name: str) -> Part:
        """What the part has written so far; an empty one if nothing."""
        path = _path(out, name)
        if not path.exists():
            return cls(name)
        found = json.loads(path.read_text())
        return cls(**found | {"findings": [Findings(**one) for one in found["findings"]]})


def _path(out: Path, name: str) -> Path:
    return out / "parts" / f"{name}.json"


# ---------------------------------------------------------------- all parts
def run_all(out: Path, tiny: bool) -> None:
    """Run every part in a process of its own, and write gpu.json and gpu.md after each.

    Raises:
        UserError: there is no GPU, and the CPU was not asked to take its place.
    """
    environment = gpu_environment()
    out.mkdir(parents=True, exist_ok=True)
    (out / "parts").mkdir(exist_ok=True)
    for name in PARTS:
        _path(out, name).unlink(missing_ok=True)
    start = time.monotonic()
    for name, (_, limit_s) in PARTS.items():
        left = TOTAL_S - (time.monotonic() - start)
        print(f"{name}: at most {min(limit_s, left):.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks", "gpu", str(out), "--part", name]
        began = time.monotonic()
        problem = run_command(command + ["--tiny"] * tiny, environment, min(limit_s, left))
        part = Part.read(out, name)
        part.seconds = round(time.monotonic() - began, 1)
        if problem:
            part.problems.append(problem)
        part.write(out)
        write_report(out)
        for line in part.problems:
            print(f"{name}: {line}", flush=True)
    print((out / "gpu.md").read_text())


def gpu_environment() -> dict[str, str]:
    import torch

    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"PYTHONPATH": path}
    if os.environ.get(DEVICE) == "cpu":
        return environment | {"ACCELERATE_USE_CPU": "true", "CUDA_VISIBLE_DEVICES": ""}
    if not torch.cuda.is_available():
        raise UserError(f"gpu: expected a GPU, found none. Set {DEVICE}=cpu for a trial on the CPU.")
    return environment


def run_command(command: list[str], environment: dict[str, str], limit_s: float) -> str:
    """Why it did not end well; nothing if it did. No process of it is left behind."""
    if limit_s < 1:
        return "no time was left for it"
    process = subprocess.Popen(command, env=environment, cwd=ROOT, start_new_session=True)
    try:
        code = process.wait(limit_s)
        return "" if code == 0 else f"ended with exit code {code}"
    except subprocess.TimeoutExpired:
        return f"was ended after {limit_s:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def run_part(name: str, out: Path, tiny: bool) -> None:
    """Measure one part here; every table is written as soon as it is there."""
    part = Part(name)
    measure, _ = PARTS[name]
    for job in measure(TINY if tiny else Sizes(), out):
        try:
            found = job()
            (part.findings.append if isinstance(found, Findings) else part.facts.update)(found)  # type: ignore[arg-type]
        except Exception:
            traceback.print_exc()
            part.problems.append(traceback.format_exc().strip().splitlines()[-1])
        part.write(out)
    if name == "tests":
        part.problems += failed_tests(out)
    part.complete = True
    part.write(out)


def write_report(out: Path) -> None:
    """gpu.json from what the parts have written, and gpu.md from gpu.json."""
    parts = [Part.read(out, name) for name in PARTS if _path(out, name).exists()]
    found = {
        part.name: part.__dict__ | {"findings": [findings.to_json() for findings in part.findings]}
        for part in parts
    }
    write_text(out / "gpu.json", json.dumps(found, indent=1))
    write_text(out / "gpu.md", markdown(json.loads((out / "gpu.json").read_text())))


def markdown(found: dict[str, Any]) -> str:
    """What gpu.json says, for docs."""
    facts = {name: fact for part in found.values() for name, fact in part["facts"].items()}
    lines = [", ".join(f"{name} {fact}" for name, fact in facts.items()) + ".", ""]
    for name, part in found.items():
        for findings in part["findings"]:
            lines += [Findings(**findings).markdown(), ""]
        lines += [f"{name}: {problem}" for problem in part["problems"]]
        lines += [""] * bool(part["problems"])
    seconds = ", ".join(f"{name} {part['seconds']:.0f} s" for name, part in found.items())
    return "\n".join([*lines, f"Time: {seconds}.", ""])


# ---------------------------------------------------------------- the parts
Job = Callable[[], "Findings | dict[str, str]"]
"""One table, or facts of the machine."""


def environment_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """What is measured here, and with what."""
    from importlib.metadata import PackageNotFoundError, version

    import torch

    from benchmarks.step import matrix_product_flops
    from mtl_dist.data.decode import decoder_name
    from mtl_dist.engine.world import own_device

    device = own_device(0)

    def facts() -> dict[str, str]:
        found = {
            "device": "CPU",
            "CPUs": str(len(os.sched_getaffinity(0))),
            "Python": platform.python_version(),
        }
        if device.type == "cuda":
            properties = torch.cuda.get_device_properties(device)
            found["device"] = f"{properties.name} ({properties.total_memory / 2**30:.0f} GiB)"
            found["CUDA"] = str(torch.version.cuda)
            query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
            with suppress(OSError):
                found["driver"] = subprocess.run(
                    query, capture_output=True, text=True, check=False
                ).stdout.strip()
        for package in ("torch", "torchvision", "accelerate", "deepspeed", "webdataset"):
            try:
                found[package] = version(package)
            except PackageNotFoundError:
                found[package] = "is not installed"
        return found | {"decoder": decoder_name()}

    def product() -> dict[str, str]:
        flops = matrix_product_flops(device, "bf16", sizes.product_size)
        return {"a large bf16 matrix product": f"{flops / 1e12:.3g} TFLOP/s"}

    yield facts
    yield product


def tests_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """tests/gpu, in several processes at a time."""
    report = out / "tests.xml"

    def run() -> Findings:
        report.unlink(missing_ok=True)
        command = [sys.executable, "-m", "pytest", "tests/gpu", "-q", "-p", "no:cacheprovider"]
        command += ["-n", str(sizes.test_processes), "--dist", "worksteal", f"--junitxml={report}"]
        subprocess.run(command, cwd=ROOT, check=False)
        return count_tests(report)

    yield run


def count_tests(report: Path) -> Findings:
    """How many cases of each test passed, from pytest's report."""
    counts: dict[str, dict[str, Any]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        row = counts.setdefault(name, {"test": name, "passed": 0, "failed": 0, "skipped": 0, "seconds": 0.0})
        kinds = {child.tag for child in case}
        outcome = "failed" if kinds & {"failure", "error"} else "skipped" if "skipped" in kinds else "passed"
        row[outcome] += 1
        row["seconds"] += float(case.get("time", 0))
    rows: list[Row] = list(counts.values())
    if not rows:
        raise RuntimeError("pytest ran no test")
    return Findings("tests/gpu", rows)


def failed_tests(out: Path) -> list[str]:
    """One line for each test that did not pass; none if pytest has written no report."""
    report = out / "tests.xml"
    if not report.exists():
        return []
    lines = []
    for case in ElementTree.parse(report).iter("testcase"):
        for child in case:
            if child.tag in ("failure", "error"):
                message = (child.get("message") or "").strip().splitlines()[:1]
                lines.append(": ".join([f"{case.get('name')} {child.tag}", *message])[:500])
    return lines


def step_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """Our step beside a plain loop, three heads, bf16; and without channels-last memory."""
    from benchmarks.step import measure_step
    from benchmarks.training import Scene

    connection = _connection()
    for backbone in sizes.backbones:
        scene = Scene(backbone, sizes.batch, sizes.image_size, "bf16")
        yield lambda scene=scene: measure_step(  # type: ignore[misc]
            scene, connection, ["contiguous"], 0, sizes.steps, sizes.repeats
        )


def compiled_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """What compiling brings."""
    from benchmarks.step import measure_step
    from benchmarks.training import Scene

    scene = Scene(sizes.backbones[0], sizes.batch, sizes.image_size, "bf16")
    connection = _connection()
    yield lambda: measure_step(scene, connection, ["compiled"], 0, sizes.steps, sizes.repeats)


def loader_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """The loader alone beside others, then with our step."""
    from benchmarks.loader import measure_photos, smooth_photo
    from benchmarks.step import measure_step
    from benchmarks.training import Scene

    # Forks, so before this process touches the GPU.
    photos = [smooth_photo(number, 500, 375) for number in range(min(sizes.num_images, 200))]
    yield lambda: measure_photos(photos, sizes.num_images, [sizes.workers], repeats=1)
    scene = Scene(sizes.backbones[0], sizes.batch, sizes.image_size, "bf16")
    yield lambda: measure_step(scene, _connection(), ["loader"], sizes.workers, sizes.steps, sizes.repeats)


def balance_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """What each way of balancing costs."""
    from benchmarks.balance import measure_balance
    from benchmarks.contenders import LIBMTL, balancing_contenders
    from benchmarks.training import Scene

    names = [name for name in balancing_contenders() if name != LIBMTL]
    if sizes is TINY:
        names = ["equal", "famo", "pcgrad, parameters"]
    connection = _connection()
    for num_masks in (0,) if sizes is TINY else (0, 1):
        scene = Scene(
            sizes.backbones[0],
            max(1, sizes.batch // 4),
            sizes.image_size,
            "bf16",
            num_masks=num_masks,
            optimizer="sgd",
        )
        yield lambda scene=scene: measure_balance(scene, connection, names, sizes.repeats)  # type: ignore[misc]


def memory_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """What gradient checkpointing saves."""
    from benchmarks.memory import measure_memory
    from benchmarks.training import Scene

    scene = Scene(sizes.backbones[0], sizes.batch, sizes.image_size, "bf16")
    yield lambda: next(measure_memory(scene, ranks=1))


def save_part(sizes: Sizes, out: Path) -> Iterator[Job]:
    """How long a checkpoint keeps the loop."""
    from benchmarks.save import measure_save
    from benchmarks.training import Scene

    scene = Scene(sizes.backbones[0], max(1, sizes.batch // 4), sizes.image_size, "bf16")
    yield lambda: measure_save(scene, _connection(), every=sizes.every, saves=3)


def _connection() -> Any:
    from mtl_dist.engine.connect import connect
    from mtl_dist.engine.settings import EngineSettings

    return connect(EngineSettings(), "fp32")


PARTS: dict[str, tuple[Callable[[Sizes, Path], Iterator[Job]], float]] = {
    "environment": (environment_part, 60),
    "tests": (tests_part, 300),
    "step": (step_part, 120),
    "loader": (loader_part, 100),
    "balance": (balance_part, 120),
    "memory": (memory_part, 90),
    "save": (save_part, 60),
    "compiled": (compiled_part, 180),
}
"""In this order; the seconds that each may take, of which there are TOTAL_S together."""
