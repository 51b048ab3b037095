from __future__ import annotations

import pytest

from quantlab.contracts.quant import Observer
from quantlab.errors import RecipeError
from quantlab.plugins import Kind
from quantlab.recipe.choices import essence
from quantlab.recipe.explain import resolved_yaml
from quantlab.recipe.load import for_method, load_recipe

GOOD = """\
version: 1
model: {name: digits}
method: mixed
budget: {weight_bits: 2, activation_bits: 4}
"""


def test_each_layer_wins_over_the_one_before(registry, write):
    """base < method < recipe < profile < --set, told apart by one key each."""
    write("tune: {iterations: 1, batch: 1, rank: 1, weight_learning_rate: 1.0}\n", "base.yaml")
    recipe = write(GOOD + "extends: base\ntune: {batch: 3, rank: 3}\nprofiles: {smoke: {tune: {rank: 4}}}\nseed: 4\n")
    tune = load_recipe(recipe, ["seed=6"], registry, "smoke").recipe.tune
    assert (tune.weight_learning_rate, tune.iterations, tune.batch, tune.rank) == (1.0, 11, 3, 4)
    assert load_recipe(recipe, ["seed=6"], registry).recipe.seed == 6
    assert load_recipe(recipe, (), registry).recipe.tune.rank == 3


def test_later_bases_win_over_earlier_ones_and_bases_extend_bases(registry, write):
    write("seed: 1\nsampling: {steps: 5}\ntune: {batch: 7}\n", "deep.yaml")
    write("extends: deep\nseed: 2\n", "first.yaml")
    write("sampling: {steps: 9}\n", "second.yaml")
    recipe = load_recipe(write(GOOD + "extends: [first, second]\n"), (), registry).recipe
    assert (recipe.seed, recipe.sampling.steps, recipe.tune.batch) == (2, 9, 7)


def test_lists_are_replaced_as_a_whole(registry, write):
    write("keep: [{match: a, bits: 8}, {match: b, bits: 8}]\n", "base.yaml")
    recipe = load_recipe(write(GOOD + "extends: base\nkeep: [{match: c, bits: 4}]\n"), (), registry).recipe
    assert [(rule.match, rule.bits) for rule in recipe.keep] == [("c", 4)]


def test_origins_tell_file_and_line_method_option_and_default(registry, write):
    base = write("seed: 1\n\nsampling:\n  steps: 5\n", "base.yaml")
    recipe = write(GOOD + "extends: base\n")
    origin = load_recipe(recipe, ["tune.batch=9"], registry).origin
    assert origin["sampling.steps"] == f"{base}:4"
    assert origin["budget.weight_bits"] == f"{recipe}:4"
    assert origin["allocate.1.kurtosis.groups"] == "method mixed"
    assert origin["tune.batch"] == "--set tune.batch=9"
    assert origin["tune.rank"] == origin["allocate.1.kurtosis.offsets"] == "default"


def test_corrections_along_a_flow_are_refused_when_the_recipe_is_read(registry, write):
    recipe = write(GOOD + "corrections: [noise]\n")
    assert load_recipe(recipe, (), registry).recipe.corrections[0].name == "noise"
    with pytest.raises(RecipeError, match="corrections of the sampler") as caught:
        load_recipe(recipe, ["sampling.scheduler=flow-euler"], registry)
    assert caught.value.where == f"{recipe}:5" and caught.value.got == "noise"
    load_recipe(recipe, ["sampling.scheduler=flow-euler", "corrections=[]"], registry)


def test_plugin_options_are_completed_with_their_defaults(registry, write):
    choice = load_recipe(write(), (), registry).recipe.allocate[1]
    assert choice.options == {"groups": 3, "offsets": [-1, 0, 1]}


@pytest.mark.parametrize(
    ("override", "read"),
    [
        ("allocate.1.kurtosis.groups=7", lambda r: r.allocate[1].options["groups"] == 7),
        ("tune.losses.1=lp", lambda r: [loss.name for loss in r.tune.losses] == ["mse", "lp"]),
        ("tune.tuners=[]", lambda r: r.tune.tuners == ()),
        ("tune.tuners.0.distill.groups=2", lambda r: r.tune.tuners[0].options["groups"] == 2),
        ("evaluate.metrics=[fid]", lambda r: [metric.name for metric in r.evaluate.metrics] == ["fid"]),
        ("tune.adapter_learning_rate=1e-3", lambda r: r.tune.adapter_learning_rate == 1e-3),
        ("budget={weight_bits: 3}", lambda r: (r.budget.weight_bits, r.budget.extra_bit_fraction) == (3, 0.1)),
        ("name=other/name", lambda r: r.name == "other/name"),
    ],
)
def test_set(registry, write, override, read):
    assert read(load_recipe(write(), [override], registry).recipe)


def test_naming_another_quantizer_drops_the_options_of_the_first(registry, write):
    base = "weights: {quantizer: {other: {depth: 3}}}\n"
    write(base, "base.yaml")
    recipe = load_recipe(write(GOOD + "extends: base\nweights: {quantizer: affine}\n"), (), registry).recipe
    assert recipe.weights.quantizer.name == "affine" and not recipe.weights.quantizer.options


def test_a_recipe_is_named_after_its_file(registry, write):
    assert load_recipe(write(name="folder/wide.yaml"), (), registry).recipe.name == "wide"


def test_another_method_swaps_the_fragment_and_keeps_the_experiment(registry, write):
    write("activations: {observer: min_max}\n", "base.yaml")
    loaded = load_recipe(
        write(GOOD + "extends: base\nseed: 3\ntune: {losses: [lp], batch: 8}\nweights: {observer: scaled_min_max}\n"),
        ["allocate=[kurtosis]", "sampling.steps=7"],
        registry,
    )
    other = for_method(loaded, "plain")
    assert other.method == "plain"
    assert other.weights.observer is Observer.MIN_MAX, "its own fragment, not the recipe's key for the first method"
    assert [choice.name for choice in other.allocate] == ["uniform"], "--set allocate was for the first method"
    assert other.tune.tuners == ()
    assert [loss.name for loss in other.tune.losses] == ["mse"]
    assert (other.seed, other.tune.batch, other.sampling.steps) == (3, 8, 7), "the experiment is shared"
    assert other.activations.observer is Observer.MIN_MAX, "a base recipe is shared"
    assert other.budget.extra_bit_fraction == 0, "the first fragment is gone"
    assert for_method(loaded, "mixed") == loaded.recipe


def test_an_installed_recipe_is_found_by_name_and_by_path():
    from quantlab.recipe.find import find_recipe, packaged_folder, packaged_recipes, recipe_name

    assert "digits/mpq-dm-w2a4" in packaged_recipes()
    assert not any(name.startswith("base") for name in packaged_recipes())
    path = find_recipe("digits/mpq-dm-w2a4")
    assert path == packaged_folder() / "digits" / "mpq-dm-w2a4.yaml" == find_recipe(path)
    assert recipe_name(path) == "digits/mpq-dm-w2a4"


BAD = [
    pytest.param(GOOD + "sampeling: {}\n", 5, ['unknown key "sampeling"', '"sampling"'], id="wrong key"),
    pytest.param(GOOD + "sampling:\n  stepps: 3\n", 6, ['"stepps" in "sampling"', '"steps"'], id="wrong nested key"),
    pytest.param(GOOD + "keep:\n  - match: a\n    bit: 8\n", 7, ['"bit" in "keep.0"', '"bits"'], id="key in list"),
    pytest.param(GOOD + "seed: many\n", 5, ['"seed"', "integer", '"many"'], id="wrong type"),
    pytest.param(GOOD + "sampling: 3\n", 5, ['"sampling"', "3"], id="scalar for a section"),
    pytest.param(GOOD + "sampling: {steps: 0}\n", 5, ["greater than or equal to 1", "got: 0"], id="wrong value"),
    pytest.param(
        GOOD + "weights: {observer: mes}\n", 5, ["'min_max'", 'did you mean "mse"'], id="wrong word, nearest spelling"
    ),
    pytest.param(GOOD + "keep: [{match: a, bits: flaot}]\n", 5, ["integer", "'float'", '"float"'], id="union"),
    pytest.param(GOOD.replace("weight_bits: 2", "weight_bits: 9"), 4, ["budget.weight_bits", "8"], id="budget"),
    pytest.param(GOOD.replace("version: 1", "version: 2"), 1, ["version 1", "got: 2"], id="version"),
    pytest.param(GOOD.replace("version: 1\n", ""), None, ['"version" is missing'], id="no version"),
    pytest.param(GOOD.replace("model: {name: digits}", "model: {}"), 2, ['"model.name" is missing'], id="missing key"),
    pytest.param(
        GOOD.replace("{name: d", "{nmae: d"),
        2,
        ['"nmae" in "model"', "source, name, weights", '"name"'],
        id="model key",
    ),
    pytest.param(
        GOOD.replace("{name: d", "{source: folder, componnet: vae, name: d"), 2, ['"component"'], id="source's key"
    ),
    pytest.param(
        GOOD.replace("{name: d", "{source: folder, shards: many, name: d"),
        2,
        ['"model.shards"', "int"],
        id="its source value",
    ),
    pytest.param(GOOD.replace("mixed", "mixd"), 3, ['no method "mixd"', 'did you mean "mixed"'], id="method"),
    pytest.param(GOOD + "baselines: [plane]\n", 5, ['no method "plane"', "mixed, plain", '"plain"'], id="baseline"),
    pytest.param(GOOD + "allocate:\n  - kurtosys\n", 6, ['no policy "kurtosys"', '"kurtosis"'], id="policy"),
    pytest.param(
        GOOD + "allocate:\n  - kurtosis:\n      grups: 3\n", 7, ['unknown key "grups"', '"groups"'], id="plugin's key"
    ),
    pytest.param(
        GOOD + "allocate: [{kurtosis: {groups: x}}]\n", 5, ['"allocate.0.kurtosis.groups"', "integer"], id="its value"
    ),
    pytest.param(GOOD + "evaluate: {metrics: [fidd]}\n", 5, ['no metric "fidd"', '"fid"'], id="metric"),
    pytest.param(GOOD.replace("{name: d", "{source: x, name: d"), 2, ['no model "x"', "builtin"], id="model source"),
    pytest.param(GOOD + "seed: 1\nseed: 2\n", 6, ['"seed" stands twice', ":5"], id="duplicate key"),
    pytest.param(GOOD + "seed: !!python/object:os.system x\n", 5, ["no YAML tags"], id="tag"),
    pytest.param(GOOD + "seed: &a 1\n", 5, ["no YAML anchors", "extends"], id="anchor"),
    pytest.param(GOOD + "seed:\n\t- 1\n", 6, ["not YAML", "spaces, not tabs"], id="tab"),
    pytest.param(GOOD + "seed: [1\n", 6, ["not YAML"], id="open bracket"),
    pytest.param(GOOD + "1: 2\n", 5, ["a key must be a word"], id="number as key"),
    pytest.param(GOOD + "---\nseed: 1\n", 5, ["not YAML", "document"], id="two documents"),
    pytest.param(GOOD + "tune: {weight_learning_rate: .nan}\n", 5, ["finite"], id="not a number"),
    pytest.param("", None, ["empty"], id="empty file"),
    pytest.param("- a\n", None, ["not a mapping"], id="list at the top"),
    pytest.param("[" * 5000, 1, ["nested more than 32 deep"], id="too deep"),
    pytest.param(GOOD + "extends: basis\n", 5, ['no recipe "basis"'], id="missing base"),
    pytest.param(GOOD + "extends: recipe\n", 5, ["circle"], id="extends itself"),
    pytest.param(GOOD + "extends: {a: 1}\n", 5, ["name or a list of names"], id="wrong extends"),
    pytest.param(GOOD + "profiles: [smoke]\n", 5, ['"profiles" maps names'], id="wrong profiles"),
    pytest.param(GOOD + "seed: true\n", 5, ['"seed"', "integer", "got: true"], id="true is no number"),
    pytest.param(GOOD + "seed: '3'\n", 5, ['"seed"', "integer", 'got: "3"'], id="text is no number"),
    pytest.param(GOOD + "keep: [{match: a, bits: 8, optional: 1}]\n", 5, ["boolean"], id="a number is not true"),
    pytest.param(GOOD.replace("version: 1", "version: true"), 1, ["version 1", "got: True"], id="version of no number"),
    pytest.param(GOOD + "keep: conv_in\n", 5, ['"keep" should be a list'], id="scalar for a list"),
    pytest.param(GOOD + "tune:\n", 5, ['"tune" should be a mapping'], id="nothing for a section"),
    pytest.param(GOOD + f"seed: {'9' * 5000}\n", 5, ["cannot be read", "got: 9999"], id="too many digits"),
    pytest.param(GOOD + f"seed: {2**65}\n", 5, ['"seed" should be less'], id="seed beyond 64 bits"),
    pytest.param(GOOD + f"evaluate: {{noise_seed: {2**65}}}\n", 5, ["noise_seed"], id="noise seed beyond 64 bits"),
    pytest.param(GOOD + "name: a\x07b\n", 5, ["not YAML", "'\\x07'"], id="control character"),
    pytest.param(GOOD + "name: ../up\n", 5, ['"name"', '".."'], id="name that leaves its folder"),
    pytest.param(GOOD + "name: /tmp/up\n", 5, ['"name"'], id="name of another folder"),
    pytest.param(GOOD + "name: .store\n", 5, ['"name"'], id="name of the store"),
    pytest.param(GOOD + 'name: "a\\0b"\n', 5, ['"name"'], id="name with a zero byte"),
    pytest.param(GOOD + f"name: {'a' * 300}\n", 5, ['"name"', "200"], id="name too long for a folder"),
    pytest.param("version: 1\nmatrices: []\n", None, ["this is a bench", "quantlab bench recipe"], id="bench"),
]


@pytest.mark.parametrize(("text", "line", "told"), BAD)
def test_a_bad_recipe_is_one_clear_message(registry, write, text, line, told):
    path = write(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, (), registry)
    message = str(caught.value)
    assert message.startswith(f"{path}:{line}: " if line else str(path)), message
    assert all(part in message for part in told), message
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("seed", ["a.b=c"]),
        ("=3", ["a.b=c"]),
        ("sampling..steps=3", ["a.b=c"]),
        ("sampling.stepps=3", ["--set sampling.stepps=3", 'unknown key "stepps"', '"steps"']),
        ("sampling.steps=few", ["--set sampling.steps=few", '"sampling.steps"', '"few"']),
        ("allocate.x=3", ["no index", "0 to 2"]),
        ("allocate.9=uniform", ["no index", "0 to 2"]),
        ("seed=!!int 3", ["--set seed=!!int 3: a recipe has no YAML tags"]),
        ("seed=[1", ["not YAML"]),
        ("method=mixd", ["--set method=mixd", '"mixed"']),
    ],
)
def test_a_bad_override_is_one_clear_message(registry, write, override, told):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(), [override], registry)
    assert all(part in str(caught.value) for part in told), str(caught.value)


def test_a_circle_of_two_files_is_told(registry, write):
    write("extends: recipe\n", "base.yaml")
    with pytest.raises(RecipeError, match=r"base\.yaml:1: recipes extend one another in a circle"):
        load_recipe(write(GOOD + "extends: base\n"), (), registry)


def test_one_base_reached_on_two_ways_is_no_circle(registry, write):
    write("seed: 4\n", "deep.yaml")
    write("extends: deep\n", "left.yaml")
    write("extends: deep\n", "right.yaml")
    assert load_recipe(write(GOOD + "extends: [left, right]\n"), (), registry).recipe.seed == 4


def test_a_binary_file_is_told(registry, tmp_path):
    (tmp_path / "weights.yaml").write_bytes(bytes(range(256)))
    with pytest.raises(RecipeError, match="not a text file"):
        load_recipe(tmp_path / "weights.yaml", (), registry)


def test_text_of_another_encoding_names_its_line(registry, tmp_path):
    (tmp_path / "latin.yaml").write_bytes((GOOD + "name: caf\u00e9\n").encode("latin-1"))
    with pytest.raises(RecipeError, match=r"latin\.yaml:5: this is not a text file in UTF-8"):
        load_recipe(tmp_path / "latin.yaml", (), registry)


def test_a_name_too_long_for_a_file_is_a_missing_recipe(registry):
    with pytest.raises(RecipeError, match="there is no recipe"):
        load_recipe("a" * 5000, (), registry)


def test_a_model_that_its_source_does_not_have_is_told_with_its_line(registry, write, monkeypatch):
    source = registry.find(Kind.MODEL, "builtin").value
    monkeypatch.setattr(source, "models", ("digits", "digits-heavy"), raising=False)
    assert load_recipe(write(), (), registry).recipe.model.name == "digits"
    path = write(GOOD.replace("name: digits", "name: digitz"))
    with pytest.raises(RecipeError, match=r':2: the source "builtin" has no model "digitz"') as caught:
        load_recipe(path, (), registry)
    assert 'did you mean "digits"' in str(caught.value)


def test_the_options_of_a_source_stand_beside_its_name(registry, write):
    path = write(GOOD.replace("{name: d", "{source: folder, shards: 3, name: d"))
    loaded = load_recipe(path, (), registry)
    assert loaded.recipe.model.options == {"component": "unet", "shards": 3}, "complete with defaults"
    assert loaded.origin["model.shards"].endswith(":2")
    assert loaded.origin["model.component"] == "default"
    again = write(resolved_yaml(loaded.recipe))
    assert load_recipe(again, (), registry).recipe == loaded.recipe
    assert "component" not in essence(loaded.recipe, registry)["model"], "a default adds nothing to the hash"


def test_a_missing_recipe_has_the_nearest_name(registry):
    with pytest.raises(RecipeError) as caught:
        load_recipe("digits/mpqdm-w2a4", (), registry)
    assert 'no recipe "digits/mpqdm-w2a4"' in str(caught.value)
    assert 'did you mean "digits/mpq-dm-w2a4"' in str(caught.value)


def test_an_unknown_profile_has_the_known_ones(registry, write):
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(GOOD + "profiles: {smoke: {seed: 1}}\n"), (), registry, "smok")
    assert "allowed: smoke" in str(caught.value)


def test_a_plugins_option_set_wrongly_names_the_override(registry, write):
    with pytest.raises(RecipeError, match=r"--set tune\.tuners\.0\.distill\.depth=3: unknown key"):
        load_recipe(write(), ["tune.tuners.0.distill.depth=3"], registry)


def test_a_wrong_fragment_names_its_method(registry, write, monkeypatch):
    method = registry.method("plain")
    monkeypatch.setitem(method.fragment, "weights", {"observer": "men_max"})
    with pytest.raises(RecipeError, match=r"^method plain: \"weights\.observer\"") as caught:
        load_recipe(write(GOOD + "baselines: [plain]\n"), (), registry)
    assert 'did you mean "min_max"' in str(caught.value)


@pytest.mark.parametrize("seed", [5, 1_000_008])
def test_calibration_never_sees_the_noise_of_the_evaluation(registry, write, seed):
    path = write(GOOD + f"seed: {seed}\n")
    with pytest.raises(RecipeError, match="the very noise") as error:
        load_recipe(path, (), registry)
    assert f"{path}:" in str(error.value)
    assert load_recipe(path, ["evaluate.noise_seed=6"], registry).recipe.seed == seed
