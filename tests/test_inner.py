"""The inner loop: masks, keys, state, steps, and the errors a user meets."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from problems import smooth

import jaxmaml


def _loss(params, batch):
    return jnp.mean((params["a"] + params["b"] - batch) ** 2)


PARAMS = {"a": jnp.array(1.0), "b": jnp.array(2.0)}


@pytest.mark.parametrize(
    "mask",
    [{"a": True, "b": False}, lambda path: path == "a", {"a": np.True_, "b": 0}],
    ids=["tree", "path", "tree of other truths"],
)
def test_mask_adapts_what_it_names_and_the_rest_is_outer_learned(mask):
    adapted, _ = jaxmaml.adapt(_loss, PARAMS, jnp.zeros(3), optax.adam(0.1), 2, mask=mask)
    assert adapted["b"] == 2.0
    assert adapted["a"] < 1.0
    learner = jaxmaml.maml(_loss, optax.sgd(0.1), 1, mask=mask)
    task = jaxmaml.Task(jnp.zeros(3), jnp.zeros(3))
    grads, _ = jax.grad(learner.loss, has_aux=True)(PARAMS, task)
    # a' = a - 0.2 (a + b): d(a' + b)²/da = d/db = 2 (a' + b) 0.8
    np.testing.assert_allclose(jax.tree.leaves(grads), 2 * 2.4 * 0.8, rtol=1e-6)


def test_mask_by_prefix():
    params = {"body": {"w": jnp.ones(2), "b": jnp.ones(2)}, "head": jnp.ones(2)}
    loss = lambda params, batch: (
        sum(jnp.sum(x**2) for x in jax.tree.leaves(params)) + 0 * batch.sum()
    )
    mask = {"body": False, "head": True}
    adapted, _ = jaxmaml.adapt(loss, params, jnp.zeros(1), optax.sgd(0.1), 1, mask=mask)
    np.testing.assert_array_equal(adapted["body"]["w"], 1.0)
    np.testing.assert_allclose(adapted["head"], 0.8)


def test_no_optimizer_state_is_stored_for_what_is_not_adapted():
    sizes = []

    def init(params):
        sizes.append(len(jax.tree.leaves(params)))
        return ()

    optimizer = optax.GradientTransformation(
        init, lambda updates, state, params=None: (updates, state)
    )
    jaxmaml.adapt(_loss, PARAMS, jnp.zeros(3), optimizer, 1, mask={"a": True, "b": False})
    assert set(sizes) == {1}


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ({"a": False, "b": False}, "matches no parameter"),
        (lambda path: path == "c", "matches no parameter"),
        ({"a": True}, "structure of the parameters"),
    ],
)
def test_wrong_masks_are_refused(mask, message):
    with pytest.raises(ValueError, match=message):
        jaxmaml.adapt(_loss, PARAMS, jnp.zeros(3), optax.sgd(0.1), 1, mask=mask)


def test_keys_in_the_batch_differ_from_step_to_step():
    seen = []

    def loss(params, batch):
        jax.debug.callback(seen.append, jax.random.uniform(batch["key"][0]))
        return jnp.sum(params**2)

    batch = {"key": jax.random.split(jax.random.key(0), 2)}
    jaxmaml.adapt(loss, jnp.array(1.0), batch, optax.sgd(0.1), 3, adjoint=jaxmaml.FirstOrder())
    jax.effects_barrier()
    assert len({float(x) for x in seen}) == 3


def test_at_step_may_select_minibatches_and_rows_of_parameters():
    params = {"w": jnp.array(0.0), "offset": jnp.array([1.0, 2.0, 3.0])}
    support = jnp.array([[1.0], [2.0]])

    def at_step(params, batch, step):
        row = params["offset"][jnp.minimum(step, 2)]
        return {"w": params["w"], "offset": row}, batch[jnp.minimum(step, 1)]

    def loss(params, batch):
        return jnp.mean((params["w"] + params["offset"] - batch) ** 2) / 2

    run = lambda params: jaxmaml.adapt(
        loss, params, support, optax.sgd(0.5), 2, at_step=at_step,
        mask={"w": True, "offset": False},
    )[0]  # fmt: skip
    adapted = run(params)
    # w: 0 -> 0 - .5 (0 + 1 - 1) = 0 -> 0 - .5 (0 + 2 - 2) = 0, and row 2 is answered
    assert adapted["w"] == 0.0
    assert adapted["offset"] == 3.0
    grads = jax.grad(lambda p: run(p)["w"])(params)
    np.testing.assert_allclose(grads["offset"], [-0.25, -0.5, 0.0])


def test_state_goes_through_the_inner_loop_and_is_not_differentiated():
    @jaxmaml.with_state
    def loss(params, batch, state):
        return jnp.mean((params - batch) ** 2) + 0 * state, state + params

    def run(params):
        adapted, info = jaxmaml.adapt(
            loss, params, jnp.zeros(2), optax.sgd(0.25), 2, state=jnp.array(10.0)
        )
        return info.state, adapted

    state, adapted = run(jnp.array(1.0))
    assert (float(state), float(adapted)) == (10 + 1 + 0.5, 0.25)
    assert jax.grad(lambda p: run(p)[0])(1.0) == 0
    views = jaxmaml.trace(
        loss, jnp.array(1.0), jnp.zeros(2), lambda adapted, state: state, optax.sgd(0.25), 2,
        state=jnp.array(10.0),
    )  # fmt: skip
    np.testing.assert_allclose(views, [10, 11, 11.5])


@pytest.mark.parametrize("adjoint", [jaxmaml.Exact(), jaxmaml.FirstOrder()])
def test_no_steps_return_the_parameters(adjoint):
    adapted, info = jaxmaml.adapt(_loss, PARAMS, jnp.zeros(3), optax.adam(0.1), 0, adjoint=adjoint)
    assert adapted == PARAMS
    assert info.inner_losses.shape == (0,)


def test_inner_losses_are_those_before_each_step():
    loss = lambda params, batch: jnp.mean((params - batch) ** 2)
    _, info = jaxmaml.adapt(loss, jnp.array(1.0), jnp.zeros(2), optax.sgd(0.25), 3)
    np.testing.assert_allclose(info.inner_losses, [1, 1 / 4, 1 / 16])


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"adjoint": "first"}, TypeError, r"adjoint must be an adjoint such as jaxmaml.Exact\(\)"),
        (
            {"num_inner_steps": -1},
            ValueError,
            "num_inner_steps must be an integer, 0 or more; got -1",
        ),
        (
            {"num_inner_steps": 1.5},
            TypeError,
            "num_inner_steps must be an integer, 0 or more; got 1.5",
        ),
    ],
)
def test_errors_come_when_the_learner_is_made(change, error, message):
    options = {"num_inner_steps": 1} | change
    with pytest.raises(error, match=message):
        jaxmaml.maml(_loss, optax.sgd(0.1), **options)
    with pytest.raises(error, match=message):
        jaxmaml.adapt(_loss, PARAMS, jnp.zeros(3), optax.sgd(0.1), **options)


@pytest.mark.parametrize("adjoint", [jaxmaml.Exact(), jaxmaml.FirstOrder()])
def test_loss_with_state_must_return_a_pair(adjoint):
    loss_fn = jaxmaml.with_state(
        lambda params, batch, state: jnp.sum(params**2)  # pyright: ignore[reportArgumentType]
    )
    with pytest.raises(TypeError, match="pair"):
        jaxmaml.adapt(loss_fn, jnp.array(1.0), jnp.zeros(2), optax.sgd(0.1), 1, adjoint=adjoint)


def test_segments_bound_the_memory_of_long_inner_loops():
    problem = smooth()
    task = jax.tree.map(lambda x: x[0], problem.tasks)

    def temp_bytes(checkpoint_every):
        adjoint = jaxmaml.Exact(checkpoint_every=checkpoint_every)
        learner = jaxmaml.maml(problem.loss_fn, optax.sgd(0.01), 400, adjoint=adjoint)
        compiled = (
            jax.jit(jax.grad(learner.loss, has_aux=True)).lower(problem.params, task).compile()
        )
        analysis = compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    num_bytes = sum(leaf.nbytes for leaf in jax.tree.leaves(problem.params))
    assert temp_bytes(None) > 400 * num_bytes
    assert temp_bytes(20) < 100 * num_bytes


def test_an_inner_loop_in_pieces_is_the_whole_loop():
    # The state of an Adam outlives the pieces, and its derivative passes through them.
    loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    optimizer, support = optax.adam(0.1), jnp.arange(3.0)

    def whole(params):
        return jaxmaml.adapt(loss_fn, params, support, optimizer, 4)[0]

    def pieces(params):
        adapted, info = jaxmaml.adapt(loss_fn, params, support, optimizer, 1)
        return jaxmaml.adapt(
            loss_fn, adapted, support, optimizer, 3, opt_state=info.opt_state
        )[0]  # fmt: skip

    expected = jax.jit(jax.value_and_grad(whole))(jnp.array(0.5))
    found = jax.jit(jax.value_and_grad(pieces))(jnp.array(0.5))
    np.testing.assert_allclose(found, expected, rtol=1e-6)


# The states of the last two hold the same arrays.
@pytest.mark.parametrize(
    ("one", "other"),
    [(optax.adam(0.1), optax.sgd(0.1)), (optax.scale_by_belief(), optax.scale_by_adam())],
)
def test_the_state_of_another_optimizer_is_refused(one, other):
    loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    _, info = jaxmaml.adapt(loss_fn, jnp.array(0.0), jnp.ones(3), one, 1)
    with pytest.raises(ValueError, match="opt_state belongs to another optimizer"):
        jaxmaml.adapt(loss_fn, jnp.array(0.0), jnp.ones(3), other, 1, opt_state=info.opt_state)


@pytest.mark.parametrize("adjoint", [jaxmaml.Exact(), jaxmaml.Implicit()])
def test_counters_and_keys_of_a_state_pass_every_adjoint(adjoint):
    def loss_fn(params, batch, state):
        return jnp.mean((params - batch) ** 2), {**state, "count": state["count"] + 1}

    state = {"count": jnp.array(70_000), "small": jnp.array(3, jnp.int8), "on": jnp.array(True)}
    state["key"] = jax.random.key(5)

    def final(params):
        adapted, info = jaxmaml.adapt(
            jaxmaml.with_state(loss_fn), params, jnp.ones(3), optax.adam(0.1), 2,
            adjoint=adjoint, state=state,
        )  # fmt: skip
        return adapted, info.state

    grads, after = jax.jit(jax.grad(final, has_aux=True))(jnp.array(0.0))
    assert int(after["count"]) == 70_002
    assert after["small"].dtype == jnp.int8
    assert bool(after["on"])
    assert int(after["small"]) == 3
    assert bool(after["key"] == state["key"])
    assert np.isfinite(grads)


@pytest.mark.parametrize("key", [jax.random.PRNGKey(0), jax.random.split(jax.random.PRNGKey(0), 3)])
def test_a_raw_key_in_the_batch_is_refused(key):
    loss_fn = lambda params, batch: jnp.mean((params - batch["x"]) ** 2)
    with pytest.raises(TypeError, match=r"'key' holds uint32.*wrap_key_data"):
        jaxmaml.adapt(loss_fn, jnp.array(0.0), {"x": jnp.ones(3), "key": key}, optax.sgd(0.1), 1)
