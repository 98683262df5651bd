from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from cases import assert_adjoints_agree, classified, draw, jitter, stacked
from comparing import assert_leaves_close
from flax import nnx

import jaxmaml
from jaxmaml import nn
from jaxmaml.nn.norm import POLICIES, BatchStatisticsNorm, cancels_bias, make_norm
from jaxmaml.nn.normalizer import NORM_EPS

STORED = ("inductive", "running", "per_step")
BY_BATCH = ("transductive", *STORED)
WEIGHTS = np.array([1.0, 0.0, 2.0, 1.0, 0.5])


def options(policy, num_steps: int = 2) -> dict[str, Any]:
    return {"num_steps": num_steps} if policy == "per_step" else {}


def build(policy, num_channels, **options) -> Any:
    return make_norm(policy, num_channels, **options)


def moments(inputs, weights=None):
    """Returns mean and variance of each channel over examples and space."""
    values = np.asarray(inputs).reshape(len(inputs), -1, inputs.shape[-1])
    weights = np.ones(len(values)) if weights is None else weights
    shares = weights[:, None, None] / weights.sum() / values.shape[1]
    mean = (shares * values).sum((0, 1))
    return mean, (shares * (values - mean) ** 2).sum((0, 1))


def standardize(inputs, mean, variance):
    return (inputs - mean) / np.sqrt(variance + NORM_EPS)


def by_groups(num_groups):
    def reference(inputs, weights):
        outputs = np.array(inputs)
        for example in outputs:
            for channels in np.split(np.arange(inputs.shape[-1]), num_groups):
                part = example[..., channels]
                example[..., channels] = standardize(part, part.mean(), part.var())
        return outputs

    return reference


REFERENCES = {
    **dict.fromkeys(BY_BATCH, lambda x, weights: standardize(x, *moments(x, weights))),
    "layer": by_groups(1),
    "group": by_groups(6),  # of 12 channels: as many as divide them, 8 at most
    "none": lambda x, weights: x,
}


@pytest.mark.parametrize("weights", [None, WEIGHTS])
@pytest.mark.parametrize("shape", [(5, 12), (5, 3, 2, 12)])
@pytest.mark.parametrize("scale", [True, False])
@pytest.mark.parametrize("policy", POLICIES)
def test_policies_in_training_mode(x64, policy, scale, shape, weights):
    norm = build(policy, 12, scale=scale, param_dtype=jnp.float64, **options(policy))
    params = jitter(nnx.as_pure(nnx.state(norm, nnx.Param)))
    nnx.update(norm, params)
    inputs = 3 + 2 * draw(0, *shape)
    expected = REFERENCES[policy](inputs, weights)
    if policy != "none":
        assert set(params) == ({"offset", "scale"} if scale else {"offset"})
        row = 0 if policy == "per_step" else ...
        expected = expected * (params["scale"][row] if scale else 1) + params["offset"][row]
    np.testing.assert_allclose(norm(inputs, weights), expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("policy", POLICIES)
def test_policies_in_evaluation_mode(x64, policy):
    norm = build(policy, 12, param_dtype=jnp.float64, **options(policy, num_steps=0))
    batches, inputs = [3 + 2 * draw(i, 5, 12) for i in range(2)], draw(2, 5, 12)
    for batch in batches:
        norm(batch, WEIGHTS)
    norm.eval()
    (mean_1, variance_1), (mean_2, variance_2) = (moments(batch, WEIGHTS) for batch in batches)
    average = 0.09 * mean_1 + 0.1 * mean_2, 0.81 + 0.09 * variance_1 + 0.1 * variance_2
    expected = {
        "inductive": (mean_2, variance_2), "running": average, "per_step": average,
    }.get(policy)  # fmt: skip
    if expected is None:
        np.testing.assert_allclose(norm(inputs), REFERENCES[policy](inputs, None), rtol=1e-9)
    else:
        np.testing.assert_allclose(norm(inputs), standardize(inputs, *expected), rtol=1e-9)


@pytest.mark.parametrize("per_step_weights", [True, False])
def test_per_step_uses_one_row_per_call_and_then_the_last_one(x64, per_step_weights):
    norm = build(
        "per_step", 2, num_steps=2, per_step_weights=per_step_weights, param_dtype=jnp.float64
    )
    offsets = np.array([0.0, 10.0, 20.0]) if per_step_weights else np.zeros(1)
    norm.offset[...] = jnp.repeat(offsets, 2).reshape(norm.offset.shape)
    batches = [3 * i + draw(i, 4, 2) for i in range(4)]
    centers = [norm(batch).mean() for batch in batches]
    assert norm.inner_step[...] == 4
    expected = [0, 10, 20, 20] if per_step_weights else np.zeros(4)
    np.testing.assert_allclose(centers, expected, atol=1e-5)
    means = [0.1 * batch.mean(0) for batch in batches]
    np.testing.assert_allclose(norm.mean[...], [*means[:2], 0.9 * means[2] + means[3]], rtol=1e-6)
    norm.eval()
    norm.inner_step[...] = jnp.int32(1)
    row = norm.mean[...][1], norm.var[...][1]
    expected = standardize(batches[0], *row) + (10 if per_step_weights else 0)
    np.testing.assert_allclose(norm(batches[0]), expected, rtol=1e-5)
    assert norm.inner_step[...] == 2


@pytest.mark.parametrize("policy", POLICIES)
def test_only_transductive_lets_a_query_example_depend_on_others(policy):
    module = nn.MLP(4, 3, hidden=(12,), norm=policy, rngs=nnx.Rngs(0), **options(policy))
    module(draw(0, 6, 4))
    model = nn.from_nnx_with_state(module)
    apply = jax.jit(lambda inputs: model.test_fn(model.params, {"inputs": inputs}, model.state)[0])
    query = draw(1, 5, 4)
    outputs, others = map(apply, (query, query.at[1:].add(draw(2, 4, 4))))
    assert np.allclose(outputs[0], others[0], rtol=1e-6) == (policy != "transductive")
    assert not np.allclose(outputs[1:], others[1:], rtol=1e-3)


def stateful_losses(policy):
    """Returns (loss in training mode, loss in evaluation mode, parameters, state) of a network."""
    module = nn.MLP(
        4, 3, hidden=(6,), norm=policy, param_dtype=jnp.float64, rngs=nnx.Rngs(0),
        **options(policy),
    )  # fmt: skip
    model = nn.from_nnx_with_state(module)
    losses = map(nn.cross_entropy, (model.train_fn, model.test_fn))
    return *losses, jitter(model.params), model.state


@pytest.mark.parametrize(
    ("policy", "refresh"),
    [
        ("per_step", False),
        ("inductive", True),
        *(
            pytest.param(policy, False, marks=pytest.mark.slow)
            for policy in ("inductive", "running")
        ),
    ],
)
def test_meta_gradient_through_state_is_that_of_a_loop_by_hand(x64, policy, refresh):
    loss_fn, query_loss_fn, params, state = stateful_losses(policy)
    task = classified(4)

    @jax.jit
    @jax.grad
    def by_hand(params, state=state):
        for _ in range(2):
            grads, state = jax.grad(loss_fn, has_aux=True)(params, task.support, state)
            state = jax.lax.stop_gradient(state)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grads)
        if refresh:
            _, state = loss_fn(params, task.support, state)
        return query_loss_fn(params, task.query, state)[0]

    grads, info = assert_adjoints_agree(
        loss_fn,
        params,
        task,
        query_loss_fn=query_loss_fn,
        state=state,
        refresh_state=refresh,
    )
    assert_leaves_close(grads, by_hand(params), rtol=1e-10, atol=1e-12)
    assert jax.tree.map(jnp.result_type, info.state) == jax.tree.map(jnp.result_type, state)


@pytest.mark.parametrize("policy", STORED)
def test_state_goes_through_an_outer_step(x64, policy):
    loss_fn, query_loss_fn, params, state = stateful_losses(policy)
    learner = jaxmaml.maml(loss_fn, optax.sgd(0.1), 2, query_loss_fn=query_loss_fn)
    tasks = stacked(classified(4), classified(4, seed=3))
    meta_state = jaxmaml.init_state(learner, optax.adam(1e-2), params, state)
    step = jax.jit(
        lambda meta_state: jaxmaml.meta_step(learner, optax.adam(1e-2), meta_state, tasks)
    )
    meta_state, metrics = step(meta_state)
    assert jnp.isfinite(metrics["query_loss"])
    jax.tree.map(lambda a, b: np.testing.assert_equal(a.dtype, b.dtype), meta_state.state, state)
    stored = meta_state.state["norm"][0]
    assert abs(stored["mean"]).max() > 1e-3
    assert policy != "per_step" or stored["inner_step"] == 3


@pytest.mark.parametrize("policy", STORED)
@pytest.mark.parametrize("dtypes", ["float32 float64", "float64 float32", "bfloat16 bfloat16"])
def test_state_keeps_its_type_whatever_the_inputs_are(x64, policy, dtypes):
    param_dtype, input_dtype = dtypes.split()
    module = nn.MLP(4, 3, norm=policy, param_dtype=param_dtype, rngs=nnx.Rngs(0), **options(policy))
    model = nn.from_nnx_with_state(module)
    params, state = model.params, model.state
    stored = jnp.promote_types(param_dtype, jnp.float32)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} <= {stored, jnp.dtype(jnp.int32)}
    batch = {"inputs": jnp.ones((6, 4), input_dtype)}
    _, new_state = jax.eval_shape(model.train_fn, params, batch, state)
    assert jax.tree.map(lambda leaf: leaf.dtype, new_state) == jax.tree.map(
        lambda leaf: leaf.dtype, state
    )


@pytest.mark.parametrize("weights", [None, jnp.ones(4000)])
def test_batch_statistics_are_accurate_where_the_mean_is_large(weights):
    values = draw(0, 4000, 2).astype(jnp.float32) + 3000
    exact = np.asarray(values, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-3)
    normed = BatchStatisticsNorm(2)(values, weights)
    np.testing.assert_allclose(normed, exact, atol=1e-3)


@pytest.mark.parametrize("policy", POLICIES)
def test_norms_compute_in_float32_at_least(policy):
    values = draw(0, 500, 6).astype(jnp.bfloat16)
    low = build(policy, 6, param_dtype=jnp.bfloat16, **options(policy))
    if policy == "group":
        values = values.reshape(100, 5, 6)
    normed = low(values)
    assert normed.dtype == jnp.bfloat16
    exact = build(policy, 6, **options(policy))(values.astype(jnp.float32))
    np.testing.assert_array_equal(normed, exact.astype(jnp.bfloat16))


@pytest.mark.parametrize(
    ("num_channels", "num_groups"), [(1, 1), (6, 6), (7, 7), (11, 1), (12, 6), (64, 8), (40, 8)]
)
def test_groups_divide_the_channels(num_channels, num_groups):
    assert build("group", num_channels).num_groups == num_groups


@pytest.mark.parametrize(
    ("build", "named"),
    [
        (lambda: make_norm("batch", 4), "norm must be one of transductive, inductive, .*'batch'"),
        (lambda: make_norm(True, 4), "norm must be one of .* got True"),  # type: ignore[arg-type]
        (lambda: make_norm("layer", 0), "num_channels"),
        (lambda: make_norm("per_step", 4), "needs num_steps.* got None"),
        (lambda: make_norm("per_step", 4, num_steps=-1), "num_steps must be .* 0 or more; got -1"),
        (lambda: make_norm("running", 4, num_steps=1), "num_steps is for norm='per_step' only"),
        (lambda: make_norm("running", 4, momentum=1.0), "momentum"),
        (lambda: make_norm("group", 4)(jnp.ones((3, 4))), "a group of one number"),
        (lambda: nn.MLP(1, 1, norm="batch", rngs=nnx.Rngs(0)), "norm must be one of"),
        (lambda: nn.Conv4(5, norm="batch", rngs=nnx.Rngs(0)), "norm must be one of"),
    ],
)
def test_norms_name_what_is_wrong(build, named):
    with pytest.raises(ValueError, match=named):
        build()


@pytest.mark.parametrize("count", ["num_channels", "num_steps"])
def test_counts_are_integers(count):
    counts: dict[str, Any] = {"num_channels": 4, "num_steps": 2} | {count: 2.0}
    with pytest.raises(TypeError, match=f"{count} must be an integer"):
        make_norm("per_step", **counts)


@pytest.mark.parametrize("num_channels", [1, 4, 12])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_policy_says_whether_it_cancels_a_bias(policy, num_channels):
    norm = build(policy, num_channels, **options(policy))
    values, bias = draw(0, 6, 2, num_channels), jnp.arange(1.0, num_channels + 1)
    same = np.allclose(norm(values + bias), norm(values), atol=1e-5)
    assert cancels_bias(policy, num_channels) == same
