"""Paths, masks, and the parts of a pytree."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from comparing import assert_equal

import jaxmaml
from jaxmaml import trees
from jaxmaml.types import Task

PARAMS = {"a": np.array(1.0), "b": {"c": np.array(2.0), "d": [np.array(3.0), None]}}


@pytest.mark.parametrize(
    "choose", [[True, True, True], [False, False, False], [True, False, True], [False, True, False]]
)
def test_combine_undoes_partition(choose):
    chosen, others = trees.partition(PARAMS, choose)
    assert [len(jax.tree.leaves(tree)) for tree in (chosen, others)] == [
        sum(choose),
        3 - sum(choose),
    ]
    assert_equal(trees.combine(chosen, others), PARAMS)


def test_partition_needs_a_flag_per_leaf():
    with pytest.raises(ValueError, match="zip"):
        trees.partition(PARAMS, [True])


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        (None, [True, True, True]),
        (lambda path: True, [True, True, True]),
        (lambda path: path.startswith("b/"), [False, True, True]),
        ({"a": False, "b": True}, [False, True, True]),
        ({"a": 0, "b": {"c": np.True_, "d": False}}, [False, True, False]),
    ],
)
def test_is_adapted(mask, expected):
    assert trees.is_adapted(PARAMS, mask) == expected


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (False, "False everywhere"),
        (lambda path: path == "e", "the parameters are a, b/c, b/d/0"),
        ({"a": True}, "structure of the parameters"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        trees.is_adapted(PARAMS, mask)


def test_paths_below_and_beside():
    paths = ["head", "head/kernel", "header/kernel", "body/head"]
    assert [trees.under_path("head")(path) for path in paths] == [True, True, False, False]
    assert [trees.beside_path("head")(path) for path in paths] == [False, False, True, True]


def test_only_floating_point_leaves_are_float():
    tree = {"a": np.float32(1), "b": np.arange(3), "c": jax.random.key(0), "d": True}
    assert trees.is_float(tree) == [True, False, False, False]


@pytest.mark.parametrize(
    ("tree", "depth", "expected"),
    [
        ({"conv": [{"b": 1, "k": 2}, {"k": 3}], "head": {"k": 4}}, None,
         {"conv/0": [1, 2], "conv/1": [3], "head": [4]}),
        ({"conv": [{"b": 1, "k": 2}, {"k": 3}], "head": {"k": 4}}, 1,
         {"conv": [1, 2, 3], "head": [4]}),
        ({"conv": [{"b": 1, "k": 2}], "head": 4}, 3, {"conv/0/b": [1], "conv/0/k": [2], "head": [4]}),
        ({"w1": 1, "w2": 2}, None, {"w1": [1], "w2": [2]}),
        (Task(support={"x": 1}, query={"x": 2}), None, {"support": [1], "query": [2]}),
        (1, None, {"": [1]}),
        (1, 1, {"": [1]}),
        ((), None, {}),
    ],
)  # fmt: skip
def test_the_layers_of_a_tree(tree, depth, expected):
    assert trees.by_layer(tree, depth) == expected


def _users_of_params():
    learner = jaxmaml.maml(lambda params, batch: jnp.mean(batch), optax.sgd(0.1), 1)
    tasks = Task(jnp.ones((2, 3)), jnp.ones((2, 3)))
    return {
        "adapt": lambda params: learner.adapt(params, jnp.ones(3)),
        "init_state": lambda params: jaxmaml.init_state(learner, optax.adam(0.1), params),
        "meta_grad": lambda params: jaxmaml.meta_grad(learner, params, tasks),
    }


@pytest.mark.parametrize("use", _users_of_params().values(), ids=_users_of_params())
def test_parameters_without_a_derivative_are_refused_by_their_path(use):
    for number in (jnp.array(3), np.array([True]), 1j):
        with pytest.raises(TypeError, match=r"real and floating-point; at 'body/count' they are "):
            use({"body": {"count": number, "scale": jnp.array(1.0)}})
    with pytest.raises(TypeError, match="floating-point; they are int32"):
        use(jnp.array(3))
    for empty in ({}, (), {"body": None}):
        with pytest.raises(ValueError, match="the parameters are empty"):
            use(empty)
