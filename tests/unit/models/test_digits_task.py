"""The tasks of the zoo's models and a user's own module."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from quantlab.contracts.sections import Model, Sampling
from quantlab.errors import ModelError, RecipeError
from quantlab.models.builtin import BuiltinConfig, BuiltinSource, BuiltinTask
from quantlab.models.module import ModuleTask
from quantlab.zoo import digits, models
from quantlab.zoo.denoiser import noise_schedule
from quantlab.zoo.models import DENOISERS, JUDGES, VISION, load_denoiser, weights_path


def load(name: str = "digits", **sampling: object) -> BuiltinTask:
    source = BuiltinSource(BuiltinConfig())
    return source.load(Model(name=name), Sampling(**sampling), torch.device("cpu"), torch.float32)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def task() -> BuiltinTask:
    return load(steps=4)


def run_of(task: BuiltinTask):
    return lambda inputs: task.network(**inputs, **task.static)[0]


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_guidance_is_one_doubled_call(name: str) -> None:
    guided, plain = load(name, steps=4, guidance=1.5), load(name, steps=4)
    inputs = guided.example_inputs(3)
    doubled = guided.network_inputs(inputs)
    assert len(doubled["sample"]) == 6 and doubled["class_labels"][:3].tolist() == [10] * 3
    with torch.no_grad():
        found = guided.predict(run_of(guided), inputs)
        conditional = run_of(plain)(inputs)
        unconditional = run_of(plain)({**inputs, "class_labels": torch.full((3,), 10)})
    torch.testing.assert_close(found, unconditional + 1.5 * (conditional - unconditional), rtol=1e-4, atol=1e-5)
    assert inputs["class_labels"].tolist() == [0, 1, 2], "the samples' own labels are not changed"


@pytest.mark.parametrize("name", ["digits", "shapes"])
def test_calibration_is_the_trajectory(name: str) -> None:
    task = load(name, steps=4)
    data = task.calibrate(run_of(task), range(3), torch.Generator().manual_seed(0), lambda done, total: None)
    assert data.outputs.shape == (4, 3, *task.data.image_shape)
    assert data.inputs["timestep"][:, 0].tolist() == [751, 501, 251, 1]
    for index in range(3):
        after = task.schedule.step(index, data.outputs[index], data.inputs["sample"][index])
        torch.testing.assert_close(after, data.inputs["sample"][index + 1])


def test_training_data_are_scans_with_noise(task: BuiltinTask) -> None:
    batch = task.training_batch(400, torch.Generator().manual_seed(3))
    again = task.training_batch(400, torch.Generator().manual_seed(3))
    assert all(torch.equal(value, again.inputs[name]) for name, value in batch.inputs.items())
    signal = noise_schedule()[batch.inputs["timestep"]].view(-1, 1, 1, 1).double()
    clean = (batch.inputs["sample"].double() - (1 - signal).sqrt() * batch.target.double()) / signal.sqrt()
    images, labels = digits.load_images()
    low = batch.inputs["timestep"] < 700  # beyond, little of the image is left
    distance = torch.cdist(clean[low].flatten(1), images.flatten(1).double())
    nearest, index = distance.min(1)
    assert nearest.max() < 1e-3
    given = batch.inputs["class_labels"]
    named = given[low] != task.data.num_classes
    assert torch.equal(given[low][named], labels[index][named])
    assert 0.05 < (given == task.data.num_classes).float().mean() < 0.16
    with torch.no_grad():
        error = (run_of(task)(batch.inputs) - batch.target).square().mean()
    assert error < 0.2, "what the denoiser was trained to predict"


def test_noise_of_an_image_does_not_depend_on_the_number(task: BuiltinTask) -> None:
    assert torch.equal(task.draw_noise(10, 3)[:4], task.draw_noise(4, 3))


def test_an_image_with_added_noise_does_not_depend_on_its_batch() -> None:
    sampling = Sampling(steps=3, eta=1.0)
    task = BuiltinSource(BuiltinConfig()).load(Model(name="digits"), sampling, torch.device("cpu"), torch.float32)
    noise, labels = task.draw_noise(6, 1), task.labels(6)

    def draw(part: slice) -> torch.Tensor:
        return task.sample(lambda inputs: inputs["sample"] * 0.3, noise[part], labels[part], range(10, 16)[part])

    whole = draw(slice(6))
    assert torch.equal(torch.cat([draw(slice(2)), draw(slice(2, 6))]), whole)
    assert not torch.equal(whole[0] - whole[1], noise[0] - noise[1])


@pytest.mark.parametrize("name", list(DENOISERS))
def test_shipped_models_draw_what_is_asked_for(name: str) -> None:
    task = load(name, steps=10)
    labels = task.labels(100)
    images = task.sample(run_of(task), task.draw_noise(100, 1), labels, range(100))
    accuracy = (task.judge(images)[1].argmax(1) == labels).float().mean()
    assert accuracy > 0.9


@pytest.mark.parametrize(("name", "identity"), [("digits", "b862943a1c5df010"), ("digits-heavy", "a34133999fa7a209")])
def test_results_of_earlier_versions_stay_comparable(name: str, identity: str) -> None:
    assert BuiltinSource(BuiltinConfig()).identity(Model(name=name)) == identity
    reference = load(name).reference()
    assert (reference.name, reference.digest) == ("digits: load_digits, 1797 images", "d0031ffed2225fd9")


def test_the_reference_of_shapes_is_one_set_of_drawn_images() -> None:
    first, second = load("shapes").reference(), load("shapes", steps=4).reference()
    assert first.features.shape == (5000, 64) and torch.equal(first.features, second.features)
    assert first.digest == second.digest and first.name == "shapes: 5000 images of seed 5000"


def test_features_of_the_reference_are_computed_once(task: BuiltinTask) -> None:
    assert task.reference() is task.reference()


def test_only_the_heavy_model_has_heavy_tails() -> None:
    medians = {}
    for name in ("digits", "digits-heavy"):
        values = []
        for path, module in load_denoiser(DENOISERS[name]).named_modules():
            if isinstance(module, nn.Conv2d | nn.Linear) and path.count(".") >= 2:
                rows = module.weight.detach().flatten(1)
                centred = rows - rows.mean(1, keepdim=True)
                values.append(centred.pow(4).mean(1) / rows.std(1).pow(4))
        medians[name] = torch.cat(values).quantile(0.9).item()
    assert medians["digits"] < 4 < 8 < medians["digits-heavy"]


def test_unknown_names_offer_the_nearest() -> None:
    with pytest.raises(RecipeError, match='did you mean "digits-heavy"'):
        load("digit-heavy")


@pytest.mark.parametrize(
    ("damage", "told"),
    [
        ("truncated", "cannot be read"),
        ("missing", "cannot be read"),
        ("foreign", "of another model"),
        ("shape", "of another model\n  got: the first that differs is conv_in.bias"),
        ("more", "of another model\n  got: the first that differs is extra"),
        ("nan", "hold NaN or infinity\n  got: conv_in.weight"),
    ],
)
def test_damaged_weights_say_so(damage: str, told: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    file, sound = tmp_path / "digits.safetensors", load_file(weights_path("digits"))
    changes = {
        "shape": {"conv_in.bias": torch.zeros(3)},
        "more": {"extra": torch.zeros(3)},
        "nan": {"conv_in.weight": sound["conv_in.weight"] * torch.nan},
    }
    if damage == "truncated":
        file.write_bytes(weights_path("digits").read_bytes()[:5000])
    elif damage == "foreign":
        save_file({"other": torch.zeros(3)}, file)
    elif damage != "missing":
        save_file({**sound, **changes[damage]}, file)
    monkeypatch.setattr(models, "weights_path", lambda name: file)
    with pytest.raises(ModelError, match=told) as error:
        load()
    assert str(file) in str(error.value)


@pytest.mark.parametrize("name", ["own.safetensors", "own.pt", "nested.ckpt"])
def test_weights_of_ones_own_are_read_and_change_the_identity(name: str, tmp_path) -> None:
    state = load_file(weights_path("digits"))
    state["conv_in.bias"] = state["conv_in.bias"] + 1
    file = tmp_path / name
    if name.endswith(".safetensors"):
        save_file(state, file)
    else:
        torch.save({"state_dict": state, "epoch": 3} if "nested" in name else state, file)
    source, model = BuiltinSource(BuiltinSource.Config()), Model(name="digits", weights=str(file))
    task = source.load(model, Sampling(), torch.device("cpu"), torch.float32)
    torch.testing.assert_close(task.network.conv_in.bias, state["conv_in.bias"].float(), rtol=0, atol=0)
    assert source.identity(model) != source.identity(Model(name="digits"))


class Sly:
    """Unpickling it would run code."""

    def __reduce__(self) -> tuple:
        return (open, ("ran", "w"))


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("sly.ckpt", {"state_dict": {"a": Sly()}}, "nothing else is unpickled"),
        ("list.pt", [1, 2], "no state dict"),
        ("noise.pt", b"no checkpoint at all", "nothing else is unpickled"),
        ("empty.ckpt", b"", "cannot be read"),
        ("weights.bin", b"", "of this kind are not read"),
    ],
)
def test_a_checkpoint_of_anything_but_tensors_is_refused(
    name: str, content: object, told: str, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    if isinstance(content, bytes):
        (tmp_path / name).write_bytes(content)
    else:
        torch.save(content, tmp_path / name)
    with pytest.raises(ModelError, match=told) as error:
        BuiltinSource(BuiltinSource.Config()).load(
            Model(name="digits", weights=name), Sampling(), torch.device("cpu"), torch.float32
        )
    assert name in str(error.value)
    assert not (tmp_path / "ran").exists()


def test_weights_are_small() -> None:
    sizes = {file.stem: file.stat().st_size for file in weights_path("digits").parent.glob("*.safetensors")}
    assert sizes.keys() == DENOISERS.keys() | JUDGES.keys() | VISION.keys()
    assert sum(size for name, size in sizes.items() if name.startswith("digits")) < 6e6
    assert sum(size for name, size in sizes.items() if name.startswith("shapes")) < 8e6


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return self.layer(x) * t[:, None]


def test_batches_are_named_by_the_forward() -> None:
    task = ModuleTask(Net(), [(torch.ones(2, 3), torch.ones(2)), (torch.zeros(1, 3), torch.ones(1))])
    assert task.timestep_input == "t"
    assert {name: len(value) for name, value in task.example_inputs(5).items()} == {"x": 5, "t": 5}


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no batch"),
        ([(torch.ones(2, 3),)], "does not fit"),
        ([{"x": torch.ones(2, 3)}, {"t": torch.ones(2)}], "same inputs"),
        ([(torch.ones(2, 3), torch.ones(3))], "dimension 0"),
        ([(torch.ones(2, 3), torch.ones(2)), (torch.ones(2, 4), torch.ones(2))], "more than their size"),
        ([(torch.ones(0, 3), torch.ones(0))], "no batch"),
        (torch.ones(2, 3), "a list of batches\n  got: Tensor"),
        (None, "a list of batches"),
        ([3], "does not fit"),
        ([{"x": torch.ones(2, 3), "t": 3}], "must be a tensor\n  got: {'t': 'int'}"),
        ([(torch.ones(2, 7), torch.ones(2))], r"fails on the batches: RuntimeError: (.|\n)*x torch.float32 \[2, 7\]"),
        ([(torch.ones(2, 3).double(), torch.ones(2))], "fails on the batches"),
        ([{"x": torch.ones(2, 3)}], "fails on the batches: TypeError"),
        ([{"x": torch.ones(2, 3), "t": torch.ones(2), "z": torch.ones(2)}], "fails on the batches: TypeError"),
    ],
)
def test_bad_batches(batches: list, message: str) -> None:
    with pytest.raises(ModelError, match=message):
        ModuleTask(Net().eval(), batches)


def test_what_is_no_module_or_returns_no_tensor_is_told() -> None:
    class Silent(Net):
        def forward(self, x, t):
            return {"out": super().forward(x, t)}

    batches = [(torch.ones(2, 3), torch.ones(2))]
    with pytest.raises(ModelError, match=r"no torch\.nn\.Module"):
        ModuleTask(lambda x, t: x, batches)  # type: ignore[arg-type]
    with pytest.raises(ModelError, match=r"must return a tensor(.|\n)*got: dict"):
        ModuleTask(Silent().eval(), batches)


def test_a_module_has_no_training_data() -> None:
    task = ModuleTask(nn.Linear(2, 2), [torch.zeros(1, 2)])
    with pytest.raises(ModelError, match="no training data"):
        task.training_batch(4, torch.Generator())
