"""Finished networks through a file and back."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from toys import ToyTask, affine, make_toy, silent, split_toy

from quantlab.allocation.assign import AssignMethod, assign
from quantlab.allocation.cost import student_cost
from quantlab.allocation.plan import make_plan
from quantlab.allocation.student import Student, build_student, install_quantizers
from quantlab.allocation.uniform import UniformPolicy
from quantlab.calibration.collect import calibration_batch
from quantlab.contracts.allocation import FLOAT_BITS, BitMap
from quantlab.contracts.quant import Observer
from quantlab.contracts.sections import (
    Activations,
    Attention,
    Budget,
    FreeZeroPoints,
    InputsFrom,
    Pack,
    ScaleType,
    Weights,
)
from quantlab.errors import ArtefactError, NonFiniteError, PackError, QuantlabError
from quantlab.execution import execute
from quantlab.graph.capture import capture
from quantlab.graph.sites import find_sites
from quantlab.packing.file import PackedFile, read_packed, write_packed
from quantlab.packing.network import build_network, describe_network
from quantlab.packing.read import load_packed
from quantlab.packing.write import Finished, pack
from quantlab.stages.quantize import finalize_student
from quantlab.torchvision_shim import ensure_torchvision_imports


class Made:
    """A finished student with its task and bits."""

    def __init__(self, toy, choices=None, settings: Pack = Pack(), before=lambda student: None) -> None:  # noqa: B008
        self.task, self.student, self.settings = toy.task, toy.student(), settings
        method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices or affine(), InputsFrom.TEACHER)
        batch = calibration_batch(toy.task, toy.calibration, 8)
        self.bit_map = assign(self.student, method, batch, torch.Generator().manual_seed(0), silent)
        before(self.student)
        finalize_student(self.student, settings)

    def content(self) -> PackedFile:
        student = self.student
        layers, attentions = student.layers(), student.products()
        return pack(
            Finished(
                student.network,
                student.graph,
                layers,
                attentions,
                student.float_model,
                "timestep",
                scales=self.settings.scales,
            )
        )

    def saved(self, path: Path) -> Path:
        write_packed(path, self.content())
        return path

    def check(self, path: Path) -> None:
        """Equal bits on every path, and the accounting's size."""
        content, inputs = self.content(), self.task.example_inputs(5)
        write_packed(path, content)
        expected = self.student.run(inputs)
        for keep in (False, True):
            loaded = load_packed(path, network=self.task.network, keep_packed=keep)
            assert torch.equal(loaded.run(inputs), expected)
            for site, bits in self.bit_map.weight_bits.items():
                assert torch.equal(loaded.bit_map.weight_bits.get(site, bits), bits)
        cost = student_cost(self.student, self.bit_map, self.student.float_model)
        assert content.payload_bytes == cost.total_bytes
        header = int.from_bytes(path.read_bytes()[:8], "little")
        assert path.stat().st_size == 8 + header + cost.total_bytes


def mix(student: Student) -> None:
    """Give the channels of one layer 1 to 8 bits."""
    layer = student.layer("blocks.0.conv")
    quantizer = layer.weight_quantizer
    quantizer.bits = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, 3, 2, 1, 8], dtype=torch.int8)
    quantizer.observe(layer.float_weight())
    quantizer.freeze()


def test_mixed_widths_smoothing_and_tables_by_timestep(tmp_path: Path) -> None:
    def before(student: Student) -> None:
        mix(student)
        layer = student.layer("blocks.1.conv")
        layer.smoothing = torch.linspace(0.5, 3, 12)
        for found in (layer, student.layer("blocks.1.shift")):
            found.weight_quantizer.observe(found.float_weight())
            found.weight_quantizer.freeze()

    made = Made(make_toy(keep={"conv_in": 8}), before=before)
    made.bit_map.weight_bits["blocks.0.conv"].copy_(made.student.layer("blocks.0.conv").weight_quantizer.bits)
    made.check(tmp_path / "model.safetensors")


def test_float_layers_and_branches(tmp_path: Path) -> None:
    def before(student: Student) -> None:
        layer = student.layer("blocks.0.conv")
        layer.add_branch(2)
        layer.branch.fit(layer.float_weight())

    Made(make_toy(keep={"conv_out": FLOAT_BITS, "conv_in": 8}), before=before).check(tmp_path / "model.safetensors")


def test_parts_of_a_skip_concatenation(tmp_path: Path) -> None:
    Made(split_toy()).check(tmp_path / "model.safetensors")


class Attending(nn.Module):
    """A layer before attention."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.last = nn.Conv2d(1, 12, 1), nn.Conv2d(4, 1, 1)

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        query, key, value = self.layer(sample).flatten(2).mT[:, None].chunk(3, -1)
        found = F.scaled_dot_product_attention(query, key, value)
        return self.last(found[:, 0].mT.unflatten(2, sample.shape[2:]) + timestep.view(-1, 1, 1, 1))


def test_quantized_attention(tmp_path: Path) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = Outer().eval().requires_grad_(False)
    task = ToyTask(network)
    graph = capture(network, task.example_inputs(3), {})
    sites = find_sites(network, graph)
    plan = make_plan(sites, {}, Budget(weight_bits=3, activation_bits=8), attention=Attention(bits=6))
    rng = torch.Generator().manual_seed(1)
    calibration = task.calibrate(lambda inputs: network(**inputs), range(8), rng, silent)
    toy = replace(make_toy(), task=task, graph=graph, sites=sites, plan=plan, calibration=calibration)
    made = Made(toy)
    assert made.student.products()
    made.check(tmp_path / "model.safetensors")


class Outer(nn.Module):
    """Attention inside a module of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Attending()

    def forward(self, sample: torch.Tensor, timestep: torch.Tensor) -> torch.Tensor:
        return self.inner(sample, timestep)


def test_a_budget_counts_scales_and_zero_points_as_the_file_stores_them() -> None:
    stored = Pack(scales=ScaleType.FLOAT16, free_zero_points=FreeZeroPoints.ROUND)
    toy = make_toy()
    limit = Made(toy, settings=stored).content().payload_bytes
    for budget, fits in ((limit, True), (limit - 1, False)):
        plan = replace(toy.plan, budget=toy.plan.budget.model_copy(update={"size_mb": budget / 2**20}))
        student = build_student(toy.task, toy.graph, plan)
        choices = affine(Weights(round_zero_point=False), Activations(round_zero_point=False, per_timestep=True))
        method = AssignMethod([], [UniformPolicy(UniformPolicy.Config())], choices, InputsFrom.TEACHER, stored)
        batch, rng = calibration_batch(toy.task, toy.calibration, 8), torch.Generator().manual_seed(0)
        if fits:
            assign(student, method, batch, rng, silent)
            with pytest.raises(QuantlabError, match="more than the budget"):  # as float32 it would not fit
                assign(build_student(toy.task, toy.graph, plan), replace(method, stored=Pack()), batch, rng, silent)
        else:
            with pytest.raises(QuantlabError, match="more than the budget"):
                assign(student, method, batch, rng, silent)


def test_scales_of_float16_are_evaluated_counted_and_stored(tmp_path: Path) -> None:
    wide, narrow = Made(make_toy()), Made(make_toy(), settings=Pack(scales=ScaleType.FLOAT16))
    narrow.check(tmp_path / "model.safetensors")
    inputs = wide.task.example_inputs(3)
    assert not torch.equal(wide.student.run(inputs), narrow.student.run(inputs))
    costs = [student_cost(made.student, made.bit_map, made.student.float_model) for made in (wide, narrow)]
    assert costs[0].scale_bytes == 2 * costs[1].scale_bytes
    tensors = narrow.content().tensors
    assert tensors["scales.weight"].dtype == tensors["scales.input"].dtype == torch.float16

    def shrink(student: Student) -> None:
        student.layer("conv_in").weight_quantizer.scale.data.fill_(1e-8)

    with pytest.raises(NonFiniteError, match="float16"):
        Made(make_toy(), settings=Pack(scales=ScaleType.FLOAT16), before=shrink)


def test_free_zero_points_are_refused_or_rounded_before_evaluation(tmp_path: Path) -> None:
    free = affine(Weights(round_zero_point=False), Activations(per_timestep=True, round_zero_point=False))

    def train(student: Student) -> None:
        for layer in student.layers().values():
            layer.weight_quantizer.zero_point.data += 0.3

    refused = Made(make_toy(), free, before=train)
    with pytest.raises(PackError, match="free floats") as caught:
        refused.content()
    assert "free_zero_points: round" in (caught.value.next_step or "")
    rounded = Made(make_toy(), free, Pack(free_zero_points=FreeZeroPoints.ROUND), before=train)
    rounded.check(tmp_path / "model.safetensors")
    inputs = refused.task.example_inputs(3)
    assert not torch.equal(rounded.student.run(inputs), refused.student.run(inputs))


def test_formats_of_their_own_are_refused() -> None:
    def replace_quantizer(student: Student) -> None:
        student.layer("conv_in").weight_quantizer.qparams = lambda: None

    with pytest.raises(PackError, match="cannot be packed") as caught:
        Made(make_toy(), before=replace_quantizer).content()
    assert caught.value.where == "conv_in"

    def lie(student: Student) -> None:
        quantizer = student.layer("conv_in").weight_quantizer
        plain = quantizer.forward
        quantizer.forward = lambda x, timestep=None: plain(x) * 1.5

    with pytest.raises(PackError, match="are not what its scales and zero points say"):
        Made(make_toy(), before=lie).content()


@pytest.fixture(scope="module")
def made() -> Made:
    return Made(make_toy())


@pytest.fixture
def file(made: Made, tmp_path: Path) -> Path:
    return made.saved(tmp_path / "model.safetensors")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_a_truncated_file(made: Made, file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(ArtefactError, match="truncated"):
        load_packed(file, network=made.task.network)


def test_a_missing_or_foreign_file(made: Made, tmp_path: Path) -> None:
    with pytest.raises(ArtefactError):
        load_packed(tmp_path / "nothing.safetensors")
    save_file({"weight": torch.zeros(2)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ArtefactError, match="no packed model"):
        load_packed(tmp_path / "foreign.safetensors")


def rewrite(file: Path, **changes: str) -> None:
    with safe_open(file, "pt") as opened:
        metadata = dict(opened.metadata())
    save_file(load_file(file), file, {**metadata, **changes})


def test_a_newer_file(file: Path) -> None:
    rewrite(file, format_version="2")
    with pytest.raises(ArtefactError, match="newer version") as caught:
        load_packed(file)
    assert caught.value.got == "2"


def test_a_changed_description(file: Path) -> None:
    manifest = json.loads(safe_open(file, "pt").metadata()["manifest"])
    rewrite(file, manifest=json.dumps({**manifest, "dtype": "float64"}))
    with pytest.raises(ArtefactError, match="description is not what was written"):
        load_packed(file)


def test_a_changed_tensor_is_named(file: Path) -> None:
    content = bytearray(file.read_bytes())
    start = 8 + int.from_bytes(content[:8], "little")
    place = json.loads(content[8:start])["codes"]["data_offsets"][0]
    content[start + place] ^= 1
    file.write_bytes(content)
    with pytest.raises(ArtefactError, match='"codes" is not what was written'):
        load_packed(file)


def refuse(made: Made, path: Path, content: PackedFile, match: str) -> ArtefactError:
    """Written with fresh checksums, as by someone who wants it to be read."""
    write_packed(path, content)
    with pytest.raises(ArtefactError, match=match) as caught:
        load_packed(path, network=made.task.network)
    return caught.value


def test_tensors_that_do_not_fit_the_layout(made: Made, file: Path) -> None:
    content = read_packed(file)
    shorter = {**content.tensors, "codes": content.tensors["codes"][:-1]}
    refuse(made, file, replace(content, tensors=shorter), 'tensor "codes" does not fit')
    longer = {**content.tensors, "codes": torch.cat([content.tensors["codes"], torch.zeros(1, dtype=torch.uint8)])}
    refuse(made, file, replace(content, tensors=longer), 'tensor "codes" holds more')
    other = {**content.tensors, "scales.weight": content.tensors["scales.weight"].half()}
    refuse(made, file, replace(content, tensors=other), "scales.weight")


def test_a_width_that_nothing_packs(made: Made, file: Path) -> None:
    content = read_packed(file)
    site = content.layout.sites[0]
    wide = site.model_copy(update={"weight": site.weight.model_copy(update={"bits": 9})})
    layout = content.layout.model_copy(update={"sites": (wide, *content.layout.sites[1:])})
    refuse(made, file, replace(content, layout=layout), "description cannot be read")


def test_tensors_of_another_network(made: Made, file: Path) -> None:
    content = read_packed(file)
    floats = content.layout.floats[:-1]
    error = refuse(
        made, file, replace(content, layout=content.layout.model_copy(update={"floats": floats})), "not those"
    )
    assert error.got == "missing"
    with pytest.raises(ArtefactError, match="pass a module of the same structure"):
        load_packed(made.saved(file))


@pytest.mark.parametrize(
    ("op", "target"),
    [
        ("call_function", "os:system"),
        ("call_function", "builtins:eval"),
        ("call_function", "torch:load"),
        ("call_function", "torch:save"),
        ("call_function", "_operator:call"),
        ("call_function", "operator:attrgetter"),
        ("call_function", "op:aten.from_file.default"),
        ("call_function", "autograd:os:system"),
        ("call_function", "quantlab.graph.serialize:_import"),
        ("call_method", "numpy"),
        ("call_method", "__class__"),
        ("call_method", "tofile"),
        ("get_attr", 'x", __import__("os"), "'),
        ("placeholder", "x=print()"),
        ("call_module", "conv_in(1).weight"),
    ],
)
def test_a_graph_that_reaches_for_the_machine_is_not_run(made: Made, file: Path, op: str, target: str) -> None:
    content = read_packed(file)
    graph = json.loads(content.graph)
    graph["nodes"][1] |= {"op": op, "target": target}
    refuse(made, file, replace(content, graph=json.dumps(graph)), "not run")


def test_a_network_outside_diffusers_is_not_built(made: Made, file: Path) -> None:
    content = read_packed(file)
    for name in ("os", "_import_structure", "ConfigMixin", "DDPMPipeline", "Nothing"):
        network = {"class_name": name, "config": {}}
        manifest = content.manifest.model_validate({**content.manifest.model_dump(mode="json"), "network": network})
        write_packed(file, replace(content, manifest=manifest))
        with pytest.raises(ArtefactError, match="no model class of diffusers"):
            load_packed(file)


def unet(**config: object):
    ensure_torchvision_imports()
    from diffusers import UNet2DModel

    with torch.random.fork_rng():
        torch.manual_seed(0)
        return UNet2DModel(**config).eval().requires_grad_(False)  # type: ignore[arg-type]


TINY = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "block_out_channels": (8,),
    "down_block_types": ("DownBlock2D",),
    "up_block_types": ("UpBlock2D",),
}


def quantized_unet(network, size: int, bits: list[int], static: dict[str, object]) -> tuple[Student, BitMap]:
    """Min-max weights whose channels have these bits in turn, 8-bit inputs."""
    channels = network.config["in_channels"]
    inputs = {"sample": torch.zeros(2, channels, size, size), "timestep": torch.tensor([1, 5])}
    task = ToyTask(network, static=static)
    graph = capture(network, inputs, static)
    plan = make_plan(find_sites(network, graph), {}, Budget(weight_bits=4, activation_bits=8))
    student, bit_map = build_student(task, graph, plan), plan.nominal()
    for values in bit_map.weight_bits.values():
        values.copy_(torch.tensor(bits, dtype=torch.int8).repeat(-(-len(values) // len(bits)))[: len(values)])
    for entry in plan.layers:
        layer = student.layer(entry.site.name)
        install_quantizers(layer, entry, bit_map, affine(Weights(observer=Observer.MIN_MAX), Activations()))
        layer.weight_quantizer.observe(layer.weight)
        layer.weight_quantizer.freeze()
        layer.input_quantizer.scale.data.fill_(0.05)
        layer.input_quantizer.zero_point.data.fill_(128)
    return student, bit_map


def packed_unet(student: Student) -> PackedFile:
    parts = student.layers(), student.products(), student.float_model
    return pack(Finished(student.network, student.graph, *parts, "timestep"))


def test_a_new_process_and_a_pipeline_compute_the_same(tmp_path: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    network = unet(**TINY)
    student, _ = quantized_unet(network, 8, [3, 4, 5], {"return_dict": False})
    path = tmp_path / "model.safetensors"
    write_packed(path, packed_unet(student))
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    inputs = {"sample": sample, "timestep": torch.tensor([7, 900])}
    expected = student.run(inputs)
    save_file(inputs, tmp_path / "inputs.safetensors")
    script = (
        "import sys, torch; torch.set_num_threads(1); from safetensors.torch import load_file, save_file\n"
        "from quantlab import load_quantized\n"
        "folder = sys.argv[1]; model = load_quantized(folder + '/model.safetensors', keep_packed=True)\n"
        "found = model.run(load_file(folder + '/inputs.safetensors'))\n"
        "save_file({'found': found}, folder + '/found.safetensors')\n"
    )
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True)
    assert torch.equal(load_file(tmp_path / "found.safetensors")["found"], expected)

    pipeline = DDPMPipeline(unet(**TINY), DDPMScheduler())
    held = pipeline.unet
    assert load_packed(path).install(pipeline) is pipeline and pipeline.unet is held
    with torch.no_grad():
        assert torch.equal(pipeline.unet(sample, inputs["timestep"]).sample, expected)
        assert torch.equal(pipeline.unet(sample, inputs["timestep"], return_dict=False)[0], expected)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(num_inference_steps=2, output_type="np", generator=torch.Generator().manual_seed(0)).images
    assert images.shape == (1, 8, 8, 1)


def test_a_network_is_built_without_values() -> None:
    """Memory of weights that nothing has written is not used: the file brings them."""

    class Drawn(TorchDispatchMode):
        calls = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            Drawn.calls += func in (torch.ops.aten.uniform_.default, torch.ops.aten.normal_.default)
            return func(*args, **(kwargs or {}))

    record = describe_network(unet(**TINY))
    with Drawn():
        build_network(record, None, torch.float32)
        assert Drawn.calls == 0
        unet(**TINY)
        assert Drawn.calls > 0


@torch.no_grad()
def test_a_packed_file_in_integers(tmp_path: Path) -> None:
    """From codes to integers without the float weights; the module is called as the pipeline calls it."""
    student, _ = quantized_unet(unet(**TINY), 8, [3, 4, 5], {"return_dict": False})
    path = tmp_path / "model.safetensors"
    write_packed(path, packed_unet(student))
    sample = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([7, 900])
    outputs = []
    for keep_on_load, keep in ((True, True), (True, False), (False, False)):
        integer = execute(load_packed(path, keep_packed=keep_on_load), compiled=False, keep_packed=keep)
        assert all(entry.kernel != "simulated" for entry in integer.dispatch)
        outputs.append(integer.module(sample, timestep).sample)
    assert torch.equal(outputs[0], outputs[1]) and torch.equal(outputs[1], outputs[2])
    expected = student.run({"sample": sample, "timestep": timestep})
    assert (outputs[0] - expected).abs().max() <= 0.05 * expected.abs().max()


def test_the_cifar_unet_is_at_most_one_percent_above_its_bits(tmp_path: Path) -> None:
    """The configuration of google/ddpm-cifar10-32, a tenth of the channels at 3 bits and as many at 5."""
    network = unet(
        sample_size=32,
        block_out_channels=(128, 256, 256, 256),
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=None,
        downsample_padding=0,
        flip_sin_to_cos=False,
        freq_shift=1,
        norm_eps=1e-6,
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == 35_746_307
    student, bit_map = quantized_unet(network, 32, [3, 4, 4, 4, 4, 5, 4, 4, 4, 4], {"return_dict": False})
    cost = student_cost(student, bit_map, student.float_model)
    path = tmp_path / "model.safetensors"
    content = packed_unet(student)
    write_packed(path, content)
    assert content.payload_bytes == cost.total_bytes
    ideal = cost.weight_bytes + cost.float_bytes
    assert cost.weight_bytes / 1e6 == pytest.approx(35.69 / 2, rel=2e-3)
    assert path.stat().st_size <= 1.01 * ideal
    packed = load_packed(path, keep_packed=True)
    assert packed.loaded_bytes < 0.15 * student.float_model.total_bytes
