"""Models that were taken out of their runs (`mtl export`), read back: ONNX, a `torch.export` archive, a
folder of safetensors.

Each carries a description, JSON by its keys: what its images and outputs are for whoever runs it elsewhere,
and recipe, data and thresholds, by which it answers here as its run does. Nothing of it is unpickled but an
archive of torch, and that only where it is the user's own or trusted.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from mtl_dist.assemble import Trained, tasks_of
from mtl_dist.config.loading import resolved_settings
from mtl_dist.config.trust import MARK, is_own, may_unpickle, parts_of
from mtl_dist.data.facts import DataFacts
from mtl_dist.engine.connect import connect_without_engine
from mtl_dist.engine.settings import EngineSettings
from mtl_dist.errors import UserError
from mtl_dist.json_files import DamagedFile, parsed
from mtl_dist.recipe import Recipe
from mtl_dist.step import at_temperatures
from mtl_dist.tasks.task import Task
from mtl_dist.tensor_files import read_tensors

VERSION = 1
ONNX_FILE, TORCH_FILE, WEIGHTS_FILE, CONFIG_FILE = (
    "model.onnx",
    "model.pt2",
    "model.safetensors",
    "config.json",
)
EMBEDDED = "mtl_dist.json"
"""The description within an archive of torch."""
MODEL_FILES = {ONNX_FILE: ONNX_FILE, TORCH_FILE: TORCH_FILE, CONFIG_FILE: WEIGHTS_FILE}
"""What a folder is known by, and its weights."""
INPUT = "images"

Predict: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]
Thresholds: TypeAlias = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Network:
    """A trained network, wherever it comes from: raw images (B, C, H, W) to an output per task, float32.

    `module` is it as a plain module; None where it runs outside of torch.
    """

    recipe: Recipe
    facts: DataFacts
    tasks: Mapping[str, Task]
    predict: Predict
    device: torch.device
    module: nn.Module | None


def network_of(trained: Trained, device: torch.device | str | None) -> Network:
    """A trained root module in evaluation mode, as a network."""
    world = connect_without_engine(trained.recipe.engine, device)
    root = trained.root(world)
    return Network(trained.recipe, trained.facts, root.tasks, root.predict, world.device, root.model)


def exported_in(path: Path) -> Path | None:
    """The file of an exported model: `path`, or what lies in that folder; None where it is something else."""
    if path.is_file() and path.suffix in (".onnx", ".pt2", ".safetensors"):
        return path
    found = (path / weights for known, weights in MODEL_FILES.items() if (path / known).is_file())
    return None if (path / "recipe.yaml").is_file() else next(found, None)


def open_exported(path: Path, device: torch.device | str | None) -> Network:
    """The network in a file that `mtl export` made.

    Raises:
        UserError: it is damaged, of no such origin, or names code of somebody else.
    """
    if not path.is_file():
        raise UserError(f"{path}: expected the weights beside {CONFIG_FILE}, found none.")
    openers = {".onnx": _open_onnx, ".pt2": _open_torch, ".safetensors": _open_folder}
    return openers[path.suffix](path, device)


def described(path: Path, record: Mapping[str, Any], file: str) -> tuple[Recipe, DataFacts, Thresholds]:
    """What a description says of recipe, data and thresholds; `file` is what its folder is marked by.

    Raises:
        UserError: it is none, or one of a later version.
    """
    if record.get("version") != VERSION:
        raise UserError(
            f"{path}: expected a model from mtl export of version {VERSION}, found "
            f"{record.get('version', 'none')}. Export the run again with this release."
        )
    try:
        facts = DataFacts.parse(json.dumps(record["data"]))
        thresholds = parsed(Thresholds, json.dumps(record["thresholds"]))
        with parts_of(path.parent, file):
            recipe = resolved_settings(Recipe, record["recipe"])
    except (KeyError, TypeError, DamagedFile) as error:
        raise UserError(f"{path}: expected the description of its run, found it damaged ({error}).") from None
    return recipe, facts, thresholds


def _temperatures(record: Mapping[str, Any]) -> dict[str, float]:
    """What logits are divided by, of an export that was made so."""
    return {task: float(value) for task, value in record.get("temperatures", {}).items()}


def _open_onnx(path: Path, device: torch.device | str | None) -> Network:
    """By onnxruntime: on a GPU where its package for GPUs is installed."""
    try:
        import onnxruntime
    except ImportError:
        raise UserError(
            f"{path}: expected onnxruntime, which runs it, found it not installed. "
            'Install it with `pip install "mtl-dist[export]"`.'
        ) from None
    wanted = connect_without_engine(EngineSettings(), device).device
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    there = onnxruntime.get_available_providers()
    gpu = ["CUDAExecutionProvider"] if wanted.type == "cuda" and "CUDAExecutionProvider" in there else []
    try:
        session = onnxruntime.InferenceSession(path, options, providers=[*gpu, "CPUExecutionProvider"])
    except Exception as error:  # its own, of no common class
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: expected an ONNX model, found a damaged file ({reason}).") from None
    properties = session.get_modelmeta().custom_metadata_map
    try:
        record = {key: json.loads(text) for key, text in properties.items()}
    except ValueError:
        record = {}
    recipe, facts, thresholds = described(path, record, path.name)
    tasks = at_temperatures(tasks_of(recipe, facts, thresholds), _temperatures(record))
    names = list(tasks)

    def predict(images_BCHW: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {INPUT: images_BCHW.cpu().numpy()})
        return dict(zip(names, map(torch.from_numpy, outputs), strict=True))

    return Network(recipe, facts, tasks, predict, torch.device("cpu"), None)


def _found_beside(path: Path) -> str:
    if not (path.parent / MARK).is_file():
        return "none, as of one that you did not make or copied without it"
    return "one that is not yours, or an archive that changed since"


def _open_torch(path: Path, device: torch.device | str | None) -> Network:
    if not (is_own(path.parent, path.name) or may_unpickle()):
        raise UserError(
            f"{path}: expected an archive of your own, with the {MARK} that mtl export wrote beside it, "
            f"found {_found_beside(path)}. torch may run code of it: if you made it copy its whole folder, "
            f"{MARK} too; else look where it comes from, then add --trust, or use ONNX or safetensors."
        )
    extra = {EMBEDDED: ""}
    try:
        program = torch.export.load(path, extra_files=extra)
        record = json.loads(extra[EMBEDDED])
    except Exception as error:  # its reader meets a damaged file in many places
        reason = str(error).strip().partition("\n")[0]
        raise UserError(f"{path}: expected an archive from mtl export, found: {reason}.") from None
    recipe, facts, thresholds = described(path, record, path.name)
    wanted = connect_without_engine(EngineSettings(), device).device
    module = program.module().to(wanted)
    tasks = at_temperatures(tasks_of(recipe, facts, thresholds), _temperatures(record))
    return Network(recipe, facts, tasks, module, wanted, module)


def _open_folder(path: Path, device: torch.device | str | None) -> Network:
    config = path.parent / CONFIG_FILE
    try:
        record = parsed(dict[str, Any], config.read_bytes())
    except (OSError, DamagedFile) as error:
        raise UserError(f"{config}: expected the description of {path.name}, found: {error}.") from None
    recipe, facts, thresholds = described(config, record, CONFIG_FILE)
    return network_of(
        Trained(path, recipe, facts, read_tensors(path), thresholds, _temperatures(record)), device
    )


def images_in_words(network: Network) -> dict[str, Any]:
    """What images the network takes, as JSON holds it."""
    facts = network.facts
    return {
        "layout": "NCHW",
        "channels": facts.channels,
        "dtype": facts.image_dtype,
        "values": "raw, as in the files" + ("; 0 to 255" if facts.image_dtype == "uint8" else ""),
        "size": list(facts.image_size),
        "resize": network.recipe.data.model_dump(mode="json")["resize"],
    }


def tasks_in_words(network: Network) -> dict[str, dict[str, Any]]:
    """What each output means, as JSON holds it."""
    return {
        name: {
            "kind": task.info.kind,
            "layout": task.head.layout,
            "num_outputs": task.head.num_outputs,
            "classes": list(task.info.classes),
            "unit": task.info.unit,
            "mean": task.info.mean,
            "std": task.info.std,
            "thresholds": dict(zip(task.decided_labels, task.thresholds, strict=False)),
            **({"temperature": task.temperature} if task.temperature != 1 else {}),
            **task.how_to_read(),
        }
        for name, task in network.tasks.items()
    }


def portable(recipe: Recipe) -> dict[str, Any]:
    """The recipe as a model needs it elsewhere: without places of this machine, trackers and callbacks."""
    values: dict[str, Any] = recipe.model_dump(mode="json")
    for key in ("tracking", "callbacks", "engine", "start_from"):
        values.pop(key, None)
    data, model = values["data"], values["model"]
    data["train"] = [{"path": Path(source["path"]).name} for source in data["train"]]
    for key in ("val", "test", "mixing", "sampling", "cache", "on_bad_sample"):
        data.pop(key, None)
    model["weights"] = None
    for task in values["tasks"].values():
        task["metrics"] = {}
    return values


def plain_facts(facts: DataFacts) -> dict[str, Any]:
    """The facts as JSON holds them, without by what the data is known again."""
    record: dict[str, Any] = json.loads(replace(facts, sources={}).to_json())
    return record
