"""Looking inside: counts, angles, norms and alignments against values worked out by hand."""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import smooth

import jaxmaml
from jaxmaml import diagnostics
from jaxmaml.diagnostics.layers import by_layer
from jaxmaml.types import MetaLearner, Task

EXACT, FIRST = jaxmaml.Exact(), jaxmaml.FirstOrder()
RATE = 0.1
CURVATURE = {"body": 1.0, "head": 4.0}
TASK = Task(
    support=jnp.array([[1.0, 0.0], [3.0, 0.0], [2.0, 3.0]]),
    query=jnp.array([[0.0, 5.0], [2.0, 1.0]]),
)
PARAMS = {"body": {"w": jnp.array([5.0, 5.0])}, "head": {"w": jnp.array([2.0, -3.0])}}


def curved_loss(params, batch):
    """Each layer in a bowl of its own: inner SGD shrinks its distance to the batch's mean."""
    distance = lambda layer: jnp.mean(jnp.sum((params[layer]["w"] - batch) ** 2, axis=-1))
    return sum(CURVATURE[layer] / 2 * distance(layer) for layer in CURVATURE)


@jaxmaml.with_state
def counted_loss(params, batch, state):
    """The same plus a state that counts the inner steps."""
    return curved_loss(params, batch) + state, state + 1


def curved_after(layer, num_inner_steps):
    """A layer's parameters after so many inner steps on TASK, in closed form."""
    shrink = (1 - RATE * CURVATURE[layer]) ** num_inner_steps
    return np.array([2.0, 1.0]) + shrink * (np.asarray(PARAMS[layer]["w"]) - np.array([2.0, 1.0]))


def curved(num_inner_steps, rate=RATE, loss_fn=curved_loss, **options) -> MetaLearner:
    return jaxmaml.maml(loss_fn, optax.sgd(rate), num_inner_steps, **options)


def task_at(tasks, index) -> Task:
    return jax.tree.map(lambda leaf: leaf[index], tasks)


@pytest.mark.parametrize(
    ("grads", "reference", "cosine", "ratio"),
    [
        ([3.0, 4.0], [0.0, 10.0], 0.8, 0.5),
        ([-1.0, 0.0], [2.0, 0.0], -1.0, 0.5),
        ([0.0, 0.0], [2.0, 0.0], math.nan, 0.0),
        ([2.0, 0.0], [0.0, 0.0], math.nan, math.inf),
        ([0.0, 0.0], [0.0, 0.0], math.nan, math.nan),
    ],
)
def test_agreement_of_a_tree_and_of_its_layers(grads, reference, cosine, ratio):
    grads, reference = ({"a": {"w": jnp.array(value)}} for value in (grads, reference))
    np.testing.assert_allclose(diagnostics.agreement(grads, reference), (cosine, ratio))
    steady = {"b": [jnp.array([1.0, 1.0])]}
    layers = diagnostics.agreement_by_layer(grads | steady, reference | steady)
    np.testing.assert_allclose(layers["a"], (cosine, ratio))
    np.testing.assert_allclose(layers["b"], (1, 1), rtol=1e-6)


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
    assert by_layer(tree, depth) == expected


@pytest.mark.parametrize("depth", [0, -1, 1.0, True])
def test_a_depth_below_one_is_refused(depth):
    with pytest.raises((ValueError, TypeError), match="depth must be an integer, 1 or more"):
        diagnostics.agreement_by_layer(PARAMS, PARAMS, depth=depth)


def test_trees_of_different_structure_do_not_agree():
    with pytest.raises(ValueError, match="same structure"):
        diagnostics.agreement_by_layer(PARAMS, {"body": PARAMS["body"]})


def test_agreement_by_step_in_closed_form():
    """d theta_n / d theta is (1 - rate * curvature)^n, which first order leaves out."""
    numbers = (0, 1, 4)
    exact, first = curved, functools.partial(curved, adjoint=FIRST)
    whole, layers = diagnostics.agreement_by_step(first, exact, PARAMS, TASK, numbers)
    for i, number in enumerate(numbers):
        query_mean = np.array([1.0, 3.0])
        grads = {x: CURVATURE[x] * (curved_after(x, number) - query_mean) for x in CURVATURE}
        shrink = {x: (1 - RATE * CURVATURE[x]) ** number for x in CURVATURE}
        reference = np.concatenate([shrink[x] * grads[x] for x in CURVATURE])
        joined = np.concatenate(list(grads.values()))
        norms = np.linalg.norm(joined), np.linalg.norm(reference)
        expected = joined @ reference / math.prod(norms), norms[0] / norms[1]
        np.testing.assert_allclose([leaf[i] for leaf in whole], expected, rtol=1e-5)
        for layer in CURVATURE:
            found = [leaf[i] for leaf in layers[layer]]
            np.testing.assert_allclose(found, (1, 1 / shrink[layer]), rtol=1e-5)


def test_a_layer_that_exact_maml_does_not_learn_has_no_direction():
    """At a rate of 1 / curvature one step lands in the minimum wherever it started."""
    exact = functools.partial(curved, rate=0.25)
    first = functools.partial(exact, adjoint=FIRST)
    # Of two examples, so that their mean is exact and the gradient zero, not its rounding.
    task = TASK._replace(support=TASK.support[:2])
    _, layers = diagnostics.agreement_by_step(first, exact, PARAMS, task, (1,), depth=1)
    np.testing.assert_allclose(layers["head"], [[math.nan], [math.inf]])
    np.testing.assert_allclose(layers["body"], [[1.0], [1 / 0.75]], rtol=1e-6)


def test_state_and_depth_reach_the_agreement_by_step():
    """A state of 2 doubles the curvature, and two layers of one part are one."""

    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return state * curved_loss(params["part"], batch), state

    exact = functools.partial(curved, rate=RATE / 2, loss_fn=loss_fn)
    first = functools.partial(exact, adjoint=FIRST)
    compare = functools.partial(diagnostics.agreement_by_step, numbers=(3,), depth=1)
    found, layers = compare(first, exact, {"part": PARAMS}, TASK, state=jnp.array(2.0))
    expected, _ = diagnostics.agreement_by_step(
        functools.partial(curved, adjoint=FIRST), curved, PARAMS, TASK, (3,)
    )
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert layers.keys() == {"part"}
    np.testing.assert_array_equal(layers["part"], found)


def test_agreement_by_step_needs_a_number_of_steps():
    with pytest.raises(ValueError, match="at least one number"):
        diagnostics.agreement_by_step(curved, curved, PARAMS, TASK, ())


@pytest.mark.parametrize("num_inner_steps", [None, 0, 5])
@pytest.mark.parametrize("has_state", [False, True])
def test_inner_losses_in_closed_form(num_inner_steps, has_state):
    loss_fn, state = (counted_loss, jnp.array(0.0)) if has_state else (curved_loss, ())
    learner = curved(3, loss_fn=loss_fn)
    found = diagnostics.inner_losses(
        learner, loss_fn, PARAMS, TASK, state=state, num_inner_steps=num_inner_steps
    )
    number = 3 if num_inner_steps is None else num_inner_steps
    for name, batch in TASK._asdict().items():
        batch = np.asarray(batch)
        expected = [
            has_state * n
            + sum(
                CURVATURE[layer] / 2 * ((curved_after(layer, n) - batch) ** 2).sum(-1).mean()
                for layer in CURVATURE
            )
            for n in range(number + 1)
        ]
        np.testing.assert_allclose(found[name], expected, rtol=1e-5)


def test_inner_losses_are_those_the_learner_reports():
    problem = smooth()
    task = task_at(problem.tasks, 0)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), 3)
    found = diagnostics.inner_losses(learner, problem.loss_fn, problem.params, task)
    _, info = learner.loss(problem.params, task)
    np.testing.assert_allclose(found["support"][:-1], info.inner_losses, rtol=1e-5)
    np.testing.assert_allclose(found["query"][-1], info.query_loss, rtol=1e-5)


@pytest.mark.parametrize("has_state", [False, True])
def test_update_norms_in_closed_form(has_state):
    loss_fn, state = (counted_loss, jnp.array(0.0)) if has_state else (curved_loss, ())
    mask = lambda path: path == "head/w"
    learner = curved(2, loss_fn=loss_fn, mask=mask)
    found = diagnostics.update_norms(learner, PARAMS, TASK.support, state=state, num_inner_steps=3)
    moved = [np.linalg.norm(curved_after("head", n) - curved_after("head", 0)) for n in range(4)]
    np.testing.assert_allclose(found["head"][0], moved, rtol=1e-5)
    np.testing.assert_allclose(found["head"][1], np.array(moved) / math.sqrt(13), rtol=1e-5)
    np.testing.assert_array_equal(found["body"], np.zeros((2, 4)))


def test_a_layer_that_starts_from_zero_has_no_relative_update():
    params = PARAMS | {"head": {"w": jnp.zeros(2)}}
    norms, relative = diagnostics.update_norms(curved(1), params, TASK.support)["head"]
    np.testing.assert_allclose(norms, [0, 0.4 * math.sqrt(5)], rtol=1e-6)
    np.testing.assert_array_equal(relative, [math.nan, math.inf])


def test_update_norms_start_from_the_learners_own_parameters():
    """Meta-parameters may be more than parameters, and a head may be filled in before all steps."""
    plain = curved(2)
    start = lambda meta_params: jax.tree.map(lambda leaf: leaf + 1, meta_params["params"])
    learner = plain._replace(
        trace=lambda meta_params, *args, **options: plain.trace(
            start(meta_params), *args, **options
        )
    )
    meta_params = {"params": PARAMS, "rates": jnp.ones(3)}
    found = diagnostics.update_norms(learner, meta_params, TASK.support, depth=1)
    expected = diagnostics.update_norms(plain, start(meta_params), TASK.support)
    assert found.keys() == {"body", "head"}
    for layer in found:
        assert found[layer][0][0] == 0
        np.testing.assert_allclose(found[layer], expected[layer], rtol=1e-6)


@pytest.mark.parametrize("way", [1, 2, 5])
def test_all_permutations_are_listed_once(way):
    rows = {tuple(row) for row in diagnostics.label_permutations(way).tolist()}
    assert len(rows) == len(diagnostics.label_permutations(way)) == math.factorial(way)
    assert all(sorted(row) == list(range(way)) for row in rows)
    assert diagnostics.label_permutations(way)[0].tolist() == list(range(way))


def test_permutations_are_drawn():
    draw = functools.partial(diagnostics.label_permutations, 20, num_permutations=30)
    rows = draw(key=jax.random.key(0))
    assert rows.shape == (30, 20)
    np.testing.assert_array_equal(np.sort(rows), np.tile(np.arange(20), (30, 1)))
    assert len({tuple(row) for row in rows.tolist()}) == 30
    np.testing.assert_array_equal(rows, draw(key=jax.random.key(0)))


@pytest.mark.parametrize(
    ("way", "options", "message"),
    [
        (0, {}, "way must be an integer, 1 or more"),
        (9, {}, "362,880"),
        (3, {"num_permutations": 2}, "given together"),
        (3, {"key": jax.random.key(0)}, "given together"),
        (
            3,
            {"key": jax.random.key(0), "num_permutations": 0},
            "num_permutations must be an integer, 1 or more",
        ),
    ],
)
def test_permutations_that_cannot_be_listed_or_drawn_are_refused(way, options, message):
    with pytest.raises(ValueError, match=message):
        diagnostics.label_permutations(way, **options)


def by_permutation(problem, permutations, metric_fn, *, params=None, task=None, **options):
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 2)
    params = problem.params if params is None else params
    task = task_at(problem.tasks, 0) if task is None else task
    return diagnostics.metric_by_permutation(
        learner, metric_fn, params, task, permutations, **options
    )


@pytest.mark.parametrize("chunk_size", ["auto", None, 1, 4])
def test_the_metric_of_each_permutation_is_that_of_the_relabelled_task(chunk_size):
    problem = smooth()
    task, permutations = task_at(problem.tasks, 0), diagnostics.label_permutations(3)
    metric_fn = lambda adapted, query: {"loss": problem.loss_fn(adapted, query)}
    found = by_permutation(problem, permutations, metric_fn, chunk_size=chunk_size)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 2)
    for row, permutation in zip(found["loss"], permutations, strict=True):
        renamed = Task(*(batch | {"targets": permutation[batch["targets"]]} for batch in task))
        view = lambda adapted, state: metric_fn(adapted, renamed.query)  # noqa: B023
        expected = learner.trace(problem.params, renamed.support, view)["loss"]
        np.testing.assert_allclose(row, expected, rtol=1e-5)
    assert found["loss"].shape == (6, 3)


def test_nothing_hangs_on_the_labels_of_a_head_that_starts_alike_for_all():
    problem = smooth()
    alike = problem.params | {"head": jax.tree.map(jnp.zeros_like, problem.params["head"])}
    rows = functools.partial(
        by_permutation, problem, diagnostics.label_permutations(3), problem.loss_fn
    )
    np.testing.assert_allclose(rows(params=alike).std(axis=0), 0, atol=1e-6)
    assert rows().std(axis=0).min() > 0.03


def test_state_reaches_a_permuted_task():
    """A loss whose state counts inner steps, and reads the labels that it is given."""

    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return jnp.mean((params - batch["targets"]) ** 2) + state, state + 1

    learner = jaxmaml.maml(loss_fn, optax.sgd(0.5), 2)
    task = Task(support={"targets": jnp.array([2])}, query={"targets": jnp.array([0])})

    @jaxmaml.with_state
    def metric_fn(adapted, query, state):
        return 100 * adapted + 10 * query["targets"][0] + state, state

    found = diagnostics.metric_by_permutation(
        learner, metric_fn, jnp.array(0.0), task, [[0, 1, 2], [1, 2, 0]], state=jnp.array(0.0),
        num_inner_steps=1,
    )  # fmt: skip
    # One step of rate 1/2 on a squared distance lands on the support's label.
    np.testing.assert_allclose(found, [[0, 201], [10, 11]], rtol=1e-6)


TARGETS = {"targets": jnp.array([0, 1, 2])}


@pytest.mark.parametrize(
    ("support", "permutations", "error", "message"),
    [
        (TARGETS, [[0, 1, 1]], ValueError, "must hold 0..2 once"),
        (TARGETS, [[1, 2, 3]], ValueError, "must hold 0..2 once"),
        (TARGETS, [0, 1, 2], ValueError, r"integers \[num_permutations, way\]"),
        (TARGETS, [[0.0, 1.0, 2.0]], ValueError, r"integers \[num_permutations, way\]"),
        (TARGETS, [[1, 0]], ValueError, r"support's targets must be in 0..1"),
        ({"inputs": jnp.zeros(3)}, [[0, 1]], ValueError, "a mapping with integer 'targets'"),
        (jnp.zeros(3), [[0, 1]], ValueError, "a mapping with integer 'targets'"),
        ({"targets": jnp.eye(2)}, [[0, 1]], TypeError, "support's targets must be integers"),
    ],
)
def test_what_cannot_be_permuted_is_refused(support, permutations, error, message):
    with pytest.raises(error, match=message):
        by_permutation(smooth(), permutations, curved_loss, task=Task(support, TARGETS))


CROSS = [[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]]


@pytest.mark.parametrize(
    ("x", "y", "expected"),
    [
        ([-1.0, 0.0, 1.0], [1.0, -2.0, 1.0], 0),
        ([0.0, 1.0, 2.0], [0.0, 0.0, 3.0], 9 / 12),
        # ||Y'X||² = 4, ||X'X|| = 2 sqrt(2), ||Y'Y|| = 2.
        (CROSS, [[1.0], [-1.0], [0.0], [0.0]], math.sqrt(0.5)),
        (CROSS, [[7.0, 1.0], [7.0, -1.0], [8.0, 0.0], [6.0, 0.0]], 1),
        # More features than examples.
        ([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]], [[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]], 1),
        # The mean of seven 0.3 is not 0.3.
        ([1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0], [0.3] * 7, math.nan),
        ([1.0], [2.0], math.nan),
    ],
)
def test_cka_by_hand(x, y, expected):
    x, y = jnp.array(x), jnp.array(y)
    for found in (diagnostics.cka(x, y), diagnostics.cka(y, x)):
        np.testing.assert_allclose(found, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("num_features", [2, 30])
def test_cka_is_the_formula_of_the_paper(num_features):
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(10, 3)), rng.normal(size=(10, num_features))
    x, y = x - x.mean(0), y - y.mean(0)
    norm = np.linalg.norm
    expected = norm(y.T @ x) ** 2 / (norm(x.T @ x) * norm(y.T @ y))
    found = diagnostics.cka(jnp.asarray(x + 3, jnp.float32), jnp.asarray(y - 5, jnp.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert 0.1 < expected < 0.9


def test_cka_sees_neither_rotation_nor_scale_nor_shift():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
    x, y, (rotation, _) = draw(10, 4), draw(10, 3), jnp.linalg.qr(draw(4, 4))
    other = 1e12 * x @ rotation + 1e12
    np.testing.assert_allclose(diagnostics.cka(other, y), diagnostics.cka(x, y), rtol=1e-4)
    image = x.reshape(10, 2, 1, 2)
    np.testing.assert_array_equal(diagnostics.cka(image, y), diagnostics.cka(x, y))
    assert not np.isclose(
        diagnostics.cka(x * jnp.array([[1, 1, 1, 9.0]]), y), diagnostics.cka(x, y)
    )


@pytest.mark.parametrize("blank", [0.0, math.nan])
def test_padding_does_not_count_and_a_weight_of_two_is_an_example_twice(blank):
    rng = np.random.default_rng(2)
    x, y = (jnp.asarray(rng.normal(size=(6, 3)), jnp.float32) for _ in range(2))
    padded = [jnp.concatenate([jnp.full((2, 3), blank), features]) for features in (x, y)]
    weights = jnp.array([0, 0, 1, 1, 1, 1, 1, 2.0])
    expected = diagnostics.cka(*(jnp.concatenate([features, features[-1:]]) for features in (x, y)))
    np.testing.assert_allclose(diagnostics.cka(*padded, weights=weights), expected, rtol=1e-5)


def test_cka_of_half_precision_is_computed_in_single():
    x, y = jnp.array([0.0, 1.0, 2.0], jnp.bfloat16), jnp.array([0.0, 0.0, 300.0], jnp.float16)
    found = diagnostics.cka(x, y)
    assert found.dtype == jnp.float32
    np.testing.assert_allclose(found, 0.75, rtol=1e-6)


@pytest.mark.parametrize(
    ("x", "y", "weights", "message"),
    [
        ((3, 2), (4, 2), None, r"x \[3, 2\], y \[4, 2\]"),
        ((), (), None, r"same, positive number of examples"),
        ((0, 2), (0, 2), None, r"same, positive number of examples"),
        ((3, 2), (3, 2), (2,), r"weights \[2\]"),
        ((3, 2), (3, 2), (3, 1), r"weights must be \[num_examples\]"),
    ],
)
def test_features_of_other_examples_are_not_compared(x, y, weights, message):
    weights = None if weights is None else jnp.ones(weights)
    with pytest.raises(ValueError, match=message):
        diagnostics.cka(jnp.ones(x), jnp.ones(y), weights=weights)


def smooth_features(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["a"]["kernel"])
    return {"a": hidden, "head": [hidden @ params["head"]["kernel"]]}


def unbiased():
    """`smooth` without the addition of a bias, which promotes its rank."""

    def loss_fn(params, batch):
        logits = smooth_features(params, batch)["head"][0]
        losses = optax.losses.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
        return losses.mean()

    return smooth()._replace(loss_fn=loss_fn)


def test_features_are_reused_where_they_are_not_adapted():
    problem = smooth()
    task = task_at(problem.tasks, 0)
    learner = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 3, mask=lambda path: "head" in path)
    adapted, _ = learner.adapt(problem.params, task.support)
    reuse = diagnostics.feature_reuse(smooth_features, problem.params, adapted, task.query)
    np.testing.assert_allclose(reuse["a"], 1, rtol=1e-6)
    logits = [smooth_features(p, task.query)["head"][0] for p in (problem.params, adapted)]
    np.testing.assert_allclose(reuse["head"][0], diagnostics.cka(*logits))
    assert reuse["head"][0] < 0.99
    weights = jnp.array([1, 1, 1, 1, 1, 0.0])
    counted = diagnostics.feature_reuse(
        smooth_features, problem.params, adapted, task.query, weights=weights
    )
    logits = [values[:5] for values in logits]
    np.testing.assert_allclose(counted["head"][0], diagnostics.cka(*logits), rtol=1e-5)


def _reuse(problem, task):
    adapted, _ = jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), 2).adapt(
        problem.params, task.support
    )
    return diagnostics.feature_reuse(smooth_features, problem.params, adapted, task.query)


def _learner(problem, num_inner_steps=2, **options):
    return jaxmaml.maml(problem.loss_fn, optax.sgd(1.0), num_inner_steps, **options)


OF_A_TASK: dict[str, Any] = {
    "inner_losses": lambda problem, task: diagnostics.inner_losses(
        _learner(problem), problem.loss_fn, problem.params, task
    ),
    "update_norms": lambda problem, task: diagnostics.update_norms(
        _learner(problem), problem.params, task.support
    ),
    "agreement_by_step": lambda problem, task: diagnostics.agreement_by_step(
        functools.partial(_learner, problem, adjoint=FIRST), functools.partial(_learner, problem),
        problem.params, task, (1, 2),
    ),
    "metric_by_permutation": lambda problem, task: diagnostics.metric_by_permutation(
        _learner(problem), problem.loss_fn, problem.params, task, diagnostics.label_permutations(3)
    ),
    "feature_reuse": _reuse,
}  # fmt: skip


@pytest.mark.parametrize("name", OF_A_TASK)
def test_what_is_said_of_one_task_is_compiled_and_batched(name):
    problem = unbiased()
    function = functools.partial(OF_A_TASK[name], problem)
    with jax.numpy_rank_promotion("raise"):
        batched = jax.jit(jax.vmap(function))(problem.tasks)
    for i in range(2):
        alone = jax.jit(function)(task_at(problem.tasks, i))
        assert jax.tree.structure(alone) == jax.tree.structure(batched)
        for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(batched), strict=True):
            np.testing.assert_allclose(many[i], one, rtol=1e-4, atol=1e-5)


def _zero_input(task):
    """The second number of each example is always 0, and so is the second inner gradient."""
    return jax.tree.map(lambda leaf: leaf * jnp.array([[1.0, 0.0]]), task)


def _breaks(which, value=math.nan):
    """PARAMS and TASK with one number that is not finite in one of them."""
    path = {"body": {"w": jnp.array([5.0, value])}}
    batch = jnp.array([[1.0, 2.0], [value, 4.0]])
    changed = {"support": TASK._replace(support=batch), "query": TASK._replace(query=batch)}
    return (PARAMS | path, TASK) if which == "params" else (PARAMS, changed[which])


def _linear_loss(params, batch):
    return jnp.mean((batch @ params["body"]["w"] + jnp.sum(params["head"]["w"]) - 1) ** 2)


def _nan_rate_at(step):
    return optax.sgd(lambda count: jnp.where(count == step, jnp.nan, RATE))


def _broken_meta_loss():
    plain = curved(2)

    def loss(*args, **options):
        value, info = plain.loss(*args, **options)
        return value * jnp.inf, info

    return plain._replace(loss=loss)


def _adam(num_inner_steps, eps_root=0.0, **options):
    optimizer = optax.adam(0.1, eps_root=eps_root)
    return jaxmaml.maml(_linear_loss, optimizer, num_inner_steps, **options)


_LOG = lambda params, batch: jnp.log(-jnp.sum(params["body"]["w"] ** 2)) + 0 * jnp.sum(batch)
FAILURES = {
    "healthy": (curved(3), PARAMS, TASK, None),
    "no steps": (curved(0), PARAMS, TASK, None),
    "params": (curved(3), *_breaks("params"), "meta-parameter body/w"),
    "infinite params": (curved(3), *_breaks("params", math.inf), "meta-parameter body/w"),
    "support": (curved(3), *_breaks("support"), "support"),
    "query": (curved(3), *_breaks("query", -math.inf), "query"),
    "rate": (
        jaxmaml.maml(curved_loss, _nan_rate_at(2), 4), PARAMS, TASK, "inner step 3: parameter body/w",
    ),
    # Parameters of 1e30 are finite, their squares are not.
    "divergence": (curved(3, rate=1e30), PARAMS, TASK, "inner step 2: loss"),
    "loss": (jaxmaml.maml(_LOG, optax.sgd(RATE), 2), PARAMS, TASK, "inner step 1: loss"),
    "query loss": (curved(2, query_loss_fn=_LOG), PARAMS, TASK, "query loss"),
    "query loss, no steps": (curved(0, query_loss_fn=_LOG), PARAMS, TASK, "query loss"),
    "meta-loss": (_broken_meta_loss(), PARAMS, TASK, "meta-loss"),
    "adam": (_adam(2), PARAMS, _zero_input(TASK), "meta-gradient body/w"),
    "adam, one step": (_adam(1), PARAMS, _zero_input(TASK), "meta-gradient body/w"),
    "adam with eps_root": (_adam(2, 1e-8), PARAMS, _zero_input(TASK), None),
    "adam, first order": (_adam(2, adjoint=FIRST), PARAMS, _zero_input(TASK), None),
}  # fmt: skip


@pytest.mark.parametrize(("learner", "params", "task", "place"), FAILURES.values(), ids=FAILURES)
def test_where_the_first_nonfinite_number_is(learner, params, task, place):
    assert diagnostics.first_nonfinite(learner, params, task) == place


def test_the_loss_shows_nothing_of_adams_nan():
    loss, info = _adam(2).loss(PARAMS, _zero_input(TASK))
    assert jnp.isfinite(loss)
    assert jnp.isfinite(info.inner_losses).all()


def test_a_bare_array_a_key_and_an_integer_may_be_looked_at():
    loss_fn = lambda params, batch: jnp.mean((params - batch["x"]) ** 2)
    learner = jaxmaml.maml(loss_fn, optax.sgd(RATE), 1)
    batch = {"x": jnp.ones(2), "key": jax.random.key(0), "label": jnp.array([1, 2])}
    find = lambda params: diagnostics.first_nonfinite(learner, params, Task(batch, batch))
    assert find(jnp.array(0.0)) is None
    assert find(jnp.array(jnp.nan)) == "meta-parameter"


@pytest.mark.parametrize(
    ("state", "place"),
    [(1.0, "inner step 2: state scale"), (math.nan, "state scale"), (0.0, None)],
)
def test_a_state_that_grows_beyond_all_numbers_is_found(state, place):
    @jaxmaml.with_state
    def loss_fn(params, batch, state):
        return curved_loss(params, batch), {"scale": state["scale"] * 1e30}

    learner = curved(3, loss_fn=loss_fn)
    state = {"scale": jnp.array(state)}
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK, state=state) == place


def test_the_outer_step_reaches_the_learner():
    plain = curved(1)

    def loss(meta_params, task, *, step=0, state=()):
        value, info = plain.loss(meta_params, task, state=state)
        return jnp.where(step > 10, jnp.nan, value), info

    learner = plain._replace(loss=loss)
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK, step=10) is None
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK, step=11) == "meta-loss"


def test_a_learner_that_starts_from_what_is_not_finite():
    plain = curved(1)
    exp = lambda params: jax.tree.map(lambda leaf: jnp.exp(100 * leaf), params)
    learner = plain._replace(
        trace=lambda params, *args, **options: plain.trace(exp(params), *args, **options)
    )
    place = "before the first inner step: parameter body/w"
    assert diagnostics.first_nonfinite(learner, PARAMS, TASK) == place


def test_jax_debug_nans_does_not_stop_the_search():
    with jax.debug_nans(True):
        place = diagnostics.first_nonfinite(_adam(2), PARAMS, _zero_input(TASK))
    assert place == "meta-gradient body/w"


def test_flops_of_products_and_convolutions():
    a, b = jnp.ones((7, 2, 3)), jnp.ones((7, 3, 4))
    assert diagnostics.count_flops(jnp.matmul, a, b) == 2 * 7 * 2 * 3 * 4

    def conv(x, w):
        return jax.lax.conv_general_dilated(
            x, w, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    x, w = jnp.ones((2, 6, 6, 3)), jnp.ones((3, 3, 3, 5))
    assert diagnostics.count_flops(conv, x, w) == 2 * (2 * 4 * 4 * 5) * (3 * 3 * 3)


def test_flops_inside_scan_jit_cond_and_custom_rules():
    w = jnp.ones((4, 4))
    product = jax.jit(lambda x: x @ w)
    rule = jax.custom_vjp(product)
    rule.defvjp(lambda x: (x @ w, x), lambda x, ct: (ct @ w.T,))

    def scanned(x):
        return jax.lax.scan(lambda x, _: (rule(product(x)), None), x, length=10)[0]

    one = 2 * 4 * 4
    assert diagnostics.count_flops(scanned, jnp.ones(4)) == 10 * 2 * one
    branches = lambda x: jax.lax.cond(x[0] > 0, product, lambda x: product(product(x)), x)
    assert diagnostics.count_flops(branches, jnp.ones(4)) == 2 * one


def test_ten_inner_steps_cost_ten_times_one():
    problem = smooth()

    def flops(num_inner_steps, adjoint):
        """Beyond those of no inner step."""

        def count(number):
            learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.1), number, adjoint=adjoint)
            grad = lambda params, tasks: jaxmaml.meta_grad(learner, params, tasks)[1]
            return diagnostics.count_flops(grad, problem.params, problem.tasks)

        return count(num_inner_steps) - count(0)

    assert flops(10, FIRST) == 10 * flops(1, FIRST) > 0
    assert flops(20, EXACT) == 10 * flops(2, EXACT) > 0
    # A single exact step keeps its values, which spares it a gradient that each of several computes.
    assert flops(1, EXACT) < flops(2, EXACT) / 2
