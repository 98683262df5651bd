"""The gradient with its own derivative rule, against plain autodiff in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree

import jaxmaml
from jaxmaml import mixed_mode

MODES = ("forward_over_reverse", "reverse", "checkpoint")
pytestmark = pytest.mark.usefixtures("x64")


def _loss(params, batch):
    hidden = jnp.tanh(batch["inputs"] @ params["w"])
    return jnp.mean(batch["weights"] * (hidden.sum(-1) - batch["targets"]) ** 2)


def _inputs():
    rng = np.random.default_rng(0)
    params = {"w": jnp.asarray(rng.normal(size=(3, 4)))}
    batch = {
        "inputs": jnp.asarray(rng.normal(size=(5, 3))),
        "targets": jnp.asarray(rng.normal(size=5)),
        "weights": jnp.asarray(rng.uniform(size=5)),
        "count": jnp.arange(5),
        "key": jax.random.key(0),
    }
    return params, batch


def _after_two_steps(mode, loss=_loss):
    """A function of (parameters, float leaves of the batch) through two gradient steps."""
    _, batch = _inputs()

    def meta_loss(params, floats):
        full, value = batch | floats, 0.0
        for _ in range(2):
            value, grad = mixed_mode.value_and_grad(loss, mode=mode)(params, full)
            params = jax.tree.map(lambda p, g: p - 0.1 * g, params, grad)
        return loss(params, full) + value

    return meta_loss


def _floats():
    _, batch = _inputs()
    return {name: batch[name] for name in ("inputs", "targets", "weights")}


def _assert_equal(found, expected, relative=1e-13):
    found, expected = ravel_pytree(found)[0], ravel_pytree(expected)[0]
    assert np.linalg.norm(found - expected) <= relative * np.linalg.norm(expected)


@pytest.mark.parametrize("mode", ["forward_over_reverse", "checkpoint"])
def test_gradient_of_every_differentiable_input(mode):
    args = _inputs()[0], _floats()
    expected = jax.grad(_after_two_steps("reverse"), (0, 1))(*args)
    _assert_equal(jax.jit(jax.grad(_after_two_steps(mode), (0, 1)))(*args), expected)


@pytest.mark.parametrize(
    "derivative",
    [
        pytest.param(lambda f: jax.hessian(f), id="forward-over-reverse"),
        pytest.param(lambda f: jax.jacrev(jax.grad(f)), id="reverse-over-reverse"),
    ],
)
def test_second_derivatives_of_the_meta_loss(derivative):
    args = _inputs()[0], _floats()
    expected = derivative(_after_two_steps("reverse"))(*args)
    _assert_equal(jax.jit(derivative(_after_two_steps("forward_over_reverse")))(*args), expected)


@pytest.mark.parametrize("mode", MODES)
def test_closed_over_values_of_every_kind_inside_jit_scan_and_vmap(mode):
    params, batch = _inputs()

    def meta_loss(rate, number, key):
        def loss(params, batch):
            noise = jax.random.normal(key, batch["targets"].shape)
            return _loss(params, batch | {"targets": batch["targets"] + rate * number * noise})

        def step(params, _):
            value, grad = mixed_mode.value_and_grad(loss, mode=mode)(params, batch)
            return jax.tree.map(lambda p, g: p - rate * g, params, grad), value

        return loss(jax.lax.scan(step, params, length=3)[0], batch)

    rates, numbers = jnp.array([0.1, 0.2]), jnp.array([1, 2])
    keys = jax.random.split(jax.random.key(1), 2)
    # jit inside grad: the backward pass runs when the trace of the forward pass is long closed.
    grads = jax.vmap(jax.grad(jax.jit(meta_loss)))(rates, numbers, keys)
    h = 1e-6
    for i in range(2):
        up, down = (meta_loss(rates[i] + d, numbers[i], keys[i]) for d in (h, -h))
        np.testing.assert_allclose(grads[i], (up - down) / (2 * h), rtol=1e-6)


def test_aux_costs_no_second_forward_pass_and_is_not_differentiated():
    params, batch = _inputs()
    calls = []

    def loss(params, batch):
        jax.debug.callback(lambda: calls.append(1))
        value = _loss(params, batch)
        return value, {"seen": value}

    def both(params):
        (value, aux), grad = mixed_mode.value_and_grad(loss, has_aux=True)(params, batch)
        return value + aux["seen"] + 0 * grad["w"].sum()

    expected = jax.grad(lambda params: _loss(params, batch))(params)
    jax.jit(mixed_mode.value_and_grad(loss, has_aux=True))(params, batch)[0][0].block_until_ready()
    jax.effects_barrier()
    assert len(calls) == 1
    _assert_equal(jax.grad(both)(params), expected)


def test_a_loss_that_nothing_depends_on_costs_no_gradient_of_the_parameters():
    """Stacked layers in a scan, whose gradient is as large as they are."""
    layers = jax.ShapeDtypeStruct((64, 32, 32), jnp.float32)
    x = jax.ShapeDtypeStruct((1, 32), jnp.float32)

    def loss(layers, x):
        return jnp.sum(jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, layers)[0])

    def memory(weight):
        def meta_loss(layers, x):
            value, grads = mixed_mode.value_and_grad(loss)(layers, x)
            return jnp.sum(grads**2) + (weight * value if weight else 0)

        analysis = jax.jit(jax.grad(meta_loss)).lower(layers, x).compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes / layers.size / layers.dtype.itemsize

    assert memory(0.0) < memory(2.0) - 0.9


def test_forward_mode_from_outside_is_explained():
    params, batch = _inputs()
    run = mixed_mode.value_and_grad(_loss)
    with pytest.raises(TypeError, match="mode='reverse'"):
        jax.jvp(lambda p: run(p, batch)[1], (params,), (params,))
    plain = mixed_mode.value_and_grad(_loss, mode="reverse")
    assert np.isfinite(jax.jvp(lambda p: plain(p, batch)[1], (params,), (params,))[1]["w"]).all()


def test_forward_mode_through_adapt_is_explained():
    params, batch = _inputs()

    def adapted(params, mode):
        return jaxmaml.adapt(_loss, params, batch, optax.sgd(0.1), 2, adjoint=jaxmaml.Exact(mode))[
            0
        ]

    with pytest.raises(TypeError, match="mode='reverse'"):
        jax.jvp(lambda p: adapted(p, "forward_over_reverse"), (params,), (params,))
    jax.jvp(lambda p: adapted(p, "reverse"), (params,), (params,))


@jax.custom_vjp
def _inner_square(x):
    return x**2


_inner_square.defvjp(lambda x: (x**2, x), lambda x, ct: (2 * x * ct,))


@jax.custom_vjp
def _outer_square(x):
    return x**2


_outer_square.defvjp(
    lambda x: (_inner_square(x), x), lambda x, ct: (2 * _inner_square(x) / x * ct,)
)


@pytest.mark.parametrize("mode", MODES)
def test_custom_vjp_that_calls_another_works(mode):
    def meta_loss(w):
        grad = mixed_mode.value_and_grad(_outer_square, mode=mode)(w)[1]
        return _outer_square(w - 0.1 * grad)

    np.testing.assert_allclose(jax.grad(meta_loss)(2.0), 0.8**2 * 2 * 2.0)


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda params, batch: params["w"], r"scalar.*float64\[3, 4\]"),
        (lambda params, batch: jnp.array(3), r"floating-point scalar.*int64\[\]"),
        (lambda params, batch: (params["w"].sum(), 1.0), "with jaxmaml.with_state"),
    ],
)
@pytest.mark.parametrize("mode", MODES)
def test_a_loss_that_is_not_a_float_scalar_is_refused(loss, message, mode):
    with pytest.raises(TypeError, match=message):
        mixed_mode.value_and_grad(loss, mode=mode)(*_inputs())


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode must be one of forward_over_reverse"):
        mixed_mode.value_and_grad(_loss, mode="backward")  # pyright: ignore[reportArgumentType]
