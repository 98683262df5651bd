"""The promises of single learners, and what learners refuse."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.flatten_util import ravel_pytree
from problems import quadratic, smooth

import jaxmaml
from jaxmaml import diagnostics, nn
from jaxmaml.learners import heads
from jaxmaml.learners.maml_plus_plus import reset_steps

SGD = optax.sgd(0.1)


def _one(problem):
    return problem.params, jax.tree.map(lambda leaf: leaf[0], problem.tasks)


def _grad(learner, meta_params, task, **options):
    loss = functools.partial(learner.loss, **options)
    return jax.jit(jax.grad(loss, has_aux=True))(meta_params, task)[0]


@pytest.mark.usefixtures("x64")
def test_imaml_is_a_dense_linear_solve():
    """At parameters that are not a minimum yet: the formula is the same."""
    problem = smooth(jnp.float64)
    params, task = _one(problem)
    learner = jaxmaml.imaml(
        problem.loss_fn, optax.sgd(0.3), 4, proximal=2.0, num_cg_steps=200, cg_tol=1e-14
    )

    @jax.jit
    def solved(params):
        adapted, unravel = ravel_pytree(learner.adapt(params, task.support)[0])
        of = lambda batch: lambda flat: problem.loss_fn(unravel(flat), batch)
        matrix = jax.hessian(of(task.support))(adapted) / 2.0 + jnp.eye(len(adapted))
        return jnp.linalg.solve(matrix, jax.grad(of(task.query))(adapted))

    expected, found = solved(params), ravel_pytree(_grad(learner, params, task))[0]
    np.testing.assert_allclose(found, expected, rtol=1e-8, atol=1e-10)


@pytest.mark.usefixtures("x64")
def test_the_residual_says_whether_conjugate_gradients_converged():
    problem = smooth(jnp.float64)
    params, task = _one(problem)
    left = {}
    for num_cg_steps in (1, 100):
        options = {"proximal": 2.0, "num_cg_steps": num_cg_steps, "cg_tol": 1e-12}
        learner = jaxmaml.imaml(problem.loss_fn, optax.sgd(0.3), 60, **options)
        left[num_cg_steps], gradient = diagnostics.cg_residual(learner, params, task)
        assert gradient < 1e-6
    assert left[100] < 1e-10
    assert left[1] > 1e-3


@pytest.mark.usefixtures("x64")
def test_the_last_exact_steps_are_exact_and_those_before_are_constants():
    problem = smooth(jnp.float64)
    params, task = _one(problem)
    learner = jaxmaml.maml(problem.loss_fn, SGD, 5, adjoint=jaxmaml.Exact(last=2))
    first = jaxmaml.adapt(problem.loss_fn, params, task.support, SGD, 3)[0]
    last = jaxmaml.maml(problem.loss_fn, SGD, 2)
    expected = _grad(last, first, task)
    found = _grad(learner, params, task)
    np.testing.assert_allclose(ravel_pytree(found)[0], ravel_pytree(expected)[0], rtol=1e-12)


def test_the_adjoint_is_annealed_by_the_outer_step():
    problem = quadratic()
    params, task = _one(problem)
    make = functools.partial(jaxmaml.maml, problem.loss_fn, SGD, 3)
    first, exact = jaxmaml.FirstOrder(), jaxmaml.Exact()
    learner = make(adjoint=jaxmaml.Annealed(first, exact, at=10))
    for step, adjoint in ((0, first), (9, first), (10, exact), (500, exact)):
        found = jax.jit(lambda step: _grad(learner, params, task, step=step))(step)
        expected = _grad(make(adjoint=adjoint), params, task)
        np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_multi_step_loss_weighs_every_step_and_ends_at_the_last():
    problem = quadratic()
    params, task = _one(problem)
    learner = jaxmaml.maml(problem.loss_fn, SGD, 3, query_weights=jaxmaml.multi_step_weights(3, 10))
    score = lambda adapted, state: problem.loss_fn(adapted, task.query)
    losses = learner.trace(params, task.support, score)[1:]
    loss, info = learner.loss(params, task, step=0)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-6)
    np.testing.assert_allclose(info.query_loss, losses[-1], rtol=1e-6)
    late, _ = learner.loss(params, task, step=1000)
    np.testing.assert_allclose(late, losses @ jnp.array([0.01, 0.01, 0.98]), rtol=1e-6)


@pytest.mark.parametrize("name", ["reptile", "protonet"])
def test_no_second_derivatives_are_computed(name):
    """In the jaxpr: no more operations than first derivatives take."""
    problem = smooth()
    params, task = _one(problem)
    forward = diagnostics.count_flops(problem.loss_fn, params, task.support)
    gradient = diagnostics.count_flops(jax.grad(problem.loss_fn), params, task.support)
    learner = {
        "reptile": jaxmaml.reptile(problem.loss_fn, SGD, 3, join_query=False),
        "protonet": jaxmaml.protonet(problem.loss_fn, problem.features_fn),
    }[name]
    found = diagnostics.count_flops(lambda params: _grad(learner, params, task), params)
    most = {"reptile": 3 * gradient + forward, "protonet": 2 * 3 * forward}[name]
    assert found <= most
    second = diagnostics.count_flops(
        lambda params: _grad(jaxmaml.maml(problem.loss_fn, SGD, 3), params, task), params
    )
    assert second > 3 * gradient + forward + gradient


def test_protonet_classifies_by_the_nearest_mean():
    problem = smooth()
    params, task = _one(problem)
    adapted, _ = jaxmaml.protonet(problem.loss_fn, problem.features_fn).adapt(params, task.support)
    logits = problem.features_fn(params, task.query) @ adapted["head"]["kernel"]
    logits += adapted["head"]["bias"][None]
    support, query = (np.asarray(problem.features_fn(params, batch)) for batch in task)
    targets = np.asarray(task.support["targets"])
    means = np.stack([support[targets == label].mean(0) for label in range(3)])
    distances = ((query[:, None] - means) ** 2).sum(-1)
    np.testing.assert_allclose(
        logits - logits[:, :1], distances[:, :1] - distances, rtol=1e-4, atol=1e-5
    )


@pytest.mark.usefixtures("x64")
def test_r2d2_solves_ridge_regression():
    problem = smooth(jnp.float64)
    params, task = _one(problem)
    learner = jaxmaml.r2d2(problem.loss_fn, problem.features_fn, ridge=0.5, scale=2.0)
    adapted, _ = learner.adapt(learner.init(params), task.support)
    x = np.asarray(problem.features_fn(params, task.support))
    y = np.eye(3)[np.asarray(task.support["targets"])]
    expected = 2.0 * np.linalg.solve(x.T @ x + 0.5 * np.eye(8), x.T @ y)
    np.testing.assert_allclose(adapted["head"]["kernel"], expected, rtol=1e-10)


@pytest.mark.parametrize("name", ["protonet", "r2d2"])
def test_padded_examples_have_no_part_in_the_head(name):
    problem = smooth()
    params, task = _one(problem)
    learner = getattr(jaxmaml, name)(problem.loss_fn, problem.features_fn)
    meta_params = learner.init(params)
    padded = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf[:2]]), task.support)
    padded["inputs"] = padded["inputs"].at[6:].set(jnp.nan)
    padded["weights"] = jnp.array([1.0] * 6 + [0.0] * 2)
    expected, found = (
        learner.adapt(meta_params, batch)[0]["head"] for batch in (task.support, padded)
    )
    for leaf, like in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(leaf, like, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["protonet", "r2d2", "proto_maml", "unicorn"])
@pytest.mark.parametrize("way", [2, 5])
def test_learners_without_a_fixed_head_serve_any_number_of_ways(name, way):
    problem = smooth()
    rest = {"proto_maml": (SGD, 2, problem.features_fn), "unicorn": (SGD, 2)}
    args = rest.get(name, (problem.features_fn,))
    trained, served = (getattr(jaxmaml, name)(problem.loss_fn, *args, way=w) for w in (None, way))
    support = {"inputs": jnp.ones((way, 4)), "targets": jnp.arange(way)}
    adapted, _ = served.adapt(trained.init(problem.params), support)
    assert adapted["head"]["kernel"].shape == (8, way)
    assert adapted["head"]["bias"].shape == (way,)


def test_unicorn_does_not_depend_on_how_classes_are_numbered():
    problem = smooth()
    params, task = _one(problem)
    learner = jaxmaml.unicorn(problem.loss_fn, SGD, 3)
    order = jnp.array([2, 0, 1])
    renumbered = jax.tree.map(lambda x: x, task)
    for batch in renumbered:
        batch["targets"] = order[batch["targets"]]
    losses = [learner.loss(learner.init(params), t)[0] for t in (task, renumbered)]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    maml = jaxmaml.maml(problem.loss_fn, SGD, 3)
    assert abs(maml.loss(params, task)[0] - maml.loss(params, renumbered)[0]) > 1e-3


def test_per_step_rates_are_used_in_turn_and_the_last_one_again():
    """theta - c shrinks by 1 - rate in each step."""
    problem = quadratic()
    params, task = _one(problem)
    learner = jaxmaml.meta_sgd(problem.loss_fn, 2, granularity="scalar", per_step=True)
    meta_params = learner.init(params)
    meta_params.learned["hyperparams"] = jnp.array([0.5, 0.25])
    center = task.support.mean(0)
    for number, shrink in ((1, 0.5), (2, 0.5 * 0.75), (4, 0.5 * 0.75**3)):
        adapted, _ = learner.adapt(meta_params, task.support, num_inner_steps=number)
        np.testing.assert_allclose(adapted - center, shrink * (params - center), rtol=1e-5)


def test_curvature_multiplies_every_axis_of_the_gradient():
    rng = np.random.default_rng(0)
    gradient, left, right = (
        rng.normal(size=(2, 3)),
        rng.normal(size=(2, 2)),
        rng.normal(size=(3, 3)),
    )
    learner = jaxmaml.meta_curvature(lambda w, batch: jnp.sum(w * batch), optax.sgd(1.0), 1)
    meta_params = learner.init(jnp.zeros((2, 3)))
    meta_params.learned["hyperparams"][0][:] = [jnp.asarray(left), jnp.asarray(right)]
    adapted, _ = learner.adapt(meta_params, jnp.asarray(gradient))
    np.testing.assert_allclose(adapted, -left @ gradient @ right.T, rtol=1e-5)


def test_fine_tuning_learns_all_training_classes_and_adapts_the_episodes_head():
    problem = smooth()
    params, task = _one(problem)
    classes = jaxmaml.TrainingClasses(problem.features_fn, num_classes=7)
    learner = jaxmaml.fine_tuning(problem.loss_fn, SGD, 2, classes=classes)
    meta_params = learner.init(params)
    numbered = jaxmaml.Task(*({**batch, "classes": batch["targets"] + 4} for batch in task))
    loss, _ = learner.loss(meta_params, numbered)
    np.testing.assert_allclose(loss, np.log(7), rtol=1e-6)  # its head starts with zeros
    grads = _grad(learner, meta_params, numbered)
    seen = np.abs(grads.learned["classes"]["kernel"]).sum(0) > 0
    assert seen.all()
    assert not np.any(grads.params["head"]["kernel"])
    with pytest.raises(ValueError, match="classes"):
        learner.loss(meta_params, task)


def _per_step_model():
    module = nn.MLP(4, 3, hidden=(5,), norm="per_step", num_steps=2, rngs=nnx.Rngs(0))
    return nn.from_nnx_with_state(module)


def test_maml_plus_plus_uses_each_steps_own_statistics_at_test_time():
    train_fn, apply_fn, params, state = _per_step_model()
    loss_fn, test_loss_fn = (nn.cross_entropy(fn) for fn in (train_fn, apply_fn))
    learner = jaxmaml.maml_plus_plus(loss_fn, 2, test_loss_fn=test_loss_fn)
    meta_params, task = learner.init(params), _one(smooth())[1]
    _, info = learner.loss(meta_params, task, state=state)
    norm = info.state["norm"][0]
    assert int(norm["step"]) == 3  # two inner steps and the query
    mean = np.asarray(norm["mean"])
    assert len(np.unique(mean.round(6), axis=0)) == 3  # a row for each
    # What the outer step before has counted does not shift the rows.
    again = learner.loss(meta_params, task, state=info.state)[1].state["norm"][0]
    assert int(again["step"]) == 3

    def adapted_with(means):
        used = jax.tree.map(lambda leaf: leaf, info.state)
        used["norm"][0]["mean"] = jnp.asarray(means)
        return ravel_pytree(learner.adapt(meta_params, task.support, state=used)[0])[0]

    usual = adapted_with(mean)
    assert np.abs(adapted_with(mean + np.array([[1.0], [0], [0]])) - usual).max() > 1e-4
    # The last row is the query's, whom adapting does not see.
    np.testing.assert_array_equal(adapted_with(mean + np.array([[0], [0], [1.0]])), usual)
    alone, together = (
        apply_fn(params, {"inputs": task.query["inputs"][:n]}, reset_steps(info.state))[0][:2]
        for n in (2, 6)
    )
    np.testing.assert_allclose(alone, together, rtol=1e-5)  # no statistics of the batch at hand


def _learner(name, **options):
    problem = smooth()
    rest = {"anil": (SGD, 1), "boil": (SGD, 1), "cavia": (SGD, 1), "maml": (SGD, 1), "unicorn": (SGD, 1),
            "reptile": (SGD, 1), "imaml": (SGD, 1), "meta_sgd": (1,), "maml_plus_plus": (1,),
            "protonet": (problem.features_fn,), "r2d2": (problem.features_fn,)}  # fmt: skip
    return getattr(jaxmaml, name)(problem.loss_fn, *rest[name], **options)


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
    params, task = _one(smooth())
    learner = _learner(name, **options)
    with pytest.raises(ValueError, match=message):
        _adapted(learner, params, task)


@pytest.mark.parametrize("name", ["anil", "boil"])
def test_a_path_that_is_everything_is_refused(name):
    params, task = _one(smooth())
    learner = getattr(jaxmaml, name)(lambda params, batch: jnp.sum(params["head"]["bias"]), SGD, 1)
    with pytest.raises(ValueError, match="every parameter lies at 'head'"):
        _adapted(learner, {"head": params["head"]}, task)


def _adapted(learner, params, task):
    return learner.adapt(learner.init(params), task.support)


@pytest.mark.parametrize("name", ["maml", "protonet", "imaml", "reptile"])
def test_learners_of_bare_parameters_refuse_those_of_another_learner(name):
    params, task = _one(smooth())
    other = _learner("meta_sgd").init(params)
    with pytest.raises(ValueError, match=r"another learner: .*hyperparams"):
        _learner(name).loss(other, task)


@pytest.mark.parametrize("name", ["meta_sgd", "unicorn", "r2d2"])
def test_learners_that_learn_more_refuse_those_of_another_learner(name):
    params, task = _one(smooth())
    with pytest.raises(ValueError, match="use what its own init"):
        _learner(name).loss(params, task)
    other = _learner("r2d2" if name == "unicorn" else "unicorn").init(params)
    with pytest.raises(ValueError, match="another learner:"):
        _learner(name).loss(other, task)


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
        _learner(name, **options)


def test_learners_without_steps_refuse_to_make_some():
    params, task = _one(smooth())
    with pytest.raises(ValueError, match="no inner steps"):
        _learner("protonet").adapt(params, task.support, num_inner_steps=2)


def test_a_head_without_a_bias_cannot_hold_distances():
    problem = smooth()
    params, task = _one(problem)
    params = {**params, "head": {"kernel": params["head"]["kernel"]}}
    with pytest.raises(ValueError, match="has no bias"):
        heads.fill(params, "head", jnp.zeros((8, 3)), jnp.zeros(3))
    with pytest.raises(ValueError, match="has no bias"):
        _learner("protonet").adapt(params, task.support)
