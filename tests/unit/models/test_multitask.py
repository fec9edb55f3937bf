"""The multi-task model: normalisation, features, parameters, freezing, names."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor

from mtl_dist.errors import UserError
from mtl_dist.models.building import build_model
from mtl_dist.models.describe import describe
from mtl_dist.models.multitask import MultitaskModel
from mtl_dist.models.settings import DecoderSettings, HeadSettings, ModelSettings
from mtl_dist.specs import HeadSpec

KIND, AGE, MASK = HeadSpec("kind", "vector", 3), HeadSpec("age", "vector", 1), HeadSpec("mask", "map", 2)
SMALL = ModelSettings(backbone="squeezenet1_1", norm="group")
SIMPLE = ModelSettings(backbone="simple_cnn")


def sharing(way: object, settings: ModelSettings = SMALL, **changes: object) -> ModelSettings:
    """The settings with another way of sharing."""
    return ModelSettings.model_validate({**settings.model_dump(), "sharing": way, **changes})


VARIANTS = [
    SMALL,
    sharing("separate"),
    SMALL.model_copy(update={"frozen": True}),
    SIMPLE,
    sharing("separate", SIMPLE),
]


def build(settings: ModelSettings, *specs: HeadSpec, channels: int = 3, size: int = 32) -> MultitaskModel:
    torch.manual_seed(0)
    return build_model(settings, specs or [KIND, AGE, MASK], channels, (size, size))


def images(channels: int = 3, size: int = 32, batch: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (batch, channels, size, size), generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("settings", VARIANTS)
def test_outputs_have_the_layouts_of_their_head_specs(settings: ModelSettings) -> None:
    outputs = build(settings)(images())
    assert {task: tuple(output.shape) for task, output in outputs.items()} == {
        "kind": (4, 3),
        "age": (4, 1),
        "mask": (4, 2, 32, 32),
    }
    assert all(output.dtype == torch.float32 for output in outputs.values())


def test_simple_cnn_for_digits_has_422_674_parameters() -> None:
    heads = [
        HeadSpec("digit", "vector", 10),
        HeadSpec("thickness", "vector", 5),
        HeadSpec("smooth", "vector", 3),
    ]
    model = build(ModelSettings(backbone="simple_cnn"), *heads, channels=1, size=28)
    assert sum(p.numel() for p in model.parameters()) == 422_674


@pytest.mark.parametrize("settings", VARIANTS)
def test_every_parameter_is_shared_or_of_exactly_one_task(settings: ModelSettings) -> None:
    model = build(settings)
    parts = [model.shared_parameters(), *(model.task_parameters(task) for task in ("kind", "age", "mask"))]
    ids = [id(parameter) for part in parts for parameter in part]
    assert len(ids) == len(set(ids))
    assert set(ids) == {id(parameter) for parameter in model.parameters()}
    assert bool(model.shared_parameters()) is (settings.sharing == "hard")


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_task_moves_its_own_parameters_and_the_shared_ones_only(settings: ModelSettings) -> None:
    model = build(settings)
    model(images())["kind"].square().sum().backward()
    moved = {id(p) for p in model.parameters() if p.grad is not None}
    trained = [p for p in [*model.task_parameters("kind"), *model.shared_parameters()] if p.requires_grad]
    assert moved <= {id(p) for p in trained}
    assert {id(p) for p in model.task_parameters("kind") if p.requires_grad} <= moved


@pytest.mark.parametrize("settings", [SMALL, ModelSettings(backbone="simple_cnn")])
def test_all_parameters_are_used_by_all_tasks_together(settings: ModelSettings) -> None:
    for specs in ([KIND], [MASK], [KIND, MASK]):
        model = build(settings, *specs)
        sum(output.square().sum() for output in model(images()).values()).backward()  # type: ignore[union-attr]
        assert [name for name, p in model.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize("settings", [SMALL, ModelSettings(backbone="simple_cnn")])
def test_gradients_at_the_features_carry_all_that_reaches_the_backbone(settings: ModelSettings) -> None:
    model = build(settings)
    features = model.features(images())
    outputs = model.heads_forward(features, (32, 32))
    loss = outputs["kind"].square().mean() + outputs["mask"].square().mean()
    shared = model.shared_parameters()
    direct = torch.autograd.grad(loss, shared, retain_graph=True)
    at_features = torch.autograd.grad(loss, list(features.values()), retain_graph=True)
    through = torch.autograd.grad(list(features.values()), shared, at_features)
    for a, b in zip(direct, through, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("settings", [SMALL, ModelSettings(backbone="simple_cnn")])
def test_gradients_at_the_features_stop_at_the_heads(settings: ModelSettings) -> None:
    model = build(settings)
    features = model.features(images())
    outputs = model.heads_forward(features, (32, 32))
    leaves = {name: feature.detach().requires_grad_() for name, feature in features.items()}
    cut_off = model.heads_forward(leaves, (32, 32))
    for task in ("mask", "kind"):
        found = torch.autograd.grad(
            outputs[task].square().sum(), list(features.values()), retain_graph=True, allow_unused=True
        )
        expected = torch.autograd.grad(cut_off[task].square().sum(), list(leaves.values()), allow_unused=True)
        for a, b in zip(found, expected, strict=True):
            assert (a is None and b is None) or torch.equal(a, b)


def test_vector_and_map_heads_meet_the_backbone_at_the_deepest_map() -> None:
    model = build(SMALL)
    assert model.feature_names("kind") == ("stride_16",)
    assert set(model.feature_names("kind")) < set(model.feature_names("mask"))
    assert set(model.features(images())) == set(model.feature_names("mask"))


def test_only_the_features_that_heads_read_are_given() -> None:
    assert list(build(SMALL, KIND, AGE).features(images())) == ["vector"]
    no_skips = SMALL.model_copy(update={"decoder": DecoderSettings(skips=False)})
    assert list(build(no_skips, MASK).features(images())) == ["stride_16"]
    simple = build(ModelSettings(backbone="simple_cnn"))
    assert set(simple.features(images())) == {"vector", "stride_1", "stride_2", "stride_4"}
    separate = build(sharing("separate"), KIND, AGE)
    assert list(separate.features(images())) == ["kind/vector", "age/vector"]


def test_separate_backbones_give_what_single_task_models_give() -> None:
    settings = sharing("separate")
    model = build(settings, KIND, AGE).eval()
    single = build(SMALL, KIND).eval()
    state = {
        name.replace("backbones.kind.", "backbone."): value
        for name, value in model.state_dict().items()
        if not name.startswith(("backbones.age", "heads.age"))
    }
    single.load_state_dict(state)
    torch.testing.assert_close(model(images())["kind"], single(images())["kind"])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_raw_images_are_normalised_and_keep_their_memory_format(dtype: torch.dtype) -> None:
    settings = ModelSettings(backbone="simple_cnn", mean=(10.0, 20.0, 30.0), std=(2.0, 4.0, 8.0))
    raw = images().to(memory_format=torch.channels_last).to(dtype)
    before = raw.clone()
    normalised = build(settings).normalise(raw)
    mean, std = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([2.0, 4, 8]).view(3, 1, 1)
    torch.testing.assert_close(normalised, (before.float() - mean) / std)
    assert normalised.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(raw, before)


def test_the_default_normalisation_is_imagenets_on_0_to_255() -> None:
    model = build(SMALL)
    torch.testing.assert_close(model.mean.flatten(), torch.tensor([0.485, 0.456, 0.406]) * 255)
    torch.testing.assert_close(model.std.flatten(), torch.tensor([0.229, 0.224, 0.225]) * 255)
    grey = build(SMALL, channels=1)
    assert grey.mean.flatten().tolist() == grey.std.flatten().tolist() == [127.5]


def test_one_mean_is_for_all_channels_and_a_wrong_number_is_refused() -> None:
    model = build(ModelSettings(backbone="simple_cnn", mean=(0.0,), std=(255.0,)), channels=5)
    assert model.std.flatten().tolist() == [255.0] * 5
    with pytest.raises(UserError, match=r"model.mean: expected 1 value or 3, one per channel, found 2"):
        build(ModelSettings(backbone="simple_cnn", mean=(0.0, 1.0)))


def test_images_of_other_channels_are_refused() -> None:
    with pytest.raises(UserError, match="expected 3 channels, as the model was built for, found 1"):
        build(SMALL)(images(channels=1))


def test_outputs_follow_autocast_and_the_parameters_type() -> None:
    model = build(SMALL)
    with torch.autocast("cpu", torch.bfloat16):
        assert {output.dtype for output in model(images()).values()} == {torch.bfloat16}
    assert {output.dtype for output in model.double()(images()).values()} == {torch.float64}
    assert {output.dtype for output in model.bfloat16()(images()).values()} == {torch.bfloat16}


@pytest.mark.parametrize("way", ["hard", "separate"])
def test_a_frozen_backbone_stays_as_it_is_while_heads_train(way: str) -> None:
    settings = sharing(way, ModelSettings(backbone="mobilenet_v3_small", frozen=True))
    model = build(settings, KIND, AGE)
    before = {
        name: value.clone() for name, value in model.state_dict().items() if name.startswith("backbone")
    }
    model.eval().train()
    assert model.heads.training
    first, second = model.features(images()), model.features(images())
    assert all(torch.equal(first[name], second[name]) for name in first)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1, weight_decay=0.1)
    sum(output.square().mean() for output in model(images()).values()).backward()  # type: ignore[union-attr]
    optimizer.step()
    assert all(torch.equal(model.state_dict()[name], value) for name, value in before.items())
    assert all(p.grad is not None for p in model.heads.parameters())


def test_frozen_batchnorm_makes_training_independent_of_the_batch() -> None:
    model = build(ModelSettings(norm="frozen", decoder=DecoderSettings(channels=(16, 16))))
    whole, part = model(images()), model(images()[:1])
    for task in whole:
        torch.testing.assert_close(whole[task][:1], part[task], rtol=1e-5, atol=1e-5)


def test_sync_batchnorm_reaches_backbone_and_decoder() -> None:
    model = build(ModelSettings(norm="sync"), KIND, MASK)
    kinds = {type(module).__name__ for module in model.modules() if "Norm" in type(module).__name__}
    assert kinds == {"SyncBatchNorm"}


def test_names_are_readable_and_do_not_depend_on_checkpointing() -> None:
    settings = ModelSettings(head=HeadSettings(hidden=(8,)))
    names = list(build(settings).state_dict())
    assert {"backbone.layer4.1.conv2.weight", "heads.kind.hidden.0.weight", "heads.kind.output.bias"} <= set(
        names
    )
    assert {name.split(".")[0] for name in names} == {"mean", "std", "backbone", "heads"}
    for mode in ("stage", "block"):
        assert list(build(settings.model_copy(update={"checkpointing": mode})).state_dict()) == names
    separate = build(sharing("separate", settings))
    assert "backbones.mask.layer1.0.conv1.weight" in separate.state_dict()


@pytest.mark.parametrize("settings", [SMALL, sharing("separate", SIMPLE)])
def test_a_copied_and_a_pickled_model_give_the_same(settings: ModelSettings) -> None:
    model = build(settings).eval()
    expected = model(images())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        found = other(images())
        assert all(torch.equal(found[task], expected[task]) for task in expected)


def test_the_same_seed_gives_the_same_weights() -> None:
    first, second = build(SMALL).state_dict(), build(SMALL).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_tasks_may_be_called_as_python_calls_its_own() -> None:
    model = build(SMALL, HeadSpec("type", "vector", 2), HeadSpec("values", "vector", 2))
    assert list(model(images())) == ["type", "values"]
    assert "heads.type.output.weight" in model.state_dict()
    assert len(model.task_parameters("values")) == 2
    pickle.loads(pickle.dumps(copy.deepcopy(model)))(images())


def test_no_tasks_and_names_with_dots_are_refused() -> None:
    with pytest.raises(UserError, match="expected at least one task"):
        build_model(SMALL, [], 3, (32, 32))
    with pytest.raises(UserError, match=r"name without a dot, found 'a\.b'"):
        build(SMALL, HeadSpec("a.b", "vector", 2))


@pytest.mark.parametrize("settings", [SMALL, ModelSettings(backbone="simple_cnn")])
def test_torch_export_gives_the_same_outputs_for_other_batch_sizes(settings: ModelSettings) -> None:
    model = build(settings).eval()
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(model, (images(),), dynamic_shapes=({0: batch},))
    found, expected = program.module()(images(batch=7)), model(images(batch=7))
    for task in expected:
        torch.testing.assert_close(found[task], expected[task], rtol=1e-5, atol=1e-5)


def test_the_description_tells_sizes_and_parameters_and_changes_nothing() -> None:
    model = build(SMALL)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = describe(model, (32, 32))
    lines = [" ".join(line.split()) for line in text.splitlines()]
    num_shared = sum(p.numel() for p in model.shared_parameters())
    assert lines[0].startswith("images: 3 x 32 x 32, mean 123.7/116.3/103.5")
    assert f"backbone: {num_shared:,} parameters" in lines
    assert "stride_16 512 x 1 x 1" in lines
    assert "head kind: 1,539 parameters, stride_16 -> 3" in lines
    assert lines[-1] == f"in all: {sum(p.numel() for p in model.parameters()):,} parameters"
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    frozen = describe(build(sharing("separate", frozen=True)), (32, 32))
    assert "of them frozen" in frozen
    assert "backbone of mask" in frozen


@pytest.mark.parametrize("memory_format", [torch.channels_last, torch.contiguous_format])
def test_images_lie_in_memory_as_the_weights_do(memory_format: torch.memory_format) -> None:
    model = build(SMALL)
    model.use_memory_format(memory_format)
    maps = [weight for weight in model.parameters() if weight.ndim == 4]
    assert maps and all(weight.is_contiguous(memory_format=memory_format) for weight in maps)
    for given in (torch.channels_last, torch.contiguous_format):
        images = torch.zeros(2, 3, 32, 32, dtype=torch.uint8).contiguous(memory_format=given)
        assert model.normalise(images).is_contiguous(memory_format=memory_format)


def test_compiling_in_place_renames_nothing() -> None:
    from mtl_dist.models.compiling import compile_parts

    model = build(SMALL)
    names = list(model.state_dict())
    compile_parts(model, torch.device("cpu"), recomputing=False)
    assert list(model.state_dict()) == names
    assert all(part._compiled_call_impl is not None for part in model.parts())


def test_a_machine_without_a_compiler_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_dist.models.compiling import compile_parts

    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match=r"train\.compile: expected a compiler .*found no-such-compiler"):
        compile_parts(build(SMALL), torch.device("cpu"), recomputing=False)
