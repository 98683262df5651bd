"""The exports of the package are those listed here, documented, and their examples run as printed."""

import ast
import doctest
import functools
import importlib
import inspect
import pkgutil
import warnings
from pathlib import Path
from types import ModuleType

import pytest

import jaxmaml

PUBLIC = {
    "jaxmaml": """
        Annealed Exact Extended FirstOrder Implicit Info LearnedOptimizer MetaLearner MetaState
        NonFiniteError Task TrainingClasses accuracy adapt anil averaging boil cavia checkpoint data
        diagnostics evaluate fine_tuning fit fold_keys fomaml imaml init_state learned_optimizer
        learned_rates learned_sgd load maml maml_plus_plus mean_and_ci95 meta_curvature meta_grad
        meta_sgd meta_step metrics mixed_mode multi_step_weights nn parallel processes proto_maml
        protonet r2d2 reptile rl stages trace unicorn with_state
    """,
    "jaxmaml.nn": """
        Conv4 Convolution MLP ResNet12 StatefulModel accuracy binary_cross_entropy conv
        convolutions_of cross_entropy fast_convolutions first_ways from_equinox
        from_equinox_with_state from_function from_haiku from_haiku_with_state from_linen
        from_linen_with_state from_nnx from_nnx_with_state make_norm max_pool mean_squared_error
        normalize_and_pool
    """,
    "jaxmaml.data": """
        augmentation class_splits datasets episodes pools sinusoid stored_images stream variable
    """,
    "jaxmaml.data.augmentation": "Augment apply check",
    "jaxmaml.data.class_splits": "draw omniglot published read write",
    "jaxmaml.data.datasets": (
        "Dataset class_names data_directory format_of images is_split_file load scaling tfds_splits"
    ),
    "jaxmaml.data.episodes": (
        "Episode ImagesByClass Plan TaskKeys checked distinct plan plan_step plan_tasks task_keys "
        "to_tasks"
    ),
    "jaxmaml.data.pools": "Pool PoolSampler from_arrays from_images sampler",
    "jaxmaml.data.sinusoid": "SinusoidSampler curve sampler",
    "jaxmaml.data.stored_images": "Images InMemory from_arrays open_images",
    "jaxmaml.data.stream": "ImageStream StreamIterator sampler",
    "jaxmaml.data.variable": "Composition VariableEpisode composition sampler",
    "jaxmaml.averaging": "AveragingState averaged with_average",
    "jaxmaml.checkpoint": "Checkpoint Manager read_record restore save verify",
    "jaxmaml.diagnostics": """
        CgResidual agreement agreement_by_layer agreement_by_step cg_residual cka collectives count_flops
        feature_reuse first_nonfinite inner_losses label_permutations metric_by_permutation
        update_norms
    """,
    "jaxmaml.metrics": "accuracy mean_and_ci95 nearest_neighbor",
    "jaxmaml.mixed_mode": "check_scalar explain_forward_mode value_and_grad",
    "jaxmaml.parallel": """
        Shares agree_on_shares along_tasks check_mesh evened local_places make_mesh place share_of
        specs_of split_specs spread to_host
    """,
    "jaxmaml.processes": "agreeing first from_first gathered initialize is_first",
    "jaxmaml.rl": """
        Categorical CategoricalPolicy Environment Experience GaussianPolicy Losses Normal Problem
        Request RequestSampler Step TabularTask Trajectories advantages bandit discounted_returns
        likelihood_ratio linear_baseline losses navigation_2d point_robot policy rollout sampler
        tabular_mdp collect Trpo TrpoState trpo Promp promp surrogate with_sampling_correction GruPolicy
        Memory Ppo RecurrentPolicy RecurrentProblem TrialExperience Trials WithMemory observed_task ppo
        recurrent_policy rl_squared trial_advantages
        from_gymnax from_brax half_cheetah cheetah_segments draw_cheetah
    """,
    "jaxmaml.stages": "Stage listening stage",
}
"""The functions, classes and modules that each public module exports."""
EXPORTS = [(module, name) for module, names in PUBLIC.items() for name in names.split()]
MODULES = sorted(
    module.name
    for module in pkgutil.walk_packages(jaxmaml.__path__, "jaxmaml.", onerror=lambda name: None)
    if not module.name.endswith("__main__")
)
EXTRAS = {"tensorflow", "tensorboardX", "torch", "higher", "torchopt"}
"""Packages that only an extra of pyproject.toml installs."""
EXTRAS_OF_EXAMPLES = {
    "jaxmaml.rl.adapters_gymnax": "gymnax.environments",
    "jaxmaml.rl.adapters_brax": "brax.envs",
    "jaxmaml.rl.drawing": "brax.envs",
}
"""Such packages that a module imports when its functions, and so its examples, are called."""


def _load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in EXTRAS:
            raise
        pytest.skip(f"{name} needs {error.name}, which only an extra installs")


def _exported(module: ModuleType) -> set[str]:
    """Returns the functions and classes that a module defines, and what it imports `as` itself."""
    statements = ast.walk(ast.parse(Path(inspect.getfile(module)).read_text()))
    aliases = [a for node in statements if isinstance(node, ast.ImportFrom) for a in node.names]
    passed_on = {alias.name for alias in aliases if alias.asname == alias.name}
    defined = {
        name
        for name, value in vars(module).items()
        if callable(value) and getattr(value, "__module__", None) == module.__name__
    }
    return {name for name in passed_on | defined if not name.startswith("_")}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_exported_names_are_those_of_the_list(module: str) -> None:
    assert _exported(importlib.import_module(module)) == set(PUBLIC[module].split())


def test_every_module_of_a_public_package_is_in_the_list() -> None:
    modules = {
        value.__name__
        for module, name in EXPORTS
        if isinstance(value := getattr(importlib.import_module(module), name), ModuleType)
    }
    assert modules == set(PUBLIC) - {"jaxmaml"}


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no_such_name"):
        jaxmaml.no_such_name  # noqa: B018


@functools.cache
def _examples(home: ModuleType) -> dict[str, doctest.DocTest]:
    return {test.name: test for test in doctest.DocTestFinder().find(home, home.__name__)}


@pytest.mark.parametrize(("module", "name"), EXPORTS)
def test_an_exported_name_has_an_example_that_is_run(module: str, name: str) -> None:
    thing = getattr(importlib.import_module(module), name)
    if isinstance(thing, ModuleType):
        assert len(thing.__doc__ or "") > 20
        return
    # The test below runs the examples of a module that doctest finds: this one must be among them.
    home = importlib.import_module(thing.__module__)
    assert home.__name__ in MODULES
    test = _examples(home).get(f"{home.__name__}.{thing.__name__}")
    assert test is not None, "doctest does not find its docstring"
    assert test.examples, "its docstring has no >>> example"
    # A function stands in its example; what a class holds is often made by a function.
    if not inspect.isclass(thing):
        assert any(name in example.source for example in test.examples), "its example is of another"


SLOW_EXAMPLES = {
    "jaxmaml.experiments.trained",
    "jaxmaml.rl.corrections",
    "jaxmaml.rl.problems",
    "jaxmaml.rl.proximal",
    "jaxmaml.rl.recurrent_ppo",
    "jaxmaml.rl.remembering",
    "jaxmaml.rl.trust_region",
}
"""Modules whose examples compile or train for long; other tests do the same."""


@pytest.mark.filterwarnings("ignore:Brax System:UserWarning")
@pytest.mark.filterwarnings("ignore:Accessing `:DeprecationWarning")  # of mujoco-mjx, by brax
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in SLOW_EXAMPLES else ())
        for name in ["jaxmaml", *MODULES]
    ],
)
def test_the_examples_in_a_module_run(name: str) -> None:
    module = _load(name)
    if name in EXTRAS_OF_EXAMPLES:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the packages that the extra imports
            pytest.importorskip(EXTRAS_OF_EXAMPLES[name])
    assert module.__doc__, f"{name} has no docstring"
    failed, _ = doctest.testmod(module, optionflags=doctest.NORMALIZE_WHITESPACE)
    assert failed == 0, "see the captured output"


@pytest.mark.parametrize("name", ["jaxmaml", *MODULES])
def test_an_import_of_a_module_gives_the_module(name: str) -> None:
    module = _load(name)
    names: dict[str, object] = {}
    exec(f"import {name} as imported", names)
    assert isinstance(module, ModuleType)
    assert names["imported"] is module


def test_no_exported_function_hides_a_module() -> None:
    exported = {f"{module}.{name}" for module, name in EXPORTS}
    for name in exported & set(MODULES):
        module, _, last = name.rpartition(".")
        assert isinstance(getattr(importlib.import_module(module), last), ModuleType), name
