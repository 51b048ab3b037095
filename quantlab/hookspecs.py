"""The hooks: the manual of a plugin's author.

A plugin is a Python package with an entry point in the group ``quantlab`` that names its module::

    [project.entry-points.quantlab]
    mymethod = "quantlab_mymethod"

The module holds functions marked with ``@quantlab.hookimpl`` and named as below. Each returns classes; a recipe chooses
among them by their ``name``, and the engine calls the class it chose. The functions run when a name of their kind is
first looked up, so heavy imports belong inside them: listing methods then stays fast.

Every class has

- ``name``: how recipes call it, in lower case with dashes;
- ``Config``: a ``quantlab.Strict`` model of its options, checked when the recipe or the command line that chooses it
  is read;
- ``paper``: where it was published, or None;
- ``version``: an integer, raised whenever its numbers change, so that stored results are not reused;
- a docstring whose first line ``quantlab list`` prints.

The module says ``quantlab_api = 1``: the version of these contracts that it was written for. It is raised when a plugin
would have to change, and ``API_CHANGES`` then says how; a plugin of another version is set aside with these words.

A function may leave out arguments it does not need. Two plugins must not give one name; a plugin that fails to load is
set aside and reported only to a person who asks for something that nobody else provides. ``QUANTLAB_TRACE_PLUGINS=1``
prints every registration and call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pluggy

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from quantlab.contracts.allocation import BitPolicy
    from quantlab.contracts.correction import Correction
    from quantlab.contracts.event import StageEvent
    from quantlab.contracts.method import Method
    from quantlab.contracts.passes import SmoothingPass
    from quantlab.contracts.quantizer import Quantizer
    from quantlab.contracts.reporter import Reporter
    from quantlab.contracts.sampler import CalibrationSampler
    from quantlab.contracts.tuning import Loss, Tuner

PROJECT = "quantlab"

API_VERSION = 1
"""Of the contracts in this file and in ``quantlab/contracts``."""
API_ATTRIBUTE = "quantlab_api"
"""Where a plugin's module states the version it was written for; 1 without it."""
API_CHANGES: Mapping[int, str] = {}
"""What a plugin has to change to come to a version from the one before it."""

hookspec: pluggy.HookspecMarker = pluggy.HookspecMarker(PROJECT)
hookimpl: pluggy.HookimplMarker = pluggy.HookimplMarker(PROJECT)
"""Marks a plugin's function as the implementation of the hook of the same name."""


# In the order of a run: what is to be done, on which model, with which parts, measured how.


@hookspec
def quantlab_methods() -> Iterable[Method]:  # type: ignore[empty-body]
    """Methods: a paper's choices as a fragment of a recipe.

    Returns what ``quantlab.method_from_yaml`` reads from the plugin's own files. A recipe names one in ``method`` and
    others in ``baselines``; whatever the recipe sets itself wins over the fragment.
    """


@hookspec
def quantlab_models() -> Iterable[type]:  # type: ignore[empty-body]
    """Model sources: where a recipe's ``model.source`` leads.

    The engine builds the class with its Config, whose options stand in the recipe beside ``source`` and ``name``, and
    calls ``load`` with the recipe's model and sampling sections; it gets the task: the network with its inputs, its
    calibration and its evaluation. ``identity(model)`` hashes what the model is made from, such as its file of weights.
    A class that lists its models in ``models`` has a recipe's name checked when the recipe is read; one whose models
    have no names says ``needs_name = False``.
    """


@hookspec
def quantlab_passes() -> Iterable[type[SmoothingPass]]:  # type: ignore[empty-body]
    """Per-channel scales between activation and weight, before bits are allocated; the recipe's ``passes``, in order.

    The engine builds the class with its Config and calls ``scales(weight_absmax, input_absmax)`` for each site. It
    returns a positive scale for each input channel; weights are multiplied by it and inputs divided, and the engine
    checks that the float function stays the same.
    """


@hookspec
def quantlab_bit_policies() -> Iterable[type[BitPolicy]]:  # type: ignore[empty-body]
    """Bit policies: who gets how many bits; the recipe's ``allocate``, each starting from what the one before gave.

    The engine builds the class with its Config and calls ``allocate(problem)`` once. It gets an ``AllocationProblem``
    and returns a ``BitMap`` within the budget, unchanged for sites it was not asked about, and the same again under the
    same generator. A policy never changes a module or a graph.

    A policy that weighs sites against one another says so in ``between_sites``, lists the scores it needs in ``scores``
    and reads them from ``problem.data.score``; it keeps ``problem.limits`` besides the mean bits, and gives sites with
    one word in ``shares`` equal bits.
    """


@hookspec
def quantlab_samplers() -> Iterable[type[CalibrationSampler]]:  # type: ignore[empty-body]
    """Calibration samplers: which recorded inputs ranges and scores are found on; the recipe's ``calibrate.sampler``.

    The engine builds the class with its Config and calls ``choose(problem)`` once. It gets a ``SamplerProblem`` and
    returns ``CalibrationPairs`` of step and trajectory, sorted, within the budget, the same again under the same
    generator; ``quantlab.draw_pairs`` turns a number for each step into them.
    """


@hookspec
def quantlab_quantizers() -> Iterable[type[Quantizer]]:  # type: ignore[empty-body]
    """Quantizers: how a tensor becomes integers; the recipe's ``weights.quantizer`` and ``activations.quantizer``.

    The engine calls ``from_spec(spec, bits, config)``, then ``observe`` with what passes there, ``freeze`` and
    ``choose`` once, and from then on ``forward``, whose result has the shape and dtype of its input. ``qparams()`` says
    what is stored; None means that the format cannot be packed, and ``extra_bytes()`` then counts what it stores.
    """


@hookspec
def quantlab_tuners() -> Iterable[type[Tuner]]:  # type: ignore[empty-body]
    """Tuners: how quantizers and adapters are trained after their first values are found; ``tune.tuners``, in order.

    The engine builds the class with its Config, puts what ``adapter(settings)`` asks for into every layer that may be
    trained, and calls ``tune(job)``, which trains in place and returns the history of its losses. It saves through
    ``job.checkpoint``, so that a killed run goes on to the same result. A tuner may also give a layer a low-rank branch
    that stays in float, ``layer.add_branch(rank)``; it is saved and loaded with the layer.
    """


@hookspec
def quantlab_losses() -> Iterable[type[Loss]]:  # type: ignore[empty-body]
    """Calibration losses between the quantized student and the float teacher; the recipe's ``tune.losses``.

    The engine builds the class with its Config, asks ``taps(sites)`` for the module paths whose outputs it wants, calls
    ``load({})`` at the start of a run, ``reset()`` at the start of each trajectory and the loss itself at each step. It
    returns a 0-dim tensor with a gradient towards the student, or None when there is nothing at this step. What a loss
    remembers beyond a trajectory it gives to checkpoints in ``state()`` and gets back in ``load``. A Config that is a
    ``quantlab.LossConfig`` has a weight and a schedule; the loss multiplies by ``weight_at(step.progress)``.
    """


@hookspec
def quantlab_corrections() -> Iterable[type[Correction]]:  # type: ignore[empty-body]
    """Corrections of the sampler for a quantized model's errors; the recipe's ``corrections``, in order.

    The engine builds the class with its Config and calls ``fit(data)`` once, with what the float and the finished
    quantized model predict on the recorded trajectories. What it returns is stored and counted, and handed to
    ``correct`` after every prediction and to ``variance`` at every step where the sampler adds noise.
    """


@hookspec
def quantlab_metrics() -> Iterable[type]:  # type: ignore[empty-body]
    """Metrics: how results are measured; the recipe's ``evaluate.metrics``.

    Each is an ``ImageMetric``, which looks at images, or a ``ClassMetric``, which looks at a classifier's answers. The
    engine builds it with its Config, looks whether the model has what the class ``needs``, calls ``require(task)``
    before anything is computed and ``compute(samples)`` for each method; it returns one or more named values, none of
    them NaN.
    """


@hookspec
def quantlab_reporters() -> Iterable[type[Reporter]]:  # type: ignore[empty-body]
    """Reporters: where the record of a run is kept besides its folder; ``quantlab run --report-to``.

    The engine builds the class with its Config, calls ``require()`` before anything is computed and ``begin(start)``
    when the run has its folder, then for each method ``curve(curve)`` for every loss of its tuners and
    ``result(result)``, and at last ``end(end)``, with how the run ended, also when it failed or was stopped. A reporter
    stands in no recipe and changes no number; what it raises after ``begin`` is a warning.
    """


@hookspec
def quantlab_event(event: StageEvent) -> None:
    """Told after each stage of a run, plugin by plugin; returns nothing, and a failure is reported and ignored.

    Args:
        event: the stage, how it ended, how long it took and where its artefact lies.
    """
