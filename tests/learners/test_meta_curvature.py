"""Curvature matrices against NumPy."""

import jax.numpy as jnp
import numpy as np
import optax

import jaxmaml


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
