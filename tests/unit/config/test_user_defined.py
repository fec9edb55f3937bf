"""User-defined parts by import path: typed arguments where a part fits, one line of refusal where not."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from pydantic import TypeAdapter

from mtl_dist.balance.methods import BalanceSettings, build_balancer
from mtl_dist.config.loading import to_yaml
from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.settings import ModelSettings
from mtl_dist.recipe import Recipe, load_recipe
from mtl_dist.specs import HeadSpec, TaskInfo
from mtl_dist.tasks.registry import build_tasks

MODULE = """
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn
from torchmetrics import Metric

from mtl_dist.balance.method import Method
from mtl_dist.data.transforms import ImageTransform
from mtl_dist.specs import TaskInfo
from mtl_dist.tasks.task import Loss, LossSettings


class Poly(Loss):
    def __init__(
        self,
        info: TaskInfo,
        epsilon: Annotated[float, Field(ge=0)] = 1.0,
        weights: tuple[float, ...] = (),
        mode: Literal["soft", "hard"] = "soft",
    ) -> None:
        self.num_outputs, self.epsilon, self.weights = len(info.classes), epsilon, weights

    num_outputs = 0

    def numerators(self, output, target):
        return nn.functional.cross_entropy(output, target, reduction="none") * self.epsilon

    def denominators(self, target):
        return torch.ones_like(target, dtype=torch.float32)


class PolySettings(LossSettings):
    epsilon: float = 2.0

    def build(self, info, where):
        return Poly(info, self.epsilon)


class Half(Loss):
    num_outputs = 1

    def numerators(self, output, target):
        return output[:, 0]


class Untyped(Poly):
    def __init__(self, alpha):
        pass


class Odd(Poly):
    def __init__(self, module: nn.Module):
        pass


class First(Method):
    needs = "nothing"

    first: float = 2.0

    def propose(self, window, state):
        return torch.tensor([self.first] + [1.0] * (len(window.present_T) - 1))


class Wide(nn.Module):
    def __init__(self, channels: dict, num_outputs: int) -> None:
        super().__init__()
        self.deepest = max(channels)
        self.output = nn.Conv2d(channels[self.deepest], num_outputs, 1)

    def forward(self, maps, image_size):
        return self.output(maps[self.deepest])


class Branching(nn.Module):
    def __init__(self, in_channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, 4, 3)

    def forward(self, images):
        return self.conv(images) if images.sum() > 0 else images


class Scores(Metric):
    def __init__(self) -> None:
        super().__init__()
        self.add_state("scores", [], "cat")

    def update(self, output, target):
        self.scores.append(output)

    def compute(self):
        return torch.zeros(())


class Cropping(ImageTransform):
    def __call__(self, image, masks, draws):
        return image[:, 1:], masks


class Middle(ImageTransform):
    training_only = False

    def __init__(self, side: int) -> None:
        self.side = side

    def size_after(self, size):
        return self.side, self.side

    def __call__(self, image, masks, draws):
        cut = slice(1, 1 + self.side)
        return image[:, cut, cut], {name: mask[cut, cut] for name, mask in masks.items()}


class Sharper(ImageTransform):
    training_only = False

    def __call__(self, image, masks, draws):
        return image // 2, masks


def function() -> None: ...
"""
RECIPE = """
tasks: {breed: {kind: classification}, lesion: {kind: segmentation}}
data: {train: [{path: data}], image_size: 32}
"""
INFOS = {
    "breed": TaskInfo("classification", ("a", "b", "c"), num_labelled=3, class_counts=(1, 1, 1)),
    "lesion": TaskInfo("segmentation", ("no", "yes"), num_labelled=3, class_counts=(9, 9)),
}


@pytest.fixture(autouse=True)
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path])
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "parts.py").write_text(MODULE)
    (tmp_path / "mine" / "broken.py").write_text("import no_such_library\n")
    (tmp_path / "mine" / "failing.py").write_text("x = 1\n\ny = x / 0\n")
    (tmp_path / "mine" / "typo.py").write_text("def f(:\n")
    (tmp_path / "recipe.yaml").write_text(RECIPE)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "mine"]:
        del sys.modules[name]


def load(*overrides: str) -> Recipe:
    return load_recipe(Path("recipe.yaml"), overrides)


def refusal(*overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load(*overrides)
    return str(caught.value)


def test_an_own_loss_gets_its_typed_arguments_and_what_the_package_provides() -> None:
    recipe = load("tasks.breed.loss={kind: mine.parts.Poly, epsilon: 0.5, weights: [1, 2.5]}")
    loss = build_tasks(recipe.tasks, INFOS)["breed"].loss
    assert (type(loss).__name__, loss.num_outputs) == ("Poly", 3)
    assert (loss.epsilon, loss.weights) == (0.5, (1.0, 2.5))  # type: ignore[attr-defined]


def test_an_import_path_alone_is_the_part_with_its_defaults() -> None:
    short, long = load("tasks.breed.loss=mine.parts.Poly"), load("tasks.breed.loss={kind: mine.parts.Poly}")
    assert short == long
    assert "kind: mine.parts.Poly, epsilon: 1.0" in to_yaml(short)


def test_code_that_comes_before_the_working_directory_stays_before_it(
    project: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a cluster: the snapshot, then the directory of the submission by whatever name it has."""
    snapshot, alias = tmp_path_factory.mktemp("code"), tmp_path_factory.mktemp("links") / "alias"
    shutil.copytree(project / "mine", snapshot / "mine")
    (snapshot / "mine" / "parts.py").write_text(MODULE.replace("= 1.0", "= 7.0"))
    alias.symlink_to(project)
    monkeypatch.setattr(sys, "path", [str(snapshot), str(alias), *sys.path])
    assert "epsilon: 7.0" in to_yaml(load("tasks.breed.loss=mine.parts.Poly"))


def test_a_class_of_settings_is_taken_as_it_is() -> None:
    loss = build_tasks(load("tasks.breed.loss=mine.parts.PolySettings").tasks, INFOS)["breed"].loss
    assert loss.epsilon == 2.0  # type: ignore[attr-defined]


def test_the_resolved_recipe_reads_back_equal(project: Path) -> None:
    recipe = load(
        "tasks.breed.loss={kind: mine.parts.Poly, weights: [3]}",
        "tasks.breed.metrics.f={kind: torchmetrics.classification.MulticlassF1Score, num_classes: 3}",
        "model.heads.lesion=mine.parts.Wide",
        "data.transforms=[mine.parts.Cropping]",
        "balance={method: mine.parts.First, first: 3}",
    )
    (project / "again.yaml").write_text(to_yaml(recipe))
    assert load_recipe(project / "again.yaml").model_dump() == recipe.model_copy(
        update={"name": "again"}
    ).model_dump() | {"name": "recipe"}


@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("mien.parts.Poly", "expected a module mien, found none in {here} or among the installed packages. "
         "Did you mean mine?"),
        ("mine.part.Poly", "expected a module mine.part, found none in mine. Did you mean mine.parts?"),
        ("mine.parts.Poli", "expected a class Poli in mine.parts, found none. Did you mean Poly?"),
        ("mine.parts.function", "expected a subclass of mtl_dist.tasks.task.Loss or "
         "torch.nn.modules.loss._Loss, found mine.parts.function, a function."),
        ("mine.parts.Wide", "expected a subclass of mtl_dist.tasks.task.Loss or "
         "torch.nn.modules.loss._Loss, found mine.parts.Wide, another class."),
        ("mine.parts.Half", "expected denominators defined in mine.parts.Half, found none."),
        ("mine.parts.Untyped", "expected an annotation of the argument alpha of mine.parts.Untyped, found "
         "none."),
        ("mine.broken.Poly", "mine.broken cannot be imported: No module named 'no_such_library'. Install "
         "what it needs."),
        ("mine.failing.Poly", "mine.failing cannot be imported: ZeroDivisionError: division by zero "
         "(failing.py:3)."),
    ],
)  # fmt: skip
def test_a_path_that_is_no_fitting_part_is_refused_in_one_line(path: str, said: str) -> None:
    wanted = f"tasks.breed.loss.kind: {said.format(here=os.getcwd())}"
    assert refusal(f"tasks.breed.loss.kind={path}") == wanted


def test_a_module_with_a_syntax_error_is_named() -> None:
    line = refusal("tasks.breed.loss.kind=mine.typo.Poly")
    assert line.startswith("tasks.breed.loss.kind: mine.typo cannot be imported: SyntaxError:")
    assert "typo.py, line 1" in line
    assert "\n" not in line


def test_an_argument_that_no_recipe_can_state_is_refused() -> None:
    line = refusal("tasks.breed.loss=mine.parts.Odd")
    assert line.startswith(
        "tasks.breed.loss.kind: expected arguments of mine.parts.Odd that a recipe can state"
    )
    assert "\n" not in line


@pytest.mark.parametrize(
    ("argument", "said"),
    [
        ("epsilom: 1", "tasks.breed.loss.epsilom: unknown key for kind mine.parts.Poly. Did you mean "
         "epsilon? Known keys: kind, epsilon, weights, mode."),
        ("epsilon: -1", "tasks.breed.loss.epsilon: expected a number >= 0, found -1. "
         "Leave it out for the default, 1.0."),
        ("weights: [1, x]", 'tasks.breed.loss.weights.1: expected a number, found "x".'),
        ("mode: sof", 'tasks.breed.loss.mode: expected one of soft, hard, found "sof". Did you mean soft?'),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_refused_as_one_of_a_built_in_part_is(argument: str, said: str) -> None:
    assert refusal(f"tasks.breed.loss={{kind: mine.parts.Poly, {argument}}}") == said


def test_a_misspelt_built_in_kind_is_answered_as_before() -> None:
    assert refusal("tasks.breed.loss.kind=focl") == (
        'tasks.breed.loss.kind: expected one of cross_entropy, focal or an import path, found "focl". '
        "Did you mean focal?"
    )


def test_a_slot_without_built_in_parts_wants_an_import_path() -> None:
    line = refusal("data.transforms=[{kind: fog}]")
    assert line == (
        "data.transforms.0.kind: expected an import path such as my_project.module.fog, found fog."
    )
    assert refusal("data.transforms=[3]").startswith("data.transforms.0: expected {kind: IMPORT.PATH")


def test_a_loss_for_another_number_of_outputs_is_refused(project: Path) -> None:
    text = MODULE.replace(
        "return output[:, 0]", "return output[:, 0]\n\n    denominators = Poly.denominators"
    )
    (project / "mine" / "parts.py").write_text(text)
    with pytest.raises(UserError) as caught:
        build_tasks(load("tasks.breed.loss=mine.parts.Half").tasks, INFOS)
    assert str(caught.value) == (
        "tasks.breed.loss: expected num_outputs 3 for classification of 3 classes, found 1. "
        "Correct it in Half."
    )


def test_an_own_balancer_weighs_the_tasks() -> None:
    adapter: TypeAdapter[BalanceSettings] = TypeAdapter(BalanceSettings)
    settings = adapter.validate_python({"method": "mine.parts.First", "first": 5.0})
    balancer = build_balancer(settings, list(INFOS), dict.fromkeys(INFOS, 1.0), dict.fromkeys(INFOS, 1.0))
    weights_T = balancer.weights(present_T=torch.tensor([True, True]), key=(0, 0))
    assert weights_T.tolist() == [5.0, 1.0]
    assert "level" not in type(settings).model_fields


SPECS = [HeadSpec("breed", "vector", 3), HeadSpec("lesion", "map", 1)]


def model_settings(*overrides: str) -> ModelSettings:
    return load(*overrides).model


def test_an_own_head_of_a_map_task_reads_the_maps() -> None:
    settings = model_settings("model.heads.lesion=mine.parts.Wide", "model.backbone=simple_cnn")
    model = build_model(settings, SPECS, 3, (32, 32))
    outputs = model(torch.zeros(2, 3, 32, 32))
    assert outputs["lesion"].shape == (2, 1, 8, 8)


def test_a_head_for_maps_is_refused_for_a_vector_task() -> None:
    settings = model_settings("model.heads.breed=mine.parts.Wide")
    with pytest.raises(
        UserError, match=r"model\.heads\.breed\.kind: expected num_features in place of channels"
    ):
        build_model(settings, SPECS, 3, (32, 32))


def test_a_network_that_cannot_be_traced_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"model\.backbone: expected a forward of mine\.parts\.Branching that"
    ):
        build_model(model_settings("model.backbone=mine.parts.Branching"), SPECS, 3, (32, 32))


def test_a_metric_that_keeps_lists_is_merged_also_where_a_rank_has_none() -> None:
    from torchmetrics.functional.classification import multiclass_calibration_error

    from mtl_dist.tasks.user_metrics import AllMetrics

    path = "torchmetrics.classification.MulticlassCalibrationError"
    task = build_tasks(load(f"tasks.breed.metrics.s={{kind: {path}, num_classes: 3}}").tasks, INFOS)["breed"]
    output, target = torch.randn(9, 3, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    ranks = [AllMetrics(task) for _ in range(3)]
    ranks[0].update(output, target, torch.zeros(9, dtype=torch.bool))
    ranks[1].update(output[:4], target[:4], torch.ones(4, dtype=torch.bool))
    ranks[2].update(output[4:], target[4:], torch.ones(5, dtype=torch.bool))

    def together(some: Sequence[AllMetrics]) -> dict[str, float]:
        own = [metrics.collected({}) for metrics in some]
        return some[0].values({name: [states for each in own for states in each[name]] for name in own[0]})

    assert together(ranks)["s"] == pytest.approx(multiclass_calibration_error(output.softmax(1), target, 3))
    assert together(ranks[:2])["s"] == ranks[1].compute()["s"]


def test_a_metric_may_not_have_the_name_of_another_figure() -> None:
    line = refusal("tasks.breed.metrics.accuracy=torchmetrics.SumMetric")
    assert line.startswith("tasks.breed.metrics.accuracy: expected another name")


def test_a_monitored_metric_that_does_not_say_its_direction_wants_a_mode() -> None:
    recipe = load("tasks.breed.metrics.s=torchmetrics.SumMetric", "monitor.metric=val/breed/s")
    with pytest.raises(UserError, match=r"monitor\.mode: expected min or max for val/breed/s"):
        _ = recipe.monitor_mode


def test_a_transform_that_changes_the_size_is_refused() -> None:
    from mtl_dist.data.transforms import PRESETS, Transform
    from mtl_dist.randomness import Draws

    own = load("data.transforms=[mine.parts.Cropping]").data.user_transforms(training=True)
    transform = Transform((8, 8), "stretch", PRESETS["none"], own)
    assert not transform.keeps((8, 8))
    with pytest.raises(UserError, match=r"data\.transforms: expected Cropping to keep the image \(3, 8, 8\)"):
        transform(torch.zeros(3, 8, 8, dtype=torch.uint8), {}, Draws(0))


def test_a_transform_may_say_what_size_it_makes() -> None:
    from mtl_dist.data.transforms import PRESETS, Transform
    from mtl_dist.randomness import Draws

    own = load("data.transforms=[{kind: mine.parts.Middle, side: 6}]").data.user_transforms(training=True)
    transform = Transform((8, 8), "stretch", PRESETS["none"], own)
    assert transform.output_size == (6, 6)
    image, masks = transform(
        torch.zeros(3, 8, 8, dtype=torch.uint8), {"ink": torch.zeros(8, 8, dtype=torch.uint8)}, Draws(0)
    )
    assert (image.shape, masks["ink"].shape) == ((3, 6, 6), (6, 6))


def test_a_transform_says_whether_evaluation_leaves_it_out() -> None:
    data = load("data.transforms=[mine.parts.Cropping, mine.parts.Sharper]").data
    names = [[type(step).__name__ for step in data.user_transforms(training)] for training in (True, False)]
    assert names == [["Cropping", "Sharper"], ["Sharper"]]
    assert [type(step.make()).__name__ for step in data.without_augmentation().transforms] == ["Sharper"]


def test_a_wrong_argument_of_an_importer_is_one_line(tmp_path: Path) -> None:
    from mtl_dist.importers import run

    with pytest.raises(
        UserError, match=r"^importer: expected a subclass of mtl_dist.importers.importer.Importer"
    ):
        run("mine.parts.Poly", tmp_path / "out")
