"""What every hook's class must return, checked where it returns it; the engine and ``quantlab.testing`` share this.

Each function says in its error what was expected and what came, and names the plugin, its method and the site.
"""

from __future__ import annotations

import traceback
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import ClassVar, Protocol, cast

import torch
from torch import Tensor

from quantlab.contracts.allocation import FLOAT_BITS, AllocationProblem, BitMap
from quantlab.contracts.correction import Correction
from quantlab.contracts.passes import SmoothingPass
from quantlab.contracts.quantizer import Quantizer
from quantlab.contracts.sampler import CalibrationPairs, CalibrationSampler, SamplerProblem
from quantlab.contracts.tuning import Loss, Tuner, TuneResult
from quantlab.errors import PluginError, QuantlabError, is_refusal


class Named(Protocol):
    """An object of a plugin's class.

    Attributes:
        name: what recipes call it.
    """

    name: ClassVar[str]


def place(kind: str, plugin: Named, method: str, site: str = "") -> str:
    """Where something went wrong: 'policy "omq", allocate, site conv_in'."""
    return f'{kind} "{plugin.name}", {method}' + (f", site {site}" if site else "")


def broken(kind: str, plugin: Named, method: str, what: str, got: object, expected: str, site: str = "") -> PluginError:
    """The error for a method that returned the wrong thing."""
    where = place(kind, plugin, method, site)
    return PluginError(what, where=where, got=got, allowed=expected, plugin=type(plugin))


@contextmanager
def plugin_call(kind: str, plugin: Named, method: str, site: str = "") -> Generator[None]:
    """Around a call of a plugin: what it raises becomes an error that names it; messages for a person pass through.

    Raises:
        PluginError: the plugin raised something else than a QuantlabError; the message has the line that did.
    """
    try:
        yield
    except QuantlabError:
        raise
    except Exception as error:
        if is_refusal(error):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise PluginError(
            "the plugin failed",
            where=place(kind, plugin, method, site),
            got=f"{type(error).__name__}: {' '.join(str(error).split())} ({frame.filename}:{frame.lineno})",
            next_step="the same command with -v shows the whole way there",
            plugin=type(plugin),
        ) from error


def check_bit_map(policy: Named, problem: AllocationProblem, bit_map: object) -> None:
    """A policy returns int8 bits for every channel of every site, and leaves alone what it was not asked about.

    Raises:
        PluginError: it does not.
    """

    def error(what: str, got: object, expected: str, site: str = "") -> PluginError:
        return broken("policy", policy, "allocate", what, got, expected, site)

    if not isinstance(bit_map, BitMap):
        raise error("a policy must return a quantlab.BitMap", shown(bit_map), "BitMap(weight_bits, activation_bits)")
    asked = {site.name for site in problem.sites}
    for name, given in problem.given.weight_bits.items():
        found: object = bit_map.weight_bits.get(name)
        if not isinstance(found, Tensor) or found.shape != given.shape:
            what = "a policy must return bits for every output channel"
            raise error(what, shown(found), f"a tensor {list(given.shape)}", name)
        if name not in asked and not torch.equal(found.to(given), given):
            what = "a policy changed a site it was not asked about"
            raise error(what, _widths(found), f"{_widths(given)}, as given", name)
        if name in asked and not bool(((found >= 1) & (found <= 8)).all()):
            raise error("bits must lie in 1..8", _widths(found), "1 to 8", name)
        if found.is_floating_point() or found.dtype is torch.bool:
            raise error("bits are integers", str(found.dtype), "torch.int8", name)
    for (name, slot), bits in problem.given.activation_bits.items():
        width: object = bit_map.activation_bits.get((name, slot))
        if type(width) is not int:
            what = f'a policy must return bits for the input "{slot}"'
            raise error(what, shown(width), "an int", name)
        if width != bits and (name not in asked or not 2 <= width <= 8):
            expected = "2 to 8" if name in asked else f"{bits}, as given"
            raise error(f'bits of the input "{slot}" must be allowed', width, expected, name)
    foreign = [name for name in bit_map.weight_bits if name not in problem.given.weight_bits]
    foreign += [name for name, _ in bit_map.activation_bits if name not in problem.given.weight_bits]
    if foreign:
        raise error("a policy returned bits for what is no site", foreign[0], "the sites that are given")


def check_scales(smoothing: SmoothingPass, scales: object, channels: int, site: str) -> None:
    """A pass returns a positive, finite scale for each input channel; raises PluginError."""
    if not isinstance(scales, Tensor) or scales.shape != (channels,):
        what, expected = "a pass must return one scale for each input channel", f"a tensor [{channels}]"
        raise broken("pass", smoothing, "scales", what, shown(scales), expected, site)
    if not bool((torch.isfinite(scales) & (scales > 0)).all()):
        got = f"between {float(scales.min())} and {float(scales.max())}"
        what = "smoothing scales must be positive and finite"
        raise broken("pass", smoothing, "scales", what, got, "above 0", site)


def check_quantized(quantizer: Quantizer, x: Tensor, quantized: object, site: str = "") -> None:
    """A quantizer returns the shape and dtype of its input, all of it finite; raises PluginError."""
    what = "a quantizer must return the shape and dtype of its input"
    if not isinstance(quantized, Tensor) or quantized.shape != x.shape or quantized.dtype != x.dtype:
        raise broken("quantizer", quantizer, "forward", what, shown(quantized), shown(x), site)
    if not bool(torch.isfinite(quantized).all()):
        what = "a quantizer must return finite values"
        raise broken("quantizer", quantizer, "forward", what, "NaN or infinity", "finite", site)


def check_loss(loss: Loss, value: object) -> Tensor | None:
    """The value of a loss: a 0-dim tensor of floats, or None; raises PluginError."""
    if value is None:
        return None
    if not isinstance(value, Tensor) or value.dim() != 0 or not value.is_floating_point():
        what = "a loss must return one number, or None where it has nothing to say"
        expected = "a 0-dim tensor of floats: reduce it with sum() or mean()"
        raise broken("loss", loss, "__call__", what, shown(value), expected)
    return value


def check_pairs(sampler: CalibrationSampler, problem: SamplerProblem, pairs: object) -> None:
    """A sampler returns recorded pairs within the budget, sorted and each once; raises PluginError."""

    def error(what: str, got: object, expected: str) -> PluginError:
        return broken("sampler", sampler, "choose", what, got, expected)

    if not isinstance(pairs, CalibrationPairs):
        raise error("a sampler must return quantlab.CalibrationPairs", shown(pairs), "CalibrationPairs(steps, samples)")
    for part in (pairs.steps, pairs.samples):
        if cast(object, part.dtype) is not torch.int64 or part.dim() != 1:
            raise error("steps and trajectories are indices", shown(part), "int64 [M]")
    sizes = (len(pairs.steps), len(pairs.samples))
    if sizes[0] != sizes[1] or not 1 <= sizes[0] <= problem.budget:
        what = "a sampler must return as many steps as trajectories, within the budget"
        raise error(what, f"{sizes[0]} steps, {sizes[1]} trajectories", f"1 to {problem.budget}")
    keys = pairs.steps * problem.num_samples + pairs.samples
    recorded = bool(((pairs.samples >= 0) & (pairs.samples < problem.num_samples)).all())
    recorded = recorded and bool(((pairs.steps >= 0) & (pairs.steps < len(problem.timesteps))).all())
    if not recorded or bool((keys.diff() <= 0).any()):
        what = "a sampler must return recorded pairs, sorted and each once"
        expected = f"steps below {len(problem.timesteps)}, trajectories below {problem.num_samples}"
        raise error(what, f"steps {_listed(pairs.steps)}, trajectories {_listed(pairs.samples)}", expected)


def check_fitted(correction: Correction, fitted: object) -> dict[str, Tensor]:
    """What a correction stores: tensors by name; raises PluginError."""
    given: object = fitted
    values = dict(cast(Mapping[object, object], fitted)) if isinstance(fitted, Mapping) else None
    if values is None or not all(isinstance(k, str) and isinstance(v, Tensor) for k, v in values.items()):
        what = "a correction must return what it stores as tensors by name"
        raise broken("correction", correction, "fit", what, shown(given), "a mapping of names to tensors")
    return cast(dict[str, Tensor], values)


def check_corrected(correction: Correction, prediction: Tensor, corrected: object) -> Tensor:
    """The corrected prediction, with the shape and dtype of the one that came; raises PluginError."""
    if not isinstance(corrected, Tensor) or corrected.shape != prediction.shape or corrected.dtype != prediction.dtype:
        what = "a correction must return the shape and dtype of the prediction"
        raise broken("correction", correction, "correct", what, shown(corrected), shown(prediction))
    return corrected


def check_tuned(tuner: Tuner, result: object) -> TuneResult:
    """What a tuner returns; raises PluginError."""
    if not isinstance(result, TuneResult):
        what = "a tuner must return a quantlab.TuneResult"
        raise broken("tuner", tuner, "tune", what, shown(result), 'TuneResult({"total": [...]})')
    for name, values in result.history.items():
        if not all(type(value) in (int, float) for value in values):
            what = f'the history "{name}" must hold plain numbers'
            raise broken("tuner", tuner, "tune", what, shown(list(values)), "floats: call item() on a tensor")
    return result


def check_metric(metric: Named, values: object) -> dict[str, float]:
    """What a metric returns: one or more numbers by name; raises PluginError, but leaves NaN to the caller."""
    given: object = values
    found = cast(dict[object, object], values) if isinstance(values, dict) else {}
    if not found or not all(isinstance(k, str) and type(v) in (int, float) for k, v in found.items()):
        what, expected = "a metric must return one or more numbers by name", '{"name": float}: call item() on a tensor'
        raise broken("metric", metric, "compute", what, shown(given), expected)
    return cast(dict[str, float], found)


def shown(value: object, limit: int = 120) -> str:
    """A value in a message: a tensor by dtype and shape, anything else by its type and the beginning of its text."""
    if isinstance(value, Tensor):
        return f"a tensor of {value.dtype} {list(value.shape)}"
    if value is None:
        return "None"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= limit else text[:limit] + '...'}"


def _listed(values: Tensor, limit: int = 8) -> str:
    rest = "..." if values.numel() > limit else ""
    return ", ".join(f"{float(value):g}" for value in values.flatten()[:limit]) + rest


def _widths(bits: Tensor) -> str:
    widths = sorted({float(width) for width in bits.flatten()})
    return "float" if widths == [FLOAT_BITS] else ", ".join(f"{width:g}" for width in widths)
