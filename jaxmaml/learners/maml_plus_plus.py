"""MAML++: Antoniou, Edwards and Storkey 2019 (arXiv 1810.09502)."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from jaxmaml.learners.maml import maml
from jaxmaml.learners.meta_sgd import meta_sgd
from jaxmaml.types import LossFn, MetaLearner, State


def maml_plus_plus(
    loss_fn: LossFn,
    num_inner_steps: int,
    *,
    inner_lr: float = 0.1,
    learned_rates: bool = True,
    multi_step_loss: int = 5_000,
    exact_from: int = 0,
    test_loss_fn: LossFn | None = None,
    has_state: bool = False,
    **options: Any,
) -> MetaLearner:
    """MAML with the six changes of MAML++, each of which can be left out.

    1. Multi-step loss: `multi_step_loss`, the outer steps over which its weights move to the last
       inner step (0 leaves it out; the paper: 10 epochs of 500).
    2. Learned rates per layer and inner step: `learned_rates`. The meta-parameters are then those of
       `meta_sgd`, `Extended(params, {"hyperparams": rates})`; else bare parameters.
    3. Statistics per inner step, used at test time: a model with `norm="per_step"`
       (`nn.Conv4`, `nn.MLP`), has_state=True, and as `test_loss_fn` and in metrics the model in
       evaluation mode (`module.eval()`). The steps that such a model counts are set to 0 here.
    4. Normalisation weights per inner step: `per_step_weights` of the same models.
    5. Cosine outer rate: the outer optimiser's,
       `optax.adam(optax.cosine_decay_schedule(1e-3, num_outer_steps, alpha=1e-2))`.
    6. Derivative-order annealing: `exact_from`, the outer step before which the meta-gradient is
       first order (0 leaves it out, as the authors' published settings do; the paper: epoch 50).

    Args:
        loss_fn, has_state, test_loss_fn: as in `jaxmaml.maml`.
        num_inner_steps: the paper makes 5.
        inner_lr: the inner rate, of all layers and steps when training begins.
        learned_rates, multi_step_loss, exact_from: see above.
        options: other keyword arguments of `jaxmaml.maml`, but for `refresh_state`.

    Raises:
        ValueError: no inner steps; when called, for another learner's parameters.

    Example:
        >>> import jax.numpy as jnp, jaxmaml
        >>> loss_fn = lambda params, batch: jnp.mean((params["w"] - batch) ** 2) / 2
        >>> learner = jaxmaml.maml_plus_plus(loss_fn, 2, inner_lr=0.5, multi_step_loss=100)
        >>> learner.init({"w": jnp.array(0.0)}).learned["hyperparams"]["w"].tolist()
        [0.5, 0.5]
    """
    shared: dict[str, Any] = {
        **options, "multi_step_loss": multi_step_loss, "exact_from": exact_from,
        "test_loss_fn": test_loss_fn, "has_state": has_state,
    }  # fmt: skip
    if learned_rates:
        learner = meta_sgd(
            loss_fn, num_inner_steps,
            inner_lr=inner_lr, granularity="layer", per_step=True, **shared,
        )  # fmt: skip
    else:
        learner = maml(loss_fn, optax.sgd(inner_lr), num_inner_steps, **shared)
    return _from_step_zero(learner)


def _from_step_zero(learner: MetaLearner) -> MetaLearner:
    """A task's first pass is step 0, whatever the state of the outer step before counted."""

    def adapt(meta_params, support, *, state=(), **options):
        return learner.adapt(meta_params, support, state=reset_steps(state), **options)

    def trace(meta_params, support, view, *, state=(), **options):
        return learner.trace(meta_params, support, view, state=reset_steps(state), **options)

    def loss(meta_params, task, *, step=0, state=()):
        return learner.loss(meta_params, task, step=step, state=reset_steps(state))

    return MetaLearner(init=learner.init, adapt=adapt, trace=trace, loss=loss)


def reset_steps(state: State) -> State:
    """The state with every integer leaf called "step" set to 0.

    Example:
        >>> import jax.numpy as jnp
        >>> reset_steps({"norm": {"step": jnp.array(3), "mean": jnp.array(0.5)}})["norm"]["step"].item()
        0
    """

    def reset(path: Any, leaf: Any) -> Any:
        name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")[-1]
        is_count = name == "step" and jnp.issubdtype(jnp.result_type(leaf), jnp.integer)
        return jnp.zeros_like(leaf) if is_count else leaf

    return jax.tree.map_with_path(reset, state)
