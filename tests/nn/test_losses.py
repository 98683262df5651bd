import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_adjoints_agree, draw
from cases import classified as classified_task
from flax import nnx

import jaxmaml
from jaxmaml import nn
from jaxmaml.types import carries_state, with_state


def linear(params, inputs):
    return inputs @ params


def stateful(params, batch, state):
    return batch["inputs"] @ params, state + 1


LOGITS = np.array([[2.0, 0.0, 1.0], [0.0, 3.0, 0.0], [1.0, 1.0, 1.0]])
CROSS_ENTROPIES = np.log(np.exp(LOGITS).sum(1)) - LOGITS[[0, 1, 2], [0, 2, 1]]
SQUARED_ERRORS = np.array([1.0, 9.0, 4.0])


def classified(**extra):
    return {"inputs": jnp.array(LOGITS), "targets": jnp.array([0, 2, 1]), **extra}


def regressed(**extra):
    inputs = jnp.array([[1.0], [2.0], [3.0]])
    return {"inputs": inputs, "targets": jnp.array([[0.0], [5.0], [1.0]]), **extra}


def judged(**extra):
    inputs = jnp.array([[2.0], [-1.0], [0.5]])
    return {"inputs": inputs, "targets": jnp.array([0, 1, 1]), **extra}


BINARY_CROSS_ENTROPIES = np.log1p(np.exp([2.0, 1.0, -0.5]))

CASES = [
    (nn.cross_entropy, classified, jnp.eye(3), CROSS_ENTROPIES),
    (nn.mean_squared_error, regressed, jnp.eye(1), SQUARED_ERRORS),
    (nn.binary_cross_entropy, judged, jnp.eye(1), BINARY_CROSS_ENTROPIES),
    (nn.binary_cross_entropy, judged, jnp.ones(1), BINARY_CROSS_ENTROPIES),
]


@pytest.mark.parametrize(("loss", "batch", "params", "values"), CASES)
def test_losses_are_means_and_weighted_means(loss, batch, params, values):
    loss_fn = loss(nn.from_function(linear))
    np.testing.assert_allclose(loss_fn(params, batch()), values.mean(), rtol=1e-6)
    for weights in (np.array([2.0, 0.5, 1.0]), np.array([1, 0, 3]), np.array([True, False, True])):
        weighted = loss_fn(params, batch(weights=jnp.array(weights)))
        assert weighted.shape == ()
        np.testing.assert_allclose(weighted, weights @ values / weights.sum(), rtol=1e-6)


@pytest.mark.parametrize(("loss", "batch", "params", "values"), CASES)
def test_the_loss_of_a_stateful_model_is_marked_and_carries_its_state(loss, batch, params, values):
    weights = np.array([2.0, 0.5, 1.0])
    assert not carries_state(loss(nn.from_function(linear)))
    loss_fn = loss(with_state(stateful))
    assert carries_state(loss_fn)
    value, state = loss_fn(params, batch(weights=jnp.array(weights)), 6)
    np.testing.assert_allclose(value, weights @ values / weights.sum(), rtol=1e-6)
    assert state == 7


RIGHT = np.array([1.0, 0.0, 0.0])
"""Whether the largest logit is the target's; of equal logits the first is taken."""


def test_accuracy_is_a_mean_and_a_weighted_mean():
    metric_fn = nn.accuracy(nn.from_function(linear))
    np.testing.assert_allclose(metric_fn(jnp.eye(3), classified()), 1 / 3, rtol=1e-6)
    for weights in (np.array([2.0, 0.5, 1.0]), np.array([1, 0, 3]), np.array([True, False, True])):
        value = metric_fn(jnp.eye(3), classified(weights=jnp.array(weights)))
        assert value.shape == ()
        np.testing.assert_allclose(value, weights @ RIGHT / weights.sum(), rtol=1e-6)


def test_accuracy_is_nan_if_a_logit_of_an_example_that_counts_is_not_finite():
    metric_fn = nn.accuracy(nn.from_function(linear))
    for junk in (jnp.nan, jnp.inf):
        batch = classified()
        batch["inputs"] = batch["inputs"].at[1, 0].set(junk)
        assert jnp.isnan(metric_fn(jnp.eye(3), batch))
        assert metric_fn(jnp.eye(3), batch | {"weights": jnp.array([1.0, 0.0, 0.0])}) == 1
        assert metric_fn(jnp.eye(3), batch | {"weights": jnp.array([3.0, 0.0, 1.0])}) == 0.75
        assert jnp.isnan(metric_fn(jnp.eye(3), batch | {"weights": jnp.array([1.0, 0.5, 0.0])}))
    assert jnp.isnan(metric_fn(jnp.full((3, 3), jnp.nan), classified()))


def test_accuracy_does_not_look_at_the_targets_of_padding():
    batch = classified(targets=jnp.array([0, 99, 0]), weights=jnp.array([1.0, 0.0, 1.0]))
    assert nn.accuracy(nn.from_function(linear))(jnp.eye(3), batch) == 1


def test_accuracy_of_a_stateful_model_is_marked_and_carries_its_state():
    metric_fn = nn.accuracy(with_state(stateful))
    assert carries_state(metric_fn)
    weights = jnp.array([3.0, 0.0, 1.0])
    assert metric_fn(jnp.eye(3), classified(weights=weights), 6) == (0.75, 7)


def test_accuracy_goes_into_evaluate():
    apply_fn, params = nn.from_nnx(nn.MLP(4, 3, hidden=(), rngs=nnx.Rngs(0)))
    learner = jaxmaml.maml(nn.cross_entropy(apply_fn), optax.sgd(2.0), 20)
    meta_state = jaxmaml.init_state(learner, optax.adam(1e-3), params)
    task = classified_task(4)
    tasks = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), task._replace(query=task.support))
    scores = jaxmaml.evaluate(learner, nn.accuracy(apply_fn), meta_state, tasks)
    assert scores.shape == (2, 21)
    before = (apply_fn(params, task.support).argmax(-1) == task.support["targets"]).mean()
    np.testing.assert_allclose(scores[:, 0], before, rtol=1e-6)
    assert (scores[:, -1] == 1).all()
    assert before < 1


def test_targets_may_have_further_axes():
    batch = {"inputs": jnp.ones((2, 4, 3)), "targets": jnp.zeros((2, 4), int)}
    batch["weights"] = jnp.array([1.0, 3.0])
    loss = nn.cross_entropy(nn.from_function(linear))(jnp.zeros((3, 5)), batch)
    np.testing.assert_allclose(loss, np.log(5), rtol=1e-6)
    batch["targets"] = jnp.array([[0, 1, 0, 0], [1, 1, 0, 1]])  # 3/4 and 1/4 of the equal logits
    share = nn.accuracy(nn.from_function(linear))(jnp.zeros((3, 5)), batch)
    np.testing.assert_allclose(share, (1 * 3 / 4 + 3 * 1 / 4) / 4, rtol=1e-6)


@pytest.mark.parametrize("norm", [None, "transductive", "layer"])
@pytest.mark.parametrize("classify", [False, True])
def test_a_padded_batch_has_the_loss_and_gradient_of_the_unpadded_one(x64, classify, norm):
    module = nn.MLP(4, 3, norm=norm, param_dtype=jnp.float64, rngs=nnx.Rngs(0))
    apply_fn, params = nn.from_nnx(module)
    generator = np.random.default_rng(0)
    batch = {"inputs": jnp.array(generator.normal(size=(5, 4)))}
    if classify:
        batch["targets"] = jnp.array(generator.integers(0, 3, 5))
        loss_fn, target_junk = nn.cross_entropy(apply_fn), 99
    else:
        batch["targets"] = jnp.array(generator.normal(size=(5, 3)))
        loss_fn, target_junk = nn.mean_squared_error(apply_fn), jnp.nan
    padded = {
        "inputs": jnp.concatenate([batch["inputs"], jnp.full((2, 4), jnp.nan)]),
        "targets": jnp.concatenate(
            [batch["targets"], jnp.full_like(batch["targets"][:2], target_junk)]
        ),
        "weights": jnp.array([1.0] * 5 + [0.0] * 2),
    }
    value_and_grad = jax.jit(jax.value_and_grad(loss_fn))
    expected, actual = value_and_grad(params, batch), value_and_grad(params, padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-14), actual, expected
    )


def test_a_padded_image_batch_has_the_loss_and_gradient_of_the_unpadded_one(x64):
    module = nn.Conv4(
        3,
        image_shape=(16, 16, 1),
        num_filters=4,
        param_dtype=jnp.float64,
        rngs=nnx.Rngs(0),
    )
    apply_fn, params = nn.from_nnx(module)
    images = jnp.array(np.random.default_rng(0).normal(size=(6, 16, 16, 1)))
    batch = {"inputs": images, "targets": jnp.array([0, 1, 2, 0, 1, 2])}
    padded = {
        "inputs": jnp.concatenate([images, jnp.full((2, 16, 16, 1), jnp.inf)]),
        "targets": jnp.array([0, 1, 2, 0, 1, 2, -1, -1]),
        "weights": jnp.array([1.0] * 6 + [0.0] * 2),
    }
    value_and_grad = jax.jit(jax.value_and_grad(nn.cross_entropy(apply_fn)))
    expected, actual = value_and_grad(params, batch), value_and_grad(params, padded)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12), actual, expected
    )


def test_padding_is_kept_out_of_any_model():
    loss_fn = nn.mean_squared_error(nn.from_function(linear))
    batch = regressed(weights=jnp.array([1.0, 0.0, 1.0]))
    batch["inputs"] = batch["inputs"].at[1].set(jnp.nan)
    assert jax.grad(loss_fn)(jnp.eye(1), batch) == (2 * 1 * 1 + 2 * 2 * 3) / 2


@pytest.mark.parametrize(("loss", "batch", "params", "_values"), CASES)
def test_losses_keep_dtype_and_ranks(x64, loss, batch, params, _values):
    loss_fn = loss(nn.from_function(linear))
    with jax.numpy_rank_promotion("raise"):
        for dtype in (jnp.float32, jnp.float64):
            for weights in ({}, {"weights": jnp.ones(3)}):
                case = batch(**weights)
                case["inputs"] = case["inputs"].astype(dtype)
                if loss is nn.mean_squared_error:
                    case["targets"] = case["targets"].astype(dtype)
                value = jax.eval_shape(loss_fn, params.astype(dtype), case)
                assert value.dtype == dtype


@pytest.mark.parametrize(
    ("loss", "batch", "error", "named"),
    [
        (nn.cross_entropy, classified(targets=jnp.zeros(3)), TypeError, "targets must be integer"),
        (nn.cross_entropy, classified(targets=jnp.zeros((3, 1), int)), ValueError, "targets"),
        (nn.cross_entropy, classified(targets=jnp.zeros(2, int)), ValueError, "targets"),
        (nn.cross_entropy, classified(targets=jnp.int32(0)), ValueError, "targets"),
        (nn.mean_squared_error, classified(targets=jnp.zeros(3)), ValueError, "targets"),
        (nn.mean_squared_error, classified(targets=jnp.zeros((3, 1))), ValueError, "targets"),
        (nn.mean_squared_error, classified(weights=jnp.ones(2)), ValueError, "weights"),
        (nn.cross_entropy, classified(weights=jnp.ones((3, 1))), ValueError, "weights"),
        (nn.binary_cross_entropy, classified(), ValueError, "logits must be \\[num_examples\\]"),
        (nn.binary_cross_entropy, classified(targets=jnp.ones((3, 3))), ValueError, "logits"),
        (nn.binary_cross_entropy, judged(targets=jnp.ones((3, 2))), ValueError, "targets must be"),
        (
            nn.binary_cross_entropy,
            judged(targets=jnp.ones((3, 1)) * 1j),
            TypeError,
            "targets must be real",
        ),
        (
            nn.mean_squared_error,
            regressed(targets=jnp.ones((3, 1)) * 1j),
            TypeError,
            "targets must be real",
        ),
        (nn.cross_entropy, classified(weights=jnp.ones(3) * 1j), TypeError, "weights must be real"),
        (nn.cross_entropy, {"inputs": jnp.ones((3, 3))}, ValueError, "'targets'"),
        (nn.cross_entropy, (jnp.ones((3, 3)), jnp.zeros(3)), TypeError, "batch"),
        (nn.cross_entropy, {"targets": jnp.zeros(3, int)}, ValueError, "'inputs'"),
        (nn.accuracy, classified(targets=jnp.zeros(3)), TypeError, "targets must be integer"),
        (nn.accuracy, classified(targets=jnp.zeros((3, 1), int)), ValueError, "targets"),
        (nn.accuracy, classified(weights=jnp.ones(2)), ValueError, "weights"),
        (nn.accuracy, {"inputs": jnp.ones((3, 3))}, ValueError, "'targets'"),
        (nn.accuracy, (jnp.ones((3, 3)), jnp.zeros(3)), TypeError, "batch"),
    ],
)
def test_losses_name_what_is_wrong(loss, batch, error, named):
    loss_fn = loss(nn.from_function(linear))
    params = jnp.eye(jnp.shape(batch["inputs"])[-1] if "inputs" in batch else 3)
    with pytest.raises(error, match=named):
        jax.eval_shape(loss_fn, params, batch)


WRONG = [
    (nn.cross_entropy, classified, {"targets": jnp.array([0, -1, 1])}, "classes in 0..2; got -1"),
    (nn.cross_entropy, classified, {"targets": jnp.array([0, 3, 1])}, "classes in 0..2; got 3"),
    (nn.accuracy, classified, {"targets": jnp.array([0, -1, 1])}, "classes in 0..2; got -1"),
    (nn.accuracy, classified, {"targets": jnp.array([0, 3, 1])}, "classes in 0..2; got 3"),
    (nn.binary_cross_entropy, judged, {"targets": jnp.array([0, 2, 1])}, "in 0..1; got 2"),
    (nn.binary_cross_entropy, judged, {"targets": jnp.array([0, -0.5, 1])}, "in 0..1; got -0.5"),
    *(
        (score, batch, {"weights": jnp.array([2.0, weight, 1.0])}, "0 or more and finite; got")
        for score, batch in [
            (nn.cross_entropy, classified),
            (nn.accuracy, classified),
            (nn.mean_squared_error, regressed),
            (nn.binary_cross_entropy, judged),
        ]
        for weight in (-1.0, jnp.nan, jnp.inf)
    ),
]


@pytest.mark.parametrize(("score", "batch", "wrong", "message"), WRONG)
def test_a_wrong_target_or_weight_is_refused_or_where_it_is_traced_nan(
    score, batch, wrong, message
):
    score_fn, batch = score(nn.from_function(linear)), batch(**wrong)
    params = jnp.eye(batch["inputs"].shape[-1])
    with pytest.raises(ValueError, match=message):
        score_fn(params, batch)
    value, grad = jax.jit(jax.value_and_grad(score_fn))(params, batch)
    assert jnp.isnan(value)
    if score is not nn.accuracy:
        assert jnp.isnan(grad).any()


def test_a_wrong_target_of_the_support_is_not_adapted_on():
    """A constant NaN would have a gradient of zero, and leave a finite query loss."""
    loss_fn = nn.cross_entropy(nn.from_function(linear))
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 1)
    task = jaxmaml.Task(classified(targets=jnp.array([0, -1, 1])), classified())
    with pytest.raises(ValueError, match="got -1"):
        learner.loss(jnp.eye(3), task)
    value_and_grad = jax.jit(jax.value_and_grad(learner.loss, has_aux=True))
    (loss, _), grad = value_and_grad(jnp.eye(3), task)
    assert jnp.isnan(loss)
    assert jnp.isnan(grad).any()


def test_binary_targets_may_have_the_shape_of_the_logits():
    loss_fn = nn.binary_cross_entropy(nn.from_function(linear))
    loss = loss_fn(jnp.eye(1), judged(targets=jnp.array([[0], [1], [1]])))
    np.testing.assert_allclose(loss, BINARY_CROSS_ENTROPIES.mean(), rtol=1e-6)


def test_targets_of_a_narrow_type_serve_more_ways_than_it_can_count():
    batch = {"inputs": jnp.ones((2, 3)), "targets": jnp.array([0, 1], jnp.int8)}
    loss = nn.cross_entropy(nn.from_function(linear))(jnp.zeros((3, 300)), batch)
    np.testing.assert_allclose(loss, np.log(300), rtol=1e-6)


@pytest.mark.parametrize("as_type", [int, float, bool])
def test_binary_targets_may_be_of_any_type(as_type):
    loss_fn = nn.binary_cross_entropy(nn.from_function(linear))
    batch = judged(targets=jnp.array([0, 1, 1]).astype(as_type))
    np.testing.assert_allclose(
        loss_fn(jnp.ones(1), batch), BINARY_CROSS_ENTROPIES.mean(), rtol=1e-6
    )


@pytest.mark.parametrize("loss", [nn.mean_squared_error, nn.binary_cross_entropy])
def test_integer_outputs_are_refused(loss):
    batch = {"inputs": jnp.ones((3, 1), int), "targets": jnp.ones((3, 1))}
    with pytest.raises(TypeError, match=r"(predictions|logits) must be floating-point"):
        loss(nn.from_function(linear))(jnp.ones((1, 1), int), batch)


@pytest.mark.parametrize("columns", [(), (1,)])
def test_binary_classification(x64, columns):
    inputs, targets = draw(0, 6, 4), jnp.array([0, 1, 1, 0, 1, 0])
    weights = jnp.array([1.0, 2.0, 0.0, 1.0, 1.0, 0.5])
    loss_fn = nn.binary_cross_entropy(nn.from_function(lambda params, x: x @ params))
    batch = {"inputs": inputs, "targets": targets, "weights": weights}
    params = draw(1, 4, *columns)
    probability = 1 / (1 + np.exp(-inputs @ params.reshape(4)))
    expected = (weights * (probability - targets)) @ inputs / weights.sum()
    grad = jax.grad(loss_fn)(params, batch)
    np.testing.assert_allclose(grad.reshape(4), expected, rtol=1e-10)
    task = classified_task(4, way=2)
    assert_adjoints_agree(loss_fn, params, task)


@pytest.mark.parametrize("make", [nn.cross_entropy, nn.mean_squared_error])
def test_large_weights_do_not_overflow_in_half_precision(make):
    loss_fn = make(nn.from_function(lambda params, inputs: inputs * params))
    targets = jnp.array([0, 1]) if make is nn.cross_entropy else jnp.zeros((2, 2), jnp.float16)
    batch = {"inputs": jnp.eye(2, dtype=jnp.float16), "targets": targets}
    found = []
    for weights in (jnp.ones(2), jnp.full(2, 6e4)):
        value = jax.value_and_grad(loss_fn)(jnp.float16(0.5), {**batch, "weights": weights})
        assert {leaf.dtype for leaf in value} == {jnp.dtype("float16")}
        found.append(value)
    np.testing.assert_allclose(*found, rtol=2e-3)
