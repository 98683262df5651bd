"""Learners with an inner loop refuse wrong arguments."""

import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from learner_cases import SGD, adapted_from_init, learner_of, one_task
from problems import smooth

import jaxmaml
from jaxmaml import nn
from jaxmaml.learners.inner_loop import has_query_loss


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("maml", {"mask": lambda path: path.startswith("conv")}, "mask matches no parameter.*head/k"),
        ("maml", {"mask": {"a": False, "head": False}}, "mask matches no parameter"),
        ("anil", {"head": "classifier"}, "no parameter lies at 'classifier'.*a/bias"),
        ("boil", {"head": "classifier"}, "no parameter lies at 'classifier'"),
        ("cavia", {}, "no parameter lies at 'context'"),
        ("protonet", {"head": "classifier"}, "head='classifier' is not a path.*a, head"),
        ("protonet", {"head": "a/kernel"}, "must be a linear layer"),
        ("unicorn", {"head": "top/head"}, "head='top/head' is not a path"),
        ("r2d2", {"head": "classifier"}, "head='classifier' is not a path"),
    ],
)  # fmt: skip
def test_a_path_that_fits_nothing_is_refused(name, options, message):
    params, task = one_task(smooth())
    learner = learner_of(name, **options)
    with pytest.raises(ValueError, match=message):
        adapted_from_init(learner, params, task)


@pytest.mark.parametrize("name", ["anil", "boil"])
def test_a_path_that_is_everything_is_refused(name):
    params, task = one_task(smooth())
    learner = getattr(jaxmaml, name)(lambda params, batch: jnp.sum(params["head"]["bias"]), SGD, 1)
    with pytest.raises(ValueError, match="every parameter lies at 'head'"):
        adapted_from_init(learner, {"head": params["head"]}, task)


@pytest.mark.parametrize("name", ["maml", "protonet", "imaml", "reptile"])
def test_learners_of_bare_parameters_refuse_those_of_anotherlearner_of(name):
    params, task = one_task(smooth())
    other = learner_of("meta_sgd").init(params)
    with pytest.raises(ValueError, match=r"another learner: .*hyperparams"):
        learner_of(name).loss(other, task)


@pytest.mark.parametrize("name", ["meta_sgd", "unicorn", "r2d2"])
def test_learners_that_learn_more_refuse_those_of_anotherlearner_of(name):
    params, task = one_task(smooth())
    with pytest.raises(ValueError, match="use what its own init"):
        learner_of(name).loss(params, task)
    other = learner_of("r2d2" if name == "unicorn" else "unicorn").init(params)
    with pytest.raises(ValueError, match="another learner:"):
        learner_of(name).loss(other, task)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "maml",
            {"query_weights": [0.5, 0.5]},
            r"query_weights must be \[num_inner_steps\] = \[1\]",
        ),
        ("maml", {"refresh_state": True}, "mark it with jaxmaml.with_state"),
        ("meta_sgd", {"granularity": "tensor"}, "granularity must be one of"),
        ("imaml", {"proximal": 0.0}, "proximal must be a positive, finite number"),
        ("imaml", {"num_cg_steps": 0}, "num_cg_steps"),
        ("r2d2", {"ridge": -1.0}, "ridge must be positive"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        learner_of(name, **options)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("anil", {"mask": lambda path: True}, "anil has its own mask: leave `mask` out"),
        ("boil", {"mask": None}, "boil has its own mask"),
        ("cavia", {"mask": {}}, "cavia has its own mask"),
        ("imaml", {"adjoint": jaxmaml.Exact()}, "imaml has its own adjoint"),
        (
            "anil",
            {"order": "first"},
            "anil takes no option 'order'; its options are adjoint, query_l",
        ),
        ("unicorn", {"num_exact_steps": 1}, "unicorn takes no option 'num_exact_steps'"),
        ("reptile", {"adjoint": jaxmaml.Exact()}, "reptile differentiates no inner step"),
    ],
)
def test_options_that_a_learner_does_not_take_are_refused_by_name(name, options, message):
    with pytest.raises(TypeError, match=message):
        learner_of(name, **options)


def test_rates_are_refused_wherever_an_implicit_adjoint_would_give_them_no_gradient():
    problem, rates = smooth(), jaxmaml.learned_sgd(0.1)
    later = jaxmaml.Annealed(jaxmaml.FirstOrder(), jaxmaml.Implicit(), at=5)
    for adjoint in (jaxmaml.Implicit(), later):
        with pytest.raises(ValueError, match="hyperparameters of the inner optimizer have no meta"):
            jaxmaml.maml(problem.loss_fn, rates, 1, adjoint=adjoint)


def test_a_classifier_with_state_is_not_trained_jointly():
    problem = smooth()
    classes = jaxmaml.TrainingClasses(problem.features_fn, num_classes=3)
    stateful = jaxmaml.with_state(
        lambda params, batch, state: (problem.loss_fn(params, batch), state)
    )
    with pytest.raises(ValueError, match="computes features without state"):
        jaxmaml.fine_tuning(stateful, SGD, 1, classes=classes)
    with pytest.raises(ValueError, match="computes features without state"):
        jaxmaml.protonet(stateful, problem.features_fn)


def test_normalization_per_step_starts_anew_with_each_task():
    """The counter stays in the state of the outer loop, whatever the learner."""
    module = nn.MLP(1, 1, hidden=(2,), norm="per_step", num_steps=1, rngs=nnx.Rngs(0))
    train_fn, _, params, state = nn.from_nnx_with_state(module)
    learner = jaxmaml.maml(nn.mean_squared_error(train_fn), optax.sgd(0.1), 1)
    batch = {"inputs": jnp.array([[0.5], [1.0]]), "targets": jnp.array([[1.0], [0.0]])}
    rows = []
    for _ in range(2):
        _, info = learner.loss(params, jaxmaml.Task(batch, batch), state=state)
        state = info.state
        assert state["norm"][0]["inner_step"] == 2  # one inner step and the query
        rows.append(state["norm"][0]["mean"])
    assert (rows[0] != rows[1]).all()  # both rows move at both times


def test_only_the_meta_loss_of_an_inner_loop_is_the_query_loss():
    loss_fn = lambda params, batch: jnp.mean((params - batch) ** 2)
    assert has_query_loss(jaxmaml.maml(loss_fn, optax.sgd(0.1), 1))
    assert not has_query_loss(jaxmaml.reptile(loss_fn, optax.sgd(0.1), 1))
