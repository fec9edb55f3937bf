"""A model as one graph: outputs by their tasks' names, any number of images, each family of backbones."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from mtl_dist.errors import UserError
from mtl_dist.exporting.checking import difference
from mtl_dist.exporting.export import quiet, write_onnx
from mtl_dist.exporting.graph import Graph, traced
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.specs import HeadSpec

FAMILIES = {
    "simple_cnn": 32,
    "alexnet": 64,
    "convnext_tiny": 32,
    "densenet121": 32,
    "efficientnet_b0": 32,
    "googlenet": 32,
    "inception_v3": 80,
    "maxvit_t": 224,
    "mnasnet0_5": 32,
    "mobilenet_v2": 32,
    "mobilenet_v3_small": 32,
    "regnet_y_400mf": 32,
    "resnet18": 32,
    "shufflenet_v2_x0_5": 32,
    "squeezenet1_1": 32,
    "swin_t": 32,
    "swin_v2_t": 64,
    "vgg11": 32,
    "vit_b_32": 64,
}
"""One of each family of torchvision's, and the side of its images."""


def network(module: nn.Module, tasks: list[str], size: int, dtype: str = "float32") -> Any:
    """What of a network the graph asks for."""
    facts = SimpleNamespace(image_dtype=dtype, channels=3, image_size=(size, size))
    return SimpleNamespace(module=module, tasks=dict.fromkeys(tasks), facts=facts)


def outputs_of(path: Path, images: Tensor, names: list[str]) -> dict[str, Tensor]:
    """By onnxruntime, asked by name."""
    runtime = pytest.importorskip("onnxruntime", reason="the extra export is not installed")
    session = runtime.InferenceSession(path)
    return {name: torch.from_numpy(session.run([name], {"images": images.numpy()})[0]) for name in names}


class Backwards(nn.Module):
    """Gives its tasks in another order than they are listed in, all of one shape."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        mean = images.float().mean(dim=(1, 2, 3))[:, None]
        return {"zebra": mean * 3, "apple": mean * 2, "mango": mean * 1}


def test_an_output_is_found_by_its_tasks_name_whatever_the_order(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    tasks = ["mango", "zebra", "apple"]
    graph = Graph(network(Backwards(), tasks, 4), (4, 4), resize=False)
    with quiet():
        program = traced(graph, network(Backwards(), tasks, 4), (4, 4), any_size=False)
        write_onnx(program, graph.tasks, {"version": 1}, tmp_path)
    images = torch.full((3, 3, 4, 4), 10.0)
    found = outputs_of(tmp_path / "model.onnx", images, tasks)
    assert {name: float(output[2, 0]) for name, output in found.items()} == {
        "mango": 10.0,
        "zebra": 30.0,
        "apple": 20.0,
    }


class Undecided(nn.Module):
    """Asks for a number in the middle, which no graph has."""

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        mean = images.float().mean(dim=(1, 2, 3))[:, None]
        return {"a": mean if float(mean.sum()) > 0 else -mean}


@pytest.mark.parametrize("any_size", [False, True])
def test_a_model_that_no_graph_holds_is_not_told_that_its_size_is_why(any_size: bool) -> None:
    made = network(Undecided(), ["a"], 4)
    with quiet(), pytest.raises(UserError, match=r"expected a model that torch\.export can trace"):
        traced(Graph(made, (4, 4), resize=False), made, (4, 4), any_size)


@pytest.mark.parametrize(
    "other", [{"a": torch.ones(1, 2)}, {"b": torch.zeros(1, 2)}, {"a": torch.zeros(1, 3)}]
)
def test_a_model_that_differs_from_its_run_is_refused(other: dict[str, Tensor]) -> None:
    with pytest.raises(UserError, match=r"^model.onnx: expected a "):
        difference({"a": torch.zeros(1, 2)}, other, "model.onnx")


def test_nan_is_no_agreement() -> None:
    with pytest.raises(UserError, match="found nan"):
        difference({"a": torch.zeros(1, 2)}, {"a": torch.full((1, 2), torch.nan)}, "model.onnx")


@pytest.mark.exhaustive
@pytest.mark.parametrize("backbone", FAMILIES)
def test_a_backbone_of_every_family_answers_in_onnx_as_in_torch(backbone: str, tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="the extra export is not installed")
    size = FAMILIES[backbone]
    names = ["zeta", "alpha"]
    specs = [HeadSpec("zeta", "vector", 5), HeadSpec("alpha", "map", 3)]
    torch.manual_seed(0)
    try:
        model = build_model(ModelSettings(backbone=backbone), specs, 3, (size, size)).eval()
    except UserError:  # one without maps
        specs[1] = HeadSpec("alpha", "vector", 3)
        model = build_model(ModelSettings(backbone=backbone), specs, 3, (size, size)).eval()
    of_model = network(model, names, size, "uint8")
    graph = Graph(of_model, (size, size), resize=False)
    with quiet():
        program = traced(graph, of_model, (size, size), any_size=False)
        write_onnx(program, graph.tasks, {"version": 1}, tmp_path)
    for number in (1, 3):
        images = torch.randint(0, 256, (number, 3, size, size), dtype=torch.uint8)
        with torch.no_grad():
            expected = graph(images)
        difference(expected, outputs_of(tmp_path / "model.onnx", images, names), backbone)
