"""What learners with an inner loop refuse."""

import jax.numpy as jnp
import pytest
from learner_cases import SGD, adapted_from_init, learner_of, one_task
from problems import smooth

import jaxmaml


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
        ("anil", {"mask": lambda path: True}, "has its own mask, given by the path 'head'"),
        ("boil", {"mask": None}, "has its own mask"),
        ("cavia", {"mask": {}}, "has its own mask, given by the path 'context'"),
        ("meta_sgd", {"granularity": "tensor"}, "granularity must be one of"),
        ("imaml", {"proximal": 0.0}, "proximal must be a positive, finite number"),
        ("imaml", {"num_cg_steps": 0}, "num_cg_steps"),
        ("r2d2", {"ridge": -1.0}, "ridge must be positive"),
    ],
)
def test_options_out_of_range_are_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        learner_of(name, **options)
