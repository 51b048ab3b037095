"""Every integer layer equals the float64 simulation on forced inputs, and its accumulators are exact."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F

from quantlab.contracts.quant import Observer, PerChannel, PerTensor, QuantSpec
from quantlab.packing.backends.activation import ActivationKernel, activation_kernel
from quantlab.packing.backends.dispatch import Backend, Kernel, dispatch_text, loaded_bytes, lower
from quantlab.packing.backends.integers import NotExecutable, integers_of
from quantlab.packing.backends.onednn import OneDnnProduct, int8_pieces, missing_operators
from quantlab.packing.backends.reference import accumulate, input_codes
from quantlab.packing.backends.triton_product import missing_triton
from quantlab.quant.layers import QuantizedConv2d, QuantizedLinear, to_quantized
from quantlab.quant.quantizers import AffineConfig, AffineQuantizer
from quantlab.quant.split import SplitQuantizer

TOLERANCE = 5e-7
PLAIN = ActivationKernel({})
BACKENDS = [Backend.REFERENCE] if missing_operators() else [Backend.REFERENCE, Backend.ONEDNN]
backends = pytest.mark.parametrize("backend", BACKENDS)
INT8 = [Backend.CUDA_INT8] if missing_triton() else [Backend.CUDA_INT8, Backend.TRITON]
"""A GPU's, here on the CPU; the kernel of the second in an interpreter."""
all_backends = pytest.mark.parametrize("backend", [*BACKENDS, *INT8])


def affine(bits: int | Tensor, *, per_timestep: bool = False, rounded: bool = True) -> AffineQuantizer:
    granularity = PerChannel(0) if isinstance(bits, Tensor) else PerTensor()
    spec = QuantSpec(granularity, Observer.MIN_MAX, per_timestep=per_timestep, round_zero_point=rounded)
    return AffineQuantizer(spec, bits, AffineConfig())


def quantized(
    layer: nn.Linear | nn.Conv2d,
    x: Tensor,
    rng: torch.Generator,
    *,
    bits: Tensor | None = None,
    input_bits: int = 8,
    timestep: Tensor | None = None,
) -> QuantizedLinear | QuantizedConv2d:
    """A layer with mixed bits, quantizers fitted to its weight and to x."""
    for parameter in layer.parameters():
        parameter.data = torch.randn(parameter.shape, generator=rng) + 0.3
    made = to_quantized(layer).requires_grad_(False).eval()
    out = layer.weight.shape[0]
    made.weight_quantizer = affine(torch.randint(1, 9, (out,), generator=rng) if bits is None else bits)
    made.weight_quantizer.observe(made.weight)
    made.weight_quantizer.freeze()
    made.input_quantizer = affine(input_bits, per_timestep=timestep is not None)
    made.input_quantizer.observe(x, timestep)
    made.input_quantizer.freeze()
    return made


def float64(layer: QuantizedLinear | QuantizedConv2d, x: Tensor, timestep: Tensor | None = None) -> Tensor:
    """The layer's own quantized values, multiplied in float64; written without the code under test."""
    values, weight = layer.quantized_input(x, timestep).double(), layer.quantized_weight().double()
    bias = None if layer.bias is None else layer.bias.double()
    if isinstance(layer, QuantizedLinear):
        return F.linear(values, weight, bias)
    return F.conv2d(values, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)


def check(layer, x: Tensor, backend: Backend, timestep: Tensor | None = None) -> None:
    lowered = lower(nn.ModuleDict({"layer": layer}), backend, PLAIN)
    assert lowered.dispatch[0].kernel is not Kernel.SIMULATED, lowered.dispatch[0].why
    expected = float64(layer, x, timestep)
    found = lowered.network["layer"](x, timestep)
    assert found.shape == expected.shape and found.dtype == torch.float32
    # The quantized values that ``float64`` multiplies are rounded to float32 themselves: one more rounding each.
    assert (found - expected).abs().max() <= TOLERANCE * expected.abs().max()


shapes = st.tuples(
    st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(1, 3), st.integers(1, 2), st.integers(0, 2),
    st.integers(1, 2), st.integers(1, 2), st.integers(0, 2**20),
)  # fmt: skip


@given(shapes)
@settings(max_examples=25, deadline=None)
def test_convolutions_of_mixed_widths(shape: tuple[int, ...]) -> None:
    batch, inputs, outputs, kernel, stride, padding, dilation, groups, seed = shape
    rng = torch.Generator().manual_seed(seed)
    size = dilation * (kernel - 1) + 1 + stride
    x = torch.randn(batch, inputs * groups, size, size + 1, generator=rng)
    layer = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups)
    made = quantized(layer, x, rng)
    for backend in [*BACKENDS, Backend.CUDA_INT8] if groups == 1 else BACKENDS:
        if backend is Backend.ONEDNN and padding > dilation * (kernel - 1):
            (entry,) = lower(nn.ModuleDict({"layer": made}), backend, PLAIN).dispatch
            assert entry.kernel is Kernel.SIMULATED and "nothing but padding" in entry.why
        else:
            check(made, x, backend)


@given(st.integers(1, 40), st.integers(1, 20), st.integers(1, 8), st.booleans(), st.integers(0, 2**20))
@settings(max_examples=25, deadline=None)
def test_linear_layers_of_mixed_widths(inputs: int, outputs: int, input_bits: int, bias: bool, seed: int) -> None:
    rng = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 3, inputs, generator=rng)
    made = quantized(nn.Linear(inputs, outputs, bias), x, rng, input_bits=input_bits)
    for backend in [*BACKENDS, Backend.CUDA_INT8]:
        check(made, x, backend)


@given(shapes)
@settings(max_examples=15, deadline=None)
def test_reference_accumulators_are_exact(shape: tuple[int, ...]) -> None:
    batch, inputs, outputs, kernel, stride, padding, dilation, groups, seed = shape
    rng = torch.Generator().manual_seed(seed)
    size = dilation * (kernel - 1) + 1 + stride
    x = torch.randn(batch, inputs * groups, size, size, generator=rng)
    layer = nn.Conv2d(inputs * groups, outputs * groups, kernel, stride, padding, dilation, groups)
    site = integers_of(quantized(layer, x, rng))
    (part,) = site.parts
    codes, _, zero_point = input_codes(part, x, None)
    centred = codes.int() - zero_point
    found = accumulate(centred, part.weight, site.geometry)
    # Integers below 2^53 are exact in float64.
    expected = F.conv2d(centred.double(), part.weight.double(), None, stride, padding, dilation, groups)
    assert found.dtype == torch.int32
    assert torch.equal(found.double(), expected)
    assert found.abs().max() <= part.accumulator_bound


def test_accumulators_of_the_integer_product_of_torch() -> None:
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(32, 40, generator=rng)
    bits = torch.full((16,), 7)
    (part,) = integers_of(quantized(nn.Linear(40, 16), x, rng, bits=bits, input_bits=7)).parts
    codes, _, zero_point = input_codes(part, x, None)
    # 7-bit codes fit int8 as they are; the zero point is taken out through the sum of the weights.
    total = torch._int_mm(codes.to(torch.int8), part.weight.to(torch.int8).t().contiguous())
    corrected = total - zero_point * part.weight.int().sum(1)
    assert torch.equal(corrected, accumulate(codes.int() - zero_point, part.weight, None))


@pytest.mark.skipif(bool(missing_operators()), reason=missing_operators() or "oneDNN is there")
def test_accumulators_of_onednn_are_exact() -> None:
    """With scale 1 and sums below 2^24 the operator's float32 output is its accumulator."""
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(2, 8, 6, 6, generator=rng)
    site = integers_of(quantized(nn.Conv2d(8, 5, 3, padding=1), x, rng, bits=torch.tensor([1, 2, 4, 7, 7])))
    (part,) = site.parts
    assert part.accumulator_bound < 2**24
    codes, _, zero_point = input_codes(part, x, None)
    product = OneDnnProduct.of(part, None, site.geometry)
    plain = OneDnnProduct(product.packed, torch.ones(5), None, site.geometry)
    expected = accumulate(codes.int() - zero_point, part.weight, site.geometry)
    assert torch.equal(plain(codes, 1.0, zero_point[0].item()), expected.float())


@backends
@pytest.mark.parametrize("low", [-0.5, 2.0, -3.0])
def test_zero_points_outside_the_codes(backend: Backend, low: float) -> None:
    """A padded border is exactly 0 even where no code stands for 0."""
    rng = torch.Generator().manual_seed(1)
    x = torch.rand(2, 4, 5, 5, generator=rng) + low
    made = quantized(nn.Conv2d(4, 3, 3, padding=2), x, rng)
    quantizer = made.input_quantizer
    quantizer.scale.fill_(1 / 255)
    quantizer.zero_point.fill_(round(-low * 255))
    check(made, x, backend)


@all_backends
def test_a_batch_of_several_timesteps(backend: Backend) -> None:
    rng = torch.Generator().manual_seed(2)
    timestep = torch.tensor([901, 1, 301, 301, 1])
    x = torch.randn(5, 4, 6, 6, generator=rng) * (1 + timestep.float() / 300).view(-1, 1, 1, 1)
    made = quantized(nn.Conv2d(4, 6, 3, 2, 1), x, rng, timestep=timestep, input_bits=4)
    # Between stored timesteps the nearest counts, as in the simulation.
    check(made, x, backend, timestep + torch.tensor([0, 40, 0, 140, 200]))
    check(made, x, backend, torch.full((5,), 500))


@all_backends
@pytest.mark.parametrize("conv", [True, False], ids=["conv", "linear"])
def test_split_inputs_smoothing_and_branch(backend: Backend, conv: bool) -> None:
    rng = torch.Generator().manual_seed(3)
    x = torch.randn(3, 7, 5, 5, generator=rng) if conv else torch.randn(3, 5, 7, generator=rng)
    made = quantized(nn.Conv2d(7, 4, 3, padding=1) if conv else nn.Linear(7, 4), x, rng)
    made.smoothing = torch.rand(7, generator=rng) + 0.5
    weights = SplitQuantizer([affine(torch.tensor([2, 3, 4, 8])) for _ in range(2)], (3, 4), 1)
    inputs = SplitQuantizer([affine(4), affine(4)], (3, 4), 1 if conv else -1)
    for quantizer, value in ((weights, made.float_weight()), (inputs, made.smoothed_input(x))):
        quantizer.observe(value)
        quantizer.freeze()
    made.weight_quantizer, made.input_quantizer = weights, inputs
    check(made, x, backend)
    made.add_branch(2)
    for factor in (made.branch.A, made.branch.B):
        factor.data = torch.randn(factor.shape, generator=rng)
    lowered = lower(nn.ModuleDict({"layer": made}), backend, PLAIN)
    assert "a low-rank product in float" in lowered.dispatch[0].why
    expected = float64(made, x) + made._apply_branch(made.smoothed_input(x), made.branch)
    found = lowered.network["layer"](x)
    # The branch is a float32 product, as in the simulation.
    assert (found - expected).abs().max() <= 2e-6 * expected.abs().max()


def test_int8_pieces_add_up_with_one_sign() -> None:
    weight = torch.arange(-255, 255, dtype=torch.int16)
    first, rest, *_ = pieces = int8_pieces(weight)
    assert torch.equal(sum(piece.short() for piece in pieces), weight)
    assert (first.short() * rest.short() >= 0).all()
    assert len(int8_pieces(weight[127:382])) == 1


def test_bound_of_the_accumulator() -> None:
    rng = torch.Generator().manual_seed(4)
    x = torch.randn(2, 4, generator=rng)
    made = quantized(nn.Linear(4, 2), x, rng, bits=torch.tensor([3, 3]))
    made.input_quantizer.zero_point.fill_(-(2**28))
    with pytest.raises(NotExecutable, match="more than int32 holds"):
        integers_of(made)


def two_layers(rng: torch.Generator) -> nn.ModuleDict:
    x = torch.randn(2, 6, generator=rng)
    bits = torch.tensor([3, 4, 5])
    return nn.ModuleDict({name: quantized(nn.Linear(6, 3), x, rng, bits=bits) for name in ("changed", "kept")})


def free_zero_points(layer: QuantizedLinear) -> None:
    layer.weight_quantizer = affine(torch.tensor([3, 4, 5]), rounded=False)
    layer.weight_quantizer.observe(layer.weight)
    layer.weight_quantizer.freeze()
    layer.weight_quantizer.zero_point.add_(0.25)


def own_rounding(layer: QuantizedLinear) -> None:
    class Floor(AffineQuantizer):
        name = "floor"

        def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
            return super().forward(x - 0.5 * self.scale, timestep)

    layer.input_quantizer.__class__ = Floor


@all_backends
@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda layer: setattr(layer, "weight_quantizer", None), "its weight stays float"),
        (lambda layer: setattr(layer, "input_quantizer", None), "its input stays float"),
        (free_zero_points, "zero points of its weight are free floats"),
        (own_rounding, '"floor" of its input rounds in its own way'),
        (lambda layer: layer.double(), "it computes in float64, not in float32"),
        (lambda layer: layer.bfloat16(), "it computes in bfloat16, not in float32"),
    ],
    ids=["float weight", "float input", "free zero points", "own rounding", "float64", "bfloat16"],
)
def test_what_is_not_exact_stays_simulated(backend: Backend, change, why: str) -> None:
    network = two_layers(torch.Generator().manual_seed(5))
    change(network["changed"])
    lowered = lower(network, backend, PLAIN)
    changed, kept = lowered.dispatch
    assert changed.kernel is Kernel.SIMULATED and why in changed.why
    assert kept.kernel is not Kernel.SIMULATED and not kept.why
    x = torch.randn(4, 6, dtype=network["changed"].weight.dtype)
    assert torch.equal(lowered.network["changed"](x), network["changed"](x))
    assert why in dispatch_text(lowered.dispatch)


def test_a_machine_without_the_operators(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.packing.backends.onednn._OPERATORS", ("qlinear_of_tomorrow",))
    lowered = lower(two_layers(torch.Generator().manual_seed(6)), Backend.ONEDNN, PLAIN)
    assert [entry.why for entry in lowered.dispatch] == ["this torch has no qlinear_of_tomorrow"] * 2


def test_a_machine_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quantlab.packing.backends.triton_product.find_spec", lambda name: None)
    lowered = lower(two_layers(torch.Generator().manual_seed(6)), Backend.TRITON, PLAIN)
    assert all(entry.kernel is Kernel.SIMULATED and "quantlab[gpu]" in entry.why for entry in lowered.dispatch)


def test_a_layer_on_another_device() -> None:
    network = two_layers(torch.Generator().manual_seed(6))
    network["changed"].to("meta")
    changed, kept = lower(network, Backend.ONEDNN if Backend.ONEDNN in BACKENDS else Backend.REFERENCE, PLAIN).dispatch
    assert changed.why == "it is on meta, and this backend computes on cpu"
    assert kept.kernel is not Kernel.SIMULATED


def test_what_a_gpu_backend_pays_is_told() -> None:
    rng = torch.Generator().manual_seed(6)
    x = torch.randn(1, 4, 5, 5, generator=rng)
    layers = {
        "kernel of 3": nn.Conv2d(4, 3, 3),
        "kernel of 1": nn.Conv2d(4, 3, 1),
        "grouped": nn.Conv2d(4, 4, 3, groups=2),
    }
    network = nn.ModuleDict({name: quantized(layer, x, rng) for name, layer in layers.items()})
    lowered = lower(network, Backend.CUDA_INT8, PLAIN)
    three, one, grouped = lowered.dispatch
    assert three.kernel is Kernel.CUDA_INT8 and three.why == "a convolution through its patches"
    assert one.kernel is Kernel.CUDA_INT8 and not one.why
    assert grouped.kernel is Kernel.SIMULATED and "grouped" in grouped.why


@pytest.mark.parametrize("wrong", ["noise", "saturated", "refusal"])
def test_a_wrong_kernel_is_found_out(monkeypatch: pytest.MonkeyPatch, wrong: str) -> None:
    def call(self: OneDnnProduct, codes: Tensor, scale: float, zero_point: int) -> Tensor:
        right = plain(self, codes, scale, zero_point)
        if wrong == "refusal":
            raise RuntimeError("could not create a primitive descriptor")
        return right.clamp(max=0.9 * right.max().item()) if wrong == "saturated" else right * (1 + 1e-6)

    if missing_operators():
        pytest.skip(missing_operators())
    plain = OneDnnProduct.__call__
    monkeypatch.setattr(OneDnnProduct, "__call__", call)
    lowered = lower(two_layers(torch.Generator().manual_seed(7)), Backend.ONEDNN, PLAIN)
    expected = "refuses it: could not" if wrong == "refusal" else "its kernel is off by"
    assert all(entry.kernel is Kernel.SIMULATED and expected in entry.why for entry in lowered.dispatch)


def test_no_float_weight_is_held() -> None:
    rng = torch.Generator().manual_seed(8)
    x = torch.randn(2, 128, generator=rng)
    made = quantized(nn.Linear(128, 128), x, rng, bits=torch.full((128,), 4))
    for backend, share in ((Backend.ONEDNN, 0.30), (Backend.REFERENCE, 0.55)):
        if backend in BACKENDS:
            lowered = lower(nn.ModuleDict({"layer": made}), backend, PLAIN)
            assert not dict(lowered.network.state_dict())
            weight = lowered.network["layer"].weight
            assert weight.shape == (128, 128) and weight.dtype == torch.float32 and weight.isnan().all()
            assert loaded_bytes(lowered.network) < share * 4 * 128 * 128


def test_codes_of_the_compiled_quantizer() -> None:
    """A compiler or none: the codes are those of the simulation, on ties too."""
    scale, zero_point, quant_max = torch.tensor(0.037), torch.tensor(11.0), torch.tensor(15.0)
    x = (torch.arange(-64, 64).repeat(1024) / 4 * scale).view(2, 64, 32, 32)
    expected = torch.round(x / scale).add(11).clamp(0, 15)
    for layout in (torch.contiguous_format, torch.channels_last):
        codes = activation_kernel()(x.contiguous(memory_format=layout), scale, zero_point, quant_max)
        assert codes.dtype == torch.uint8 and torch.equal(codes.float(), expected)


@backends
@pytest.mark.parametrize("kind", ["conv", "linear", "split"])
def test_layers_that_stay_packed_give_the_same_bits(backend: Backend, kind: str) -> None:
    rng = torch.Generator().manual_seed(9)
    x = torch.randn(3, 8, 5, 5, generator=rng) if kind == "conv" else torch.randn(3, 5, 8, generator=rng)
    bits = torch.tensor([1, 2, 3, 4, 5, 8])
    made = quantized(nn.Conv2d(8, 6, 3, padding=1) if kind == "conv" else nn.Linear(8, 6), x, rng, bits=bits)
    if kind == "split":
        made.weight_quantizer = SplitQuantizer([affine(bits), affine(bits)], (3, 5), 1)
        made.weight_quantizer.observe(made.weight)
        made.weight_quantizer.freeze()
    network = nn.ModuleDict({"layer": made})
    packed, unpacked = lower(network, backend, PLAIN, keep_packed=True), lower(network, backend, PLAIN)
    assert "unpacked at every call" in packed.dispatch[0].why
    assert torch.equal(packed.network["layer"](x), unpacked.network["layer"](x))


def test_what_packed_layers_hold() -> None:
    rng = torch.Generator().manual_seed(10)
    x = torch.randn(2, 128, generator=rng)
    made = quantized(nn.Linear(128, 128), x, rng, bits=torch.tensor([3, 4, 4, 5] * 32))
    lowered = lower(nn.ModuleDict({"layer": made}), BACKENDS[-1], PLAIN, keep_packed=True)
    codes, channels, table = 128 * 128 // 2, 128 * (1 + 4 + 4 + 4), 12
    assert loaded_bytes(lowered.network) == codes + channels + table
