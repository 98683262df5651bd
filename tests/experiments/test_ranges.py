"""Settings out of range, and sizes that no machine could hold, are refused before anything is built."""

import dataclasses

import jax
import pytest

from jaxmaml.experiments import networks, presets, ranges

GLYPHS = presets.get("glyphs-5w1s")
HUGE = 999999999999999999999


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"way": 1}, "way must be 2 or more for images"),
        ({"hidden_sizes": (40, 0)}, "each of hidden_sizes must be an integer, 1 or more; got 0"),
        ({"hidden_sizes": (-1,)}, "each of hidden_sizes must be an integer, 1 or more; got -1"),
        ({"num_val_tasks": 1}, "num_val_tasks must be an integer, 2 or more; got 1"),
        ({"num_inner_steps": HUGE}, f"num_inner_steps must be at most 100,000; got {HUGE}"),
        ({"num_test_inner_steps": 100_001}, "num_test_inner_steps must be at most 100,000"),
        ({"num_outer_steps": 2**31}, "num_outer_steps must be at most 2,147,483,647"),
        ({"selection_steps": (-1,)}, "selection_steps must be an integer, 0 or more; got -1"),
        ({"chunk_size": HUGE}, "chunk_size must be at most 2,147,483,647"),
    ],
)
def test_a_count_that_makes_no_sense_is_refused(changes, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        presets.override(GLYPHS, **changes)


@pytest.mark.parametrize("changes", [{"headline_step": 1.5}, {"selection_steps": (0.5,)}])
def test_an_inner_step_that_is_scored_is_an_integer(changes):
    with pytest.raises(TypeError, match="must be an integer, 0 or more"):
        presets.override(GLYPHS, **changes)


@pytest.mark.parametrize("name", ["inner_lr", "outer_lr", "head_scale", "jitter", "outer_clip"])
@pytest.mark.parametrize("value", [-0.1, float("nan"), float("inf"), 1e39, 1e-46])
def test_a_number_must_be_one_that_float32_can_hold(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be 0 or more, and finite and not rounded"):
        presets.override(GLYPHS, **{name: value})


@pytest.mark.parametrize("value", [1.0, 1 - 1e-9, -0.1])
def test_an_average_moves_in_float32(value):
    with pytest.raises(ValueError, match=r"^averaging must be 0 or more and below 1, and finite"):
        presets.override(GLYPHS, averaging=value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"num_filters": 10**9},
            "27,000,000,032,000,000,000 parameters, .* is 1,000,000,000; .*nu",
        ),
        ({"model": "resnet12", "num_filters": 10**4}, "parameters.*num_filters=10000"),
        ({"model": "mlp", "hidden_sizes": (10**5, 10**5)}, "parameters.*hidden_sizes="),
        ({"model": "mlp", "image_size": 10**4, "num_tasks": 1}, "parameters.*image_size=10000"),
        ({"num_tasks": 10**7}, "numbers, and the limit is 10,000,000,000; .*num_tasks=10000000"),
        ({"shot": 10**6}, "numbers.*shot=1000000"),
        ({"test_query": 10**6}, "numbers.*test_query=1000000"),
    ],
)
def test_an_absurd_size_is_refused_with_the_number_and_the_limit(changes, message):
    with pytest.raises(ValueError, match=message):
        presets.override(GLYPHS, **changes)


@pytest.mark.parametrize("model", ["conv", "pooled", "mlp", "resnet12"])
def test_the_estimate_is_near_the_number_of_parameters(model):
    pooled = model == "pooled"
    preset = dataclasses.replace(
        presets.get("mini-imagenet-5w1s"), model="conv" if pooled else model, pooled=pooled
    )
    build = lambda key: networks.build(preset, (84, 84, 3), key).params
    params = jax.eval_shape(build, jax.random.key(0))
    number = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert ranges.num_parameters(preset) == pytest.approx(number, rel=0.02)
