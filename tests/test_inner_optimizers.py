"""Every optimizer that optax exports is differentiated exactly inside an inner loop, or refused."""

import functools
import inspect
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.flatten_util import ravel_pytree
from optax import contrib
from problems import smooth

import jaxmaml
from jaxmaml import inner_optimizers
from jaxmaml.inner_optimizers import _refused

LR = 0.05
KEY = jax.random.key(0)


class Row(NamedTuple):
    """An optimizer of the table.

    Attributes:
        make: `() -> optimizer`.
        refused: a part of the message with which it is refused; "" if it is not.
    """

    make: Any
    refused: str = ""


def _alone(name: str, *args: Any, module: Any = optax, **options: Any) -> Row:
    return Row(lambda: getattr(module, name)(*args, **options))


def _then_sgd(name: str, *args: Any, module: Any = optax, **options: Any) -> Row:
    """A transformation that is followed by a step of gradient descent."""
    return Row(lambda: optax.chain(getattr(module, name)(*args, **options), optax.sgd(LR)))


_matrices: Any = lambda params: jax.tree.map(lambda leaf: leaf.ndim > 1, params)
_muon_axes: Any = lambda params: jax.tree.map(lambda _: contrib.MuonDimensionNumbers(), params)
_early: Any = lambda step, *_, **__: step < 2


_contrib = functools.partial(_alone, module=contrib)
ALIASES = [
    "adabelief",
    "adadelta",
    "adafactor",
    "adagrad",
    "adam",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "amsgrad",
    "fromage",
    "lamb",
    "lars",
    "lion",
    "nadam",
    "nadamw",
    "novograd",
    "optimistic_adam",
    "optimistic_adam_v2",
    "optimistic_gradient_descent",
    "radam",
    "rmsprop",
    "rprop",
    "sgd",
    "sign_sgd",
    "signum",
    "sm3",
    "yogi",
]
WITHOUT_ARGUMENTS = [
    "centralize",
    "identity",
    "keep_params_nonnegative",
    "normalize_by_update_norm",
    "scale_by_adadelta",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_distance_over_gradients",
    "scale_by_lbfgs",
    "scale_by_lion",
    "scale_by_novograd",
    "scale_by_optimistic_gradient",
    "scale_by_param_block_norm",
    "scale_by_param_block_rms",
    "scale_by_polyak",
    "scale_by_radam",
    "scale_by_rms",
    "scale_by_rss",
    "scale_by_sign",
    "scale_by_sm3",
    "scale_by_stddev",
    "scale_by_trust_ratio",
    "scale_by_yogi",
    "set_to_zero",
    "zero_nans",
]
TABLE: dict[str, Row] = {
    **{name: _alone(name, LR) for name in ALIASES},
    **{name: _then_sgd(name) for name in WITHOUT_ARGUMENTS},
    "adaptive_grad_clip": _then_sgd("adaptive_grad_clip", 0.1),
    "add_decayed_weights": _then_sgd("add_decayed_weights", 0.1),
    "add_noise": _then_sgd("add_noise", 0.1, 0.5, KEY),
    "apply_every": _then_sgd("apply_every", 2),
    "clip": _then_sgd("clip", 0.1),
    "clip_by_block_rms": _then_sgd("clip_by_block_rms", 0.1),
    "clip_by_global_norm": _then_sgd("clip_by_global_norm", 1e3),
    "ema": _then_sgd("ema", 0.9),
    "scale": _then_sgd("scale", 0.5),
    "scale_by_learning_rate": _then_sgd("scale_by_learning_rate", 0.1),
    "scale_by_rprop": _then_sgd("scale_by_rprop", 0.1),
    "scale_by_schedule": _then_sgd("scale_by_schedule", lambda count: 1 / (1 + count)),
    "snapshot": _then_sgd("snapshot", "one", lambda *args, **extra: 1.0),
    "stateless": _then_sgd("stateless", lambda updates, params: updates),
    "stateless_with_tree_map": _then_sgd("stateless_with_tree_map", lambda update, param: update),
    "trace": _then_sgd("trace", 0.9),
    "scale_by_backtracking_linesearch": _then_sgd("scale_by_backtracking_linesearch", 5),
    "noisy_sgd": _alone("noisy_sgd", LR, key=KEY),
    "polyak_sgd": _alone("polyak_sgd"),
    "lbfgs": _alone("lbfgs", LR, memory_size=2, linesearch=None),
    "apply_if_finite": Row(lambda: optax.apply_if_finite(optax.sgd(LR), 3)),
    "nesterov": Row(lambda: optax.sgd(LR, momentum=0.9, nesterov=True)),
    "sgd with a schedule": Row(lambda: optax.sgd(optax.linear_schedule(0.1, 0.01, 3))),
    "chain": Row(lambda: optax.chain(optax.scale(0.5), optax.adam(LR))),
    "named_chain": Row(lambda: optax.named_chain(("a", optax.scale(0.5)), ("b", optax.sgd(LR)))),
    "conditionally_mask": Row(
        lambda: optax.conditionally_mask(optax.sgd(LR), _early)
    ),
    "conditionally_transform": Row(
        lambda: optax.conditionally_transform(optax.sgd(LR), _early)
    ),
    "flatten": Row(lambda: optax.flatten(optax.adam(LR))),
    "freeze": Row(lambda: optax.chain(optax.sgd(LR), optax.freeze(_matrices))),
    "inject_hyperparams": Row(lambda: optax.inject_hyperparams(optax.adam)(LR)),
    "inject_stateful_hyperparams": Row(lambda: optax.inject_stateful_hyperparams(optax.adam)(LR)),
    "masked": Row(lambda: optax.masked(optax.sgd(LR), _matrices)),
    "multi_transform": Row(
        lambda: optax.multi_transform({True: optax.sgd(LR), False: optax.adam(LR)}, _matrices)
    ),
    "partition": Row(
        lambda: optax.partition({True: optax.sgd(LR), False: optax.adam(LR)}, _matrices)
    ),
    "selective_transform": Row(
        lambda: optax.selective_transform(optax.sgd(LR), freeze_mask=_matrices)
    ),
    "with_extra_args_support": Row(lambda: optax.with_extra_args_support(optax.sgd(LR))),
    "lookahead": Row(lambda: optax.lookahead(optax.sgd(LR), 2, 0.5), refused="its fast optimizer"),
    "scale_by_zoom_linesearch": _then_sgd("scale_by_zoom_linesearch", 5)._replace(
        refused="a line search has no derivative"
    ),
    **{name: _contrib(name, LR) for name in ("acprop", "ademamix", "adopt", "galore", "madgrad")},
    **{name: _contrib(name, LR) for name in ("muon", "simplified_ademamix")},
    **{
        name: _then_sgd(name, module=contrib)
        for name in ("scale_by_acprop", "scale_by_ademamix", "scale_by_adopt", "scale_by_cocob",
                     "scale_by_galore", "scale_by_simplified_ademamix", "normalize")
    },
    "scale_by_muon": Row(
        lambda: optax.chain(
            optax.masked(contrib.scale_by_muon(weight_dimension_numbers=_muon_axes), _matrices),
            optax.sgd(LR),
        )
    ),
    "monitor": Row(
        lambda: optax.chain(optax.monitor({"norm": optax.tree.norm}), optax.sgd(LR)),
        refused="the structure of its state",
    ),
    "scale_by_madgrad": _then_sgd("scale_by_madgrad", LR, module=contrib),
    **{name: _contrib(name) for name in ("cocob", "dadapt_adamw", "momo", "momo_adam", "prodigy")},
    "mechanize": Row(lambda: contrib.mechanize(optax.sgd(LR))),
    "reduce_on_plateau": _then_sgd("reduce_on_plateau", module=contrib),
    "split_real_and_imaginary": Row(lambda: contrib.split_real_and_imaginary(optax.sgd(LR))),
    **{
        name: _contrib(name)._replace(refused="its base optimizer")
        for name in ("schedule_free_adamw", "schedule_free_sgd")
    },
    "schedule_free": Row(
        lambda: contrib.schedule_free(optax.sgd(LR), LR), refused="its base optimizer"
    ),
    "sam": Row(
        lambda: contrib.sam(optax.sgd(LR), optax.sgd(0.01)), refused="its base optimizer"
    ),
    "sophia": _contrib("sophia", LR)._replace(refused="another loss function"),
    "differentially_private_aggregate": _then_sgd(
        "differentially_private_aggregate", 1.0, 0.1, 0, module=contrib
    )._replace(refused="one gradient per example"),
    "dpsgd": _contrib("dpsgd", LR, 1.0, 0.1, 0)._replace(refused="one gradient per example"),
}  # fmt: skip
# Their updates jump where the gradient of an array is zero, so that there is no derivative there.
JUMPS = {
    *("adafactor", "lamb", "lars", "novograd", "scale_by_novograd", "scale_by_trust_ratio", "lion"),
    *("muon", "scale_by_muon", "galore"),
}
# The last one is a measurement, for `optax.monitor`.
NO_OPTIMIZERS = {
    "GradientTransformation", "GradientTransformationExtraArgs", "measure_with_ema",
}  # fmt: skip
# A singular value decomposition has no derivative at zero.
NAN_AT_ZERO = {"galore", "scale_by_galore"}
# One row for each thing that can go wrong; the others run with `-m slow`.
DEFAULT = {
    *("sgd", "adam", "adafactor", "radam", "lamb", "lbfgs", "momo", "noisy_sgd", "sign_sgd"),
    *("adaptive_grad_clip", "clip_by_block_rms", "clip_by_global_norm", "apply_if_finite"),
    *("inject_hyperparams", "masked", "multi_transform", "conditionally_mask", "reduce_on_plateau"),
    *("scale_by_distance_over_gradients", "scale_by_backtracking_linesearch"),
    *(name for name, row in TABLE.items() if row.refused),
}


def test_the_table_has_every_optimizer_of_optax():
    exported = {
        name
        for module in (optax, contrib)
        for name in dir(module)
        if not name.startswith("_") and _makes_an_optimizer(getattr(module, name))
    }
    assert exported - NO_OPTIMIZERS - set(TABLE) == set()


def _makes_an_optimizer(function):
    if not callable(function):
        return False
    try:
        returned = str(inspect.signature(function).return_annotation)
    except (TypeError, ValueError):
        return False
    return "GradientTransformation" in returned


# A network whose body has a gradient of exactly zero wherever its head is zero.
def _loss(params, batch):
    outputs = jnp.tanh(batch["x"] @ params["body"] + params["bias"]) @ params["head"]
    return jnp.mean((outputs - batch["y"]) ** 2)


def _problem():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape))
    params = {"body": draw(2, 3), "bias": draw(3), "head": draw(3, 1)}
    batch = lambda: {"x": draw(4, 2), "y": draw(4, 1)}
    zero = {**params, "head": jnp.zeros((3, 1))}
    return jax.tree.map(lambda *x: jnp.stack(x), params, zero), jaxmaml.Task(batch(), batch())


def _plain_loss(optimizer, params, task):
    """Two inner steps in plain JAX and optax, then the query loss."""
    optimizer = optax.with_extra_args_support(optimizer)
    opt_state = optimizer.init(params)
    objective = lambda params: _loss(params, task.support)
    for _ in range(2):
        value, grad = jax.value_and_grad(objective)(params)
        updates, opt_state = optimizer.update(
            grad, opt_state, params, value=value, grad=grad, value_fn=objective
        )
        params = optax.apply_updates(params, updates)
    return _loss(params, task.query)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[pytest.mark.slow] * (n not in DEFAULT)) for n in TABLE]
)
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Specifying a key:UserWarning")
@pytest.mark.usefixtures("x64")
def test_every_optimizer_is_differentiated_exactly_or_refused(name):
    row = TABLE[name]
    both, task = _problem()
    learner = jaxmaml.maml(_loss, row.make(), 2)
    if row.refused:
        params = jax.tree.map(lambda leaf: leaf[0], both)
        with pytest.raises((TypeError, ValueError), match=row.refused):
            jax.eval_shape(jax.grad(lambda params: learner.loss(params, task)[0]), params)
        return

    # With and without a gradient of zero.
    loss = lambda params: learner.loss(params, task)[0]
    plain_loss = lambda params: _plain_loss(row.make(), params, task)
    found, plain = jax.jit(
        jax.vmap(lambda params: (jax.grad(loss)(params), jax.grad(plain_loss)(params)))
    )(both)
    for i in range(2):
        at = lambda tree: ravel_pytree(jax.tree.map(lambda leaf: leaf[i], tree))[0]  # noqa: B023
        if i == 1 and name in NAN_AT_ZERO:
            continue
        assert np.isfinite(at(found)).all()
        if np.isfinite(at(plain)).all():
            atol = 1e-12 * float(np.abs(at(plain)).max())
            np.testing.assert_allclose(at(found), at(plain), rtol=1e-9, atol=atol)
        elif name not in JUMPS:
            along = _direction(both)
            # An Adam bends within its eps of 1e-8: the step is far below it.
            moved = lambda h: jax.tree.map(lambda leaf, d: leaf[i] + h * d, both, along)  # noqa: B023
            below, above = [jax.jit(loss)(moved(h)) for h in (-1e-11, 1e-11)]
            derivative = at(found) @ ravel_pytree(along)[0]
            np.testing.assert_allclose(derivative, (above - below) / 2e-11, rtol=2e-2, atol=1e-4)


def _direction(both):
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape[1:])), both)


_CUBE = lambda g: -0.05 * jnp.power(g, jnp.asarray(3.0, g.dtype))


@pytest.mark.parametrize(
    ("update", "grad", "dtype"),
    [
        (_CUBE, -1.5, "float32"),  # the derivative by the exponent, a constant, is NaN
        (lambda g: g / jnp.asarray(1e-20, g.dtype) * 1e-20, 0.5, "float32"),  # 1 / 1e-40 overflows
        (lambda g: g / jnp.asarray(1e-3, g.dtype) * 1e-3, 0.5, "float16"),
        (lambda g: g / (jnp.sqrt(g**2) + 1e-4), 0.1, "float16"),
    ],
    ids=["power", "division", "division in 16 bits", "adam in 16 bits"],
)
def test_a_derivative_that_is_right_is_left_alone(update, grad, dtype):
    optimizer = optax.with_extra_args_support(optax.stateless(lambda grads, _: update(grads)))
    grad = jnp.asarray(grad, dtype)
    ours = lambda g: inner_optimizers.update(optimizer, g, optax.EmptyState(), g, g, lambda p: p)[0]
    np.testing.assert_array_equal(jax.grad(ours)(grad), jax.grad(update)(grad))


@pytest.mark.usefixtures("x64")
def test_decays_of_an_adam_are_learned():
    make = lambda h: optax.adam(h["lr"], b1=h["b1"], b2=h["b2"])
    optimizer = jaxmaml.learned_optimizer(make, {"lr": 0.1, "b1": 0.8, "b2": 0.9})
    learner = jaxmaml.maml(lambda w, batch: jnp.mean((w - batch) ** 2), optimizer, 3)
    meta_params = learner.init(jnp.array([0.0, 0.5]))
    task = jaxmaml.Task(jnp.ones(2), jnp.full(2, 2.0))
    flat, unravel = ravel_pytree(meta_params)
    run = jax.jit(jax.value_and_grad(lambda flat: learner.loss(unravel(flat), task)[0]))
    differences = [
        (run(flat + step)[0] - run(flat - step)[0]) / 2e-6 for step in 1e-6 * jnp.eye(flat.size)
    ]
    np.testing.assert_allclose(run(flat)[1], differences, rtol=1e-5, atol=1e-8)


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_second_derivatives_pass_an_adam():
    both, task = _problem()
    optimizer = optax.adam(0.1)
    learner = jaxmaml.maml(_loss, optimizer, 2)

    def hessian(loss):
        start, unravel = ravel_pytree(jax.tree.map(lambda leaf: leaf[0], both))
        run = jax.jit(jax.vmap(jax.hessian(lambda flat: loss(unravel(flat)))))
        zero = ravel_pytree(jax.tree.map(lambda leaf: leaf[1], both))[0]
        return run(jnp.stack([start, zero]))

    found = hessian(lambda params: learner.loss(params, task)[0])
    expected = hessian(lambda params: _plain_loss(optimizer, params, task))
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-8, atol=1e-10)
    assert np.isfinite(found[1]).all()
    assert np.isnan(expected[1]).any()


@pytest.mark.slow
@pytest.mark.usefixtures("x64")
def test_what_an_eps_root_costs():
    problem = smooth(jnp.float64)
    task = jax.tree.map(lambda leaf: leaf[0], problem.tasks)

    def gradient(eps_root):
        learner = jaxmaml.maml(problem.loss_fn, optax.adam(1e-2, eps_root=eps_root), 5)
        run = jax.jit(jax.grad(learner.loss, has_aux=True))
        return ravel_pytree(run(problem.params, task)[0])[0]

    exact = gradient(0.0)
    for eps_root, expected in ((1e-8, 0.153), (1e-12, 2.83e-5), (1e-16, 2.83e-9)):
        change = jnp.linalg.norm(gradient(eps_root) - exact) / jnp.linalg.norm(exact)
        np.testing.assert_allclose(change, expected, rtol=0.02)


def test_a_parameter_without_gradient_has_no_part_in_adams_derivative():
    # Half of the embeddings are not in the batch: their gradient is zero at every step.
    loss_fn = lambda params, batch: jnp.mean((params[:2] - batch) ** 2)
    learner = jaxmaml.maml(loss_fn, optax.adam(0.1), 2)
    grads, _ = jax.grad(learner.loss, has_aux=True)(
        jnp.arange(4.0), jaxmaml.Task(jnp.ones(2), jnp.full(2, 3.0))
    )
    assert np.isfinite(grads).all()
    np.testing.assert_array_equal(grads[2:], 0)
    assert (grads[:2] != 0).all()


def test_a_line_search_adapts_and_has_the_implicit_derivative():
    loss_fn = lambda params, batch: jnp.sum((params - batch) ** 2) / 2
    learner = jaxmaml.imaml(loss_fn, optax.lbfgs(), 5, proximal=1.0)
    task = jaxmaml.Task(jnp.ones(3), jnp.full(3, 2.0))
    adapted, _ = jax.jit(learner.adapt)(jnp.zeros(3), task.support)
    np.testing.assert_allclose(adapted, 0.5, rtol=1e-5)
    grads, _ = jax.jit(jax.grad(learner.loss, has_aux=True))(jnp.zeros(3), task)
    np.testing.assert_allclose(grads, (0.5 - 2.0) / 2, rtol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_injected_decays_of_low_precision_are_refused(dtype):
    params = jnp.ones(3, dtype)
    optimizer = optax.inject_hyperparams(optax.adam)(0.1)
    if dtype == "float32":
        inner_optimizers.init(optimizer, params)
        return
    with pytest.raises(ValueError, match="hyperparam_dtype"):
        inner_optimizers.init(optimizer, params)
    inner_optimizers.init(
        optax.inject_hyperparams(optax.adam, hyperparam_dtype=jnp.float32)(0.1), params
    )


def test_every_refused_state_is_one_that_optax_has():
    assert all(inspect.isclass(kind) for kind in _refused())
