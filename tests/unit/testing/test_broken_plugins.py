"""The kit itself: plugins that break one part of a contract fail that check, with the right words."""

from __future__ import annotations

import itertools
import math
import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from pydantic import BaseModel, Field
from torch import Tensor

from quantlab import (
    OUTPUT,
    BitMap,
    CalibrationPairs,
    Correction,
    CorrectionData,
    ImageMetric,
    Method,
    SampleSet,
    Strict,
    Tuner,
    TuneResult,
    draw_pairs,
)
from quantlab.allocation.smoothing import SmoothPass
from quantlab.allocation.uniform import UniformPolicy
from quantlab.contracts.sampler import CalibrationSampler
from quantlab.losses.mse import MseLoss
from quantlab.quant.quantizers import AffineQuantizer
from quantlab.testing import ContractError, check, checks_of, conformance, subject_of

calls = itertools.count()


class Empty(Strict):
    """No options."""


class Silent(Strict):
    """An option without a word."""

    depth: int = 1


class Loose(BaseModel):
    """Takes anything."""

    depth: int = Field(default=1, description="levels")


class Needy(Strict):
    """Has no default."""

    depth: int = Field(description="levels")


def policy(allocate: Callable, **attributes: object) -> type:
    return type("Own", (UniformPolicy,), {"allocate": allocate, "__doc__": "Own.", **attributes})


def bits_of(problem, value: int, dtype: torch.dtype = torch.int8) -> BitMap:
    own = {site.name: torch.full((site.out_channels,), value).to(dtype) for site in problem.sites}
    return BitMap({**problem.given.weight_bits, **own}, problem.given.activation_bits)


def by_chance(self, problem):
    bits = {site.name: torch.randint(1, 2, (site.out_channels,)).to(torch.int8) for site in problem.sites}
    return BitMap({**problem.given.weight_bits, **bits}, problem.given.activation_bits)


def every_site(self, problem):
    return BitMap({k: torch.ones_like(v) for k, v in problem.given.weight_bits.items()}, problem.given.activation_bits)


def in_place(self, problem):
    for site in problem.sites:
        problem.given.weight_bits[site.name].fill_(1)
    return problem.given


def by_turns(self, problem):
    return bits_of(problem, 1 + next(calls) % 2)


def mixed(self, problem):
    found = bits_of(problem, problem.budget.weight_bits)
    for site in problem.sites:
        found.weight_bits[site.name][0] = 1
    return found


def failing(self, *arguments):
    raise ZeroDivisionError("no sites")


class Quantizer(AffineQuantizer):
    """A quantizer to be broken."""


def quantizer(**methods: object) -> type:
    return type("Own", (Quantizer,), methods)


def forward(change: Callable[[Tensor], Tensor]) -> Callable:
    return lambda self, x, timestep=None: change(AffineQuantizer.forward(self, x, timestep))


class Shared(Quantizer):
    """Keeps what it sees in the class."""

    seen: list = []  # noqa: RUF012

    def observe(self, x: Tensor, timestep: Tensor | None = None) -> None:
        self.seen.append((x.detach(), timestep))
        self._seen = list(self.seen)


class Hidden(Quantizer):
    """Keeps a factor outside its state."""

    factor = 1.0

    def freeze(self) -> None:
        super().freeze()
        self.factor = 2.0

    def forward(self, x: Tensor, timestep: Tensor | None = None) -> Tensor:
        return self.factor * super().forward(x, timestep)


class Heavy(Quantizer):
    """Stores a table that nobody counts."""

    def __init__(self, *arguments: object) -> None:
        super().__init__(*arguments)  # type: ignore[arg-type]
        self.register_buffer("table", torch.zeros(99))


def loss(call: Callable, **methods: object) -> type:
    return type("Own", (MseLoss,), {"__call__": call, "__doc__": "Own.", **methods})


def error_of(student, teacher) -> Tensor:
    return (student[OUTPUT] - teacher[OUTPUT]).float().square()


def counting(self, student, teacher, step):
    self.count = getattr(self, "count", 0) + 1
    return self.count * error_of(student, teacher).sum()


class Sampler(CalibrationSampler):
    """A sampler to be broken."""

    name = "own"
    Config = Empty

    def __init__(self, config: Empty) -> None:
        self.config = config

    def choose(self, problem):
        counts = torch.bincount(torch.randint(0, len(problem.timesteps), (1,)), minlength=len(problem.timesteps))
        return draw_pairs(counts, problem)


class Greedy(Sampler):
    """Takes everything."""

    def choose(self, problem):
        steps = torch.arange(len(problem.timesteps))
        return CalibrationPairs(
            steps.repeat_interleave(problem.num_samples), torch.arange(problem.num_samples).repeat(len(steps))
        )


class Stateful(Correction):
    """Keeps the bias in the object."""

    name = "own"
    Config = Empty

    def __init__(self, config: Empty) -> None:
        self.bias = torch.zeros(())

    def fit(self, data: CorrectionData):
        self.bias = (data.quantized_predictions - data.float_predictions).mean()
        return {"bias": self.bias}

    def correct(self, fitted, index, prediction):
        return (prediction - self.bias).to(prediction.dtype)


class Wide(Stateful):
    """Returns float64, and a negative variance."""

    def correct(self, fitted, index, prediction):
        return prediction.double()

    def variance(self, fitted, step, variance):
        return -1.0


class Breaking(Tuner):
    """A tuner to be broken."""

    name = "own"
    Config = Empty

    def __init__(self, config: Empty) -> None:
        self.config = config

    def tune(self, job):
        for layer in job.layers.values():
            layer.set_float_weight(torch.full_like(layer.weight, math.nan))
        return TuneResult({"total": [0.0]})


class Forgetful(Breaking):
    """Takes what it saved for done, and does not take it back."""

    def tune(self, job):
        if job.checkpoint.load():
            return TuneResult({"total": [0.0]})
        for layer in job.layers.values():
            layer.set_float_weight(1.01 * layer.weight)
            job.checkpoint.save(1, {name: each.weight for name, each in job.layers.items()})
        return TuneResult({"total": [0.0]})


class Chancy(Breaking):
    """Draws from torch's own generator, and returns a dict."""

    def tune(self, job):
        torch.randn(1)
        return TuneResult({"total": [0.0]})


class Tensors(Breaking):
    """Its history holds tensors."""

    def tune(self, job):
        return TuneResult({"total": [torch.ones(())]})  # type: ignore[list-item]


class Paired(ImageMetric):
    """A metric that looks at the float images and does not say so."""

    name = "own"
    Config = Empty

    def __init__(self, config: Empty) -> None:
        self.config = config

    def compute(self, samples: SampleSet):
        return {"own": (samples.images - samples.teacher_images).square().mean().item()}


class Raw(Paired):
    """Returns a tensor."""

    def compute(self, samples: SampleSet):
        return {"own": samples.images.mean()}


class Source:
    """A source that returns no task."""

    name = "own"
    version = 1
    Config = Empty
    models = ("one",)

    def __init__(self, config: Empty) -> None:
        self.config = config

    def load(self, model, sampling, device, dtype):
        return torch.nn.Linear(1, 1)

    def identity(self, model):
        return str(next(calls))


def method(**fragment: object) -> Method:
    return Method("own", "Own", None, True, fragment, "own.yaml")


good = UniformPolicy.allocate
BROKEN = [
    (policy(good, name="My Policy"), "has_a_name", "`name` is a word in lower case"),
    (policy(good, version="1"), "says_what_it_is", "`version` is a whole number"),
    (policy(good, __doc__=""), "says_what_it_is", "first line of its docstring"),
    (policy(good, paper=2023), "says_what_it_is", "`paper` is a text, or None"),
    (policy(good, Config=Silent), "explains_its_options", "every option has a description"),
    (policy(good, Config=Loose), "explains_its_options", "subclass of quantlab.Strict"),
    (policy(good, Config=Needy), "is_built_from_its_options", "its Config accepts the options"),
    (policy(lambda self, p: None), "returns_bits_for_every_channel", "must return a quantlab.BitMap"),
    (policy(lambda self, p: bits_of(p, 9)), "returns_bits_for_every_channel", "bits must lie in 1..8"),
    (policy(lambda self, p: bits_of(p, 2, torch.float32)), "returns_bits_for_every_channel", "bits are integers"),
    (policy(lambda self, p: BitMap({}, {})), "returns_bits_for_every_channel", "bits for every output channel"),
    (policy(failing), "returns_bits_for_every_channel", "ZeroDivisionError: no sites"),
    (policy(lambda self, p: bits_of(p, 8)), "keeps_the_budget", "mean bits of the weights are at most"),
    (policy(every_site), "leaves_other_sites_alone", "changed a site it was not asked about"),
    (policy(in_place), "leaves_other_sites_alone", "never the given tensors"),
    (policy(by_chance), "repeats_itself", "never from torch's own"),
    (policy(by_turns), "repeats_itself", "it keeps nothing between calls"),
    (policy(lambda s, p: bits_of(p, 4), between_sites=lambda s: True), "sees_what_it_needs", "keeps `problem.limits`"),
    (policy(mixed, mixes=False), "tells_whether_it_mixes", "says so in `mixes`"),
    (policy(lambda self, p: bits_of(p, 1)), "tells_whether_it_mixes", "`lowest_bits` are the lowest"),
    (quantizer(forward=forward(lambda x: x[:1])), "keeps_shape_and_dtype", "shape and dtype of its input"),
    (quantizer(forward=forward(lambda x: x.double())), "keeps_shape_and_dtype", "shape and dtype of its input"),
    (quantizer(forward=lambda s, x, timestep=None: x), "has_no_more_levels_than_bits", "has at most"),
    (quantizer(forward=forward(lambda x: 0.7 * x)), "is_idempotent", "quantizing what is quantized changes nothing"),
    (quantizer(forward=forward(lambda x: 0.7 * x)), "lies_on_the_grid_that_it_stores", "with whole q"),
    (quantizer(forward=forward(torch.detach)), "passes_gradients_straight_through", "does not require grad"),
    (
        quantizer(forward=forward(lambda x: x.detach() + 2 * (x - x.detach()))),
        "passes_gradients_straight_through",
        "1 inside",
    ),
    (Hidden, "survives_its_state", "bit for bit"),
    (Shared, "keeps_nothing_between_lives", "nothing is shared between objects"),
    (Heavy, "counts_what_it_stores", "`extra_bytes` counts what is stored"),
    (quantizer(extra_bytes=lambda self: -1), "counts_what_it_stores", "a whole number from 0"),
    (quantizer(from_spec=classmethod(failing)), "quantizes_something", "or refuses with a RecipeError"),
    (loss(lambda self, s, t, step: error_of(s, t)), "returns_one_number", "must return one number"),
    (loss(lambda self, s, t, step: None), "returns_one_number", "has something to say"),
    (loss(lambda self, s, t, step: error_of(s, t).sum() / 0), "returns_one_number", "finite"),
    (loss(MseLoss.__call__, taps=lambda self, sites: ("nowhere",)), "names_its_taps", "module paths of the network"),
    (loss(counting), "repeats_itself", "after `load({})` and `reset()` it is as new"),
    (loss(counting), "remembers_in_its_state", "goes on as that would have"),
    (loss(lambda self, s, t, step: error_of(s, t).sum()), "obeys_its_weight", "weight multiplies the loss"),
    (
        type("P", (SmoothPass,), {"scales": lambda s, w, x: x}),
        "returns_a_scale_for_each_channel",
        "positive and finite",
    ),
    (
        type("P", (SmoothPass,), {"scales": lambda s, w, x: x[:0]}),
        "returns_a_scale_for_each_channel",
        "one scale for each",
    ),
    (
        type("P", (SmoothPass,), {"scales": lambda s, w, x: w.mul_(2)}),
        "repeats_itself",
        "it keeps nothing between calls",
    ),
    (Sampler, "chooses_recorded_pairs", "never from torch's own"),
    (Greedy, "chooses_recorded_pairs", "within the budget"),
    (Stateful, "keeps_all_in_what_it_stores", "keeps nothing in the object"),
    (Wide, "corrects_predictions", "shape and dtype of the prediction"),
    (Wide, "corrects_the_variance", "not below 0"),
    (Breaking, "trains_in_place", "stays finite"),
    (Chancy, "repeats_itself", "never from torch's own"),
    (Forgetful, "goes_on_after_a_kill", "goes on from `job.checkpoint`"),
    (Tensors, "does_nothing_without_iterations", "must hold plain numbers"),
    (Paired, "says_what_it_looks_at", "says so in `paired`"),
    (Raw, "measures_images", "call item() on a tensor"),
    (Source, "loads_a_task", "returns a quantlab.Task"),
    (method(budgets={}), "makes_a_recipe", "it sets only"),
    (method(allocate=["nothing-like-it"]), "makes_a_recipe", 'there is no policy "nothing-like-it"'),
]


@pytest.mark.parametrize(("plugin", "part", "words"), BROKEN, ids=[f"{part}-{words}" for _, part, words in BROKEN])
def test_a_broken_plugin_is_told_what_it_breaks(plugin: object, part: str, words: str) -> None:
    subject = subject_of(plugin)
    found = next(check for check in checks_of(subject.kind) if check.__name__ == part)
    with pytest.raises(ContractError) as caught:
        found(subject)
    assert words in str(caught.value)
    assert "breaks its contract" in str(caught.value) and "\n  got: " in str(caught.value)


def test_check_runs_every_part() -> None:
    check(SmoothPass, {"alpha": 0.25})
    with pytest.raises(ContractError, match="positive and finite"):
        check(type("P", (SmoothPass,), {"scales": lambda self, w, x: -x, "__doc__": "Own."}))


def test_what_is_no_plugin_is_told() -> None:
    for other in (int, 3, object()):
        with pytest.raises(ContractError, match="is no plugin"):
            subject_of(other)


test_the_two_lines_that_a_plugin_needs = conformance(SmoothPass)


def test_without_hypothesis_the_kit_says_what_to_install() -> None:
    script = "import sys; sys.modules['hypothesis'] = None; import quantlab.testing"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "quantlab.testing needs hypothesis: pip install 'quantlab[test]'" in done.stderr
