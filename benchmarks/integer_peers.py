"""OpenVINO and ONNX Runtime on the same integer layer: uint8 inputs, int8 weights with a scale a channel, one thread.

Both are optional (``pip install openvino onnxruntime onnx``). Their activations are divided by the scale in their own
way, so a few codes in a million may differ from ours.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import numpy as np
from torch import Tensor

from quantlab.packing.backends.integers import ConvGeometry, IntegerSite
from quantlab.packing.backends.reference import simulate

Peer = Callable[[], np.ndarray]
NOT_INSTALLED = "not installed"


def openvino_layer(site: IntegerSite, x: Tensor) -> Peer | str:
    """The layer as OpenVINO's int8 graph (a FakeQuantize of the input), or why there is none."""
    if find_spec("openvino") is None:
        return NOT_INSTALLED
    import openvino as ov
    from openvino import opset13 as ops

    (part,) = site.parts
    low, high = _range(site)
    parameter = ops.parameter(list(x.shape), np.float32)
    values = ops.fake_quantize(parameter, *(np.float32(end) for end in (low, high, low, high)), 256)
    weight = part.weight.numpy().astype(np.int8)
    column = part.scale.numpy().reshape(-1, *(1,) * (weight.ndim - 1))
    dequantized = ops.multiply(ops.convert(ops.constant(weight), np.float32), ops.constant(column))
    if site.geometry is None:
        product = ops.matmul(values, dequantized, False, True)
    else:
        places = site.geometry
        pads = list(places.padding)
        product = ops.convolution(values, dequantized, list(places.stride), pads, pads, list(places.dilation))
    assert site.bias is not None
    bias = site.bias.numpy().reshape(-1, *(1,) * (0 if site.geometry is None else 2))
    model = ov.Model([ops.add(product, ops.constant(bias))], [parameter])
    settings = {"INFERENCE_NUM_THREADS": 1, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    request = ov.Core().compile_model(model, "CPU", settings).create_infer_request()
    request.set_input_tensor(ov.Tensor(x.contiguous().numpy(), shared_memory=True))

    def run() -> np.ndarray:
        request.infer()
        return request.get_output_tensor().data

    return run


def onnxruntime_layer(site: IntegerSite, x: Tensor) -> Peer | str:
    """The layer in ONNX Runtime, or why there is none.

    A linear layer is QuantizeLinear, MatMulInteger, scale and bias, with float32 output as ours. A convolution is
    QuantizeLinear, QLinearConv and DequantizeLinear, so its output has 8 bits: ConvInteger, the operator that gives
    sums, is no fast path of the CPU provider (it was up to 4 times slower than float32), and no other gives float32.
    """
    if find_spec("onnxruntime") is None or find_spec("onnx") is None:
        return NOT_INSTALLED
    import onnxruntime
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = _matmul(site) if site.geometry is None else _convolution(site, site.geometry, x)
    graph = helper.make_graph(
        [helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["codes"]), *nodes],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, ["CPUExecutionProvider"])
    values = x.contiguous().numpy()
    return lambda: session.run(None, {"x": values})[0]


def _input_constants(site: IntegerSite) -> dict[str, np.ndarray]:
    grid = site.parts[0].grid
    return {
        "scale": grid.scale.numpy().reshape(()),
        "zero": grid.zero_point.numpy().astype(np.uint8).reshape(()),
        "weight": site.parts[0].weight.numpy().astype(np.int8),
    }


def _matmul(site: IntegerSite) -> tuple[list[Any], dict[str, np.ndarray]]:
    from onnx import TensorProto, helper

    (part,) = site.parts
    assert site.bias is not None
    constants = _input_constants(site)
    constants["weight"] = constants["weight"].T.copy()
    constants |= {"factor": (part.scale * part.grid.scale).numpy(), "bias": site.bias.numpy()}
    return [
        helper.make_node("MatMulInteger", ["codes", "weight", "zero"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "factor"], ["scaled"]),
        helper.make_node("Add", ["scaled", "bias"], ["y"]),
    ], constants


def _convolution(site: IntegerSite, places: ConvGeometry, x: Tensor) -> tuple[list[Any], dict[str, np.ndarray]]:
    from onnx import helper

    (part,) = site.parts
    assert site.bias is not None
    factor = part.scale * part.grid.scale
    low, high = (float(value) for value in simulate(site, x).aminmax())
    step = (high - low) / 255
    constants = _input_constants(site) | {
        "weight_scale": part.scale.numpy(),
        "weight_zero": np.zeros(len(part.scale), np.int8),
        "bias": (site.bias / factor).round().numpy().astype(np.int32),
        "output_scale": np.float32(step),
        "output_zero": np.uint8(round(-low / step)),
    }
    inputs = ["codes", "scale", "zero", "weight", "weight_scale", "weight_zero", "output_scale", "output_zero", "bias"]
    return [
        helper.make_node("QLinearConv", inputs, ["rounded"], strides=places.stride, pads=places.padding * 2),
        helper.make_node("DequantizeLinear", ["rounded", "output_scale", "output_zero"], ["y"]),
    ], constants


def _range(site: IntegerSite) -> tuple[float, float]:
    grid = site.parts[0].grid
    scale, zero_point = grid.scale.item(), grid.zero_point.item()
    return -zero_point * scale, (grid.quant_max - zero_point) * scale
