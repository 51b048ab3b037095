"""The sections of a recipe: each a frozen pydantic model that forbids unknown keys.

They are the settings that cross from the recipe to the stages: a stage gets its own section, never the whole recipe.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Literal, cast

from pydantic import Field, SerializerFunctionWrapHandler, model_serializer, model_validator

from quantlab.contracts.config import Strict
from quantlab.contracts.quant import Observer

MAX_SEED = 2**62
"""Torch's generators take 64 bits; evaluation adds to its seed."""


class Choice(Strict):
    """A plugin by name, with its options. In YAML: ``name`` or ``{name: {option: value}}``."""

    name: str
    options: dict[str, object] = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _from_yaml(cls, value: object) -> object:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, dict):
            given = cast(dict[object, object], value)
            if len(given) == 1 and "name" not in given:
                ((name, options),) = given.items()
                return {"name": name, "options": options or {}}
            return given
        return value


class Model(Strict):
    """Which model. In YAML the options of its source stand beside the keys that every source has."""

    source: str = Field(default="builtin", description="the plugin that loads it")
    name: str = Field(default="", description="the model's name at that source")
    weights: str | None = Field(
        default=None,
        description="a file of other weights, from the working folder: .safetensors, or .pt, .pth, .ckpt of tensors",
    )
    options: dict[str, object] = Field(default_factory=dict, description="of the source, checked against its Config")

    @property
    def plugin(self) -> Choice:
        """The source with its options."""
        return Choice(name=self.source, options=self.options)

    @model_validator(mode="before")
    @classmethod
    def _gather_options(cls, value: object) -> object:
        if not isinstance(value, dict):
            return value
        given = cast(dict[object, object], value)
        own = {key: child for key, child in given.items() if key in cls.model_fields}
        others = {key: child for key, child in given.items() if key not in cls.model_fields}
        return {**own, "options": {**cast(dict[object, object], own.get("options", {})), **others}}

    @model_serializer(mode="wrap")
    def _spread_options(self, dump: SerializerFunctionWrapHandler) -> dict[str, object]:
        own: dict[str, object] = dump(self)
        options = cast(dict[str, object], own.pop("options", {}))
        return {**own, **options}


class Keep(Strict):
    """Sites with bits of their own, outside the budget."""

    match: str = Field(description="glob over site names")
    bits: Annotated[int, Field(ge=1, le=8)] | Literal["float"] = Field(description="of weights and activations")
    optional: bool = Field(default=False, description="a pattern that matches nothing is no error")


class Attention(Strict):
    """How the operands of attention's two products are quantized; the same for every method."""

    bits: int = Field(default=8, ge=2, le=8, description="of query, key and value")
    probability_bits: int = Field(default=8, ge=2, le=8, description="of the probabilities that the softmax gives")


class Products(Strict):
    """How the two operands of matrix products outside fused attention are quantized; the same for every method."""

    bits: int = Field(default=8, ge=2, le=8, description="of both operands")


class Embeddings(Strict):
    """How the tables of embeddings are quantized, a scale for each row; the same for every method."""

    bits: int = Field(default=8, ge=1, le=8, description="of every row")


class Budget(Strict):
    """What the sites that may be allocated may cost; everything that is given must hold."""

    weight_bits: int = Field(ge=1, le=8, description="parameter-weighted mean bits of the weights")
    activation_bits: int = Field(ge=2, le=8, description="bits of the activations")
    extra_bit_fraction: float = Field(default=0.0, ge=0, le=1, description="share of channels with one more bit")
    size_mb: float | None = Field(default=None, gt=0, description="MiB of the whole file, as the accounting counts it")
    bit_operations: float | None = Field(
        default=None, gt=0, description="in units of 10^9, of all sites in one forward at batch 1, float ones included"
    )
    activation_memory_mb: float | None = Field(
        default=None, gt=0, description="MiB of the inputs of all quantized sites at batch 1, each at its own bits"
    )


class Sampling(Strict):
    """How images are drawn, for calibration, tuning and evaluation alike."""

    scheduler: Literal["ddim", "flow-euler"] = Field(
        default="ddim", description="flow-euler is for networks that predict velocities, such as SD3 and Flux"
    )
    steps: int = Field(default=20, ge=1, le=1000)
    eta: float = Field(default=0.0, ge=0, le=1)
    guidance: float = Field(default=1.0, ge=0, description="1 is no classifier-free guidance")


class RecordedDtype(StrEnum):
    """What recorded floats are on disk."""

    NETWORK = "network"
    """As the network computes them."""
    FLOAT16 = "float16"
    """Half precision; they are the network's dtype again when they are read."""


class Calibrate(Strict):
    """What the float model is recorded on, and how much of it is in memory at once."""

    trajectories: int = Field(default=256, ge=1, description="float sampling trajectories recorded")
    samples: int = Field(
        default=16, ge=1, description="of them, how many give activation ranges and scores, at each step"
    )
    sampler: Choice | None = Field(
        default=None, description="chooses as many inputs another way; none: the first trajectories at every step"
    )
    batch: int | None = Field(
        default=None,
        ge=1,
        description="rows in one forward that records or measures, what sites see kept on disk; none: all, in memory",
    )
    dtype: RecordedDtype = Field(default=RecordedDtype.NETWORK, description="of recorded floats on disk")


class Weights(Strict):
    """How weights are quantized."""

    quantizer: Choice = Choice(name="affine")
    observer: Observer = Observer.MSE
    round_zero_point: bool = True


class Activations(Weights):
    """How the inputs of sites are quantized."""

    per_timestep: bool = Field(default=False, description="a scale for each calibrated timestep")
    share_start: bool = Field(default=False, description="all timesteps start from one range")


class InputsFrom(StrEnum):
    """What a site sees while its scales and bits are found."""

    TEACHER = "teacher"
    QUANTIZED_UPSTREAM = "quantized_upstream"


class Tune(Strict):
    """How quantizers and adapters are trained after assignment."""

    tuners: tuple[Choice, ...] = Field(default=(), description="one after the other; none: scales alone are found")
    iterations: int = Field(default=0, ge=0, description="optimizer steps; one is one denoising step of one batch")
    batch: int = Field(default=32, ge=1)
    rank: int = Field(default=32, ge=1, description="of the low-rank adapters")
    adapter_learning_rate: float | None = Field(default=None, gt=0, description="none: mean scale of the layer / 2500")
    weight_learning_rate: float = Field(default=1e-6, ge=0, description="of scales and zero points of weights")
    activation_learning_rate: float = Field(default=5e-4, ge=0, description="of scales and zero points of activations")
    losses: tuple[Choice, ...] = (Choice(name="mse"),)
    teacher_store_mib: float = Field(
        default=1024.0,
        ge=0,
        description="MiB of disk at most for the float model's features at every iteration, which all methods of a "
        "seed share; with more to keep, or 0, every iteration computes them; the numbers are the same",
    )

    def steps(self, share: float) -> int:
        """Optimizer steps of a stage that gets this share of the iterations: at least one, unless either is 0."""
        return max(1, round(share * self.iterations)) if share * self.iterations > 0 else 0


class ScaleType(StrEnum):
    """The type that scales are stored in."""

    FLOAT32 = "float32"
    FLOAT16 = "float16"

    @property
    def itemsize(self) -> int:
        """Bytes of one scale."""
        return {ScaleType.FLOAT32: 4, ScaleType.FLOAT16: 2}[self]


class FreeZeroPoints(StrEnum):
    """What becomes of zero points that are not integers, which no packed file holds."""

    REFUSE = "refuse"
    """The model stays as it is and is not packed."""
    ROUND = "round"
    """They are rounded before the model is evaluated."""


class Pack(Strict):
    """What the finished model is brought to before it is evaluated, so that the packed file is the evaluated model."""

    scales: ScaleType = Field(default=ScaleType.FLOAT32, description="float16 rounds the scales to it")
    free_zero_points: FreeZeroPoints = Field(
        default=FreeZeroPoints.REFUSE, description="of methods with round_zero_point: false"
    )


AS_IT_IS = Pack()
"""Nothing is changed for the file."""


class Features(StrEnum):
    """Which network gives the features that distances between sets of images are measured on."""

    JUDGE = "judge"
    """The task's own classifier."""
    INCEPTION = "inception"
    """Inception-v3 as FID is published with, through torch-fidelity."""


_METRICS = ("fid", "fid-to-teacher", "is", "precision-recall", "accuracy", "paired-error")


class Evaluate(Strict):
    """How the result is measured."""

    samples: int = Field(default=1000, ge=2)
    batch: int = Field(default=250, ge=1)
    metrics: tuple[Choice, ...] = tuple(Choice(name=name) for name in _METRICS)
    features: Features = Field(
        default=Features.JUDGE, description="the network of fid, sfid, is, kid, precision-recall"
    )
    inception_weights: str | None = Field(
        default=None, description="file of Inception's weights, from the working folder; none: torch hub's checkpoints"
    )
    noise_seed: int = Field(default=5, ge=0, le=MAX_SEED, description="of the initial noise; the same for every method")
    grid: int = Field(default=16, ge=0, description="images in the sample grid")
    bootstrap: int = Field(default=0, ge=0, description="resamples of the images for the interval of one seed; 0: none")

    @property
    def noise_seeds(self) -> tuple[int, int]:
        """Of the noise that every method draws from, and of the float images that FID to the teacher compares with."""
        return self.noise_seed, self.noise_seed + 1_000_003
