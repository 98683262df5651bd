"""Episodes of varying way and shot: Meta-Dataset's procedure, and padding that has no weight."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from image_sets import identities, pool_of

from jaxmaml.data import variable
from jaxmaml.data.variable import VariableEpisode


def sampled(sizes, key=0, num_tasks=50, **options):
    sample = variable.sampler(pool_of(sizes), num_tasks=num_tasks, **options)
    return jax.tree.map(np.asarray, jax.jit(sample)(jax.random.key(key)))


def published(rng, sizes, min_way=5, max_way=50):
    """Returns (way, query, shots of each class) by Meta-Dataset's procedure.

    Triantafillou et al. 2020 (arXiv 1903.03096), appendix, in float64 and one class at a time.
    """
    way = rng.integers(min_way, min(max_way, len(sizes)), endpoint=True)
    chosen = [int(sizes[i]) for i in rng.permutation(len(sizes))[:way]]
    query = min(10, min(size // 2 for size in chosen))
    fraction = 1.0 - rng.random()
    total = min(500, sum(int(np.ceil(fraction * min(100, size - query))) for size in chosen))
    weights = [np.exp(rng.uniform(np.log(0.5), np.log(2.0))) * size for size in chosen]
    shots = []
    for size, weight in zip(chosen, weights, strict=True):
        share = weight / sum(weights)
        shots.append(min(int(share * (total - way)) + 1, size - query))
    return way, query, shots


def statistics(way, query, shots):
    """Returns numbers of an episode whose distributions are compared."""
    drawn = [shot for shot in shots if shot]
    return way, query, sum(drawn), max(drawn), min(drawn), drawn[0], drawn[-1]


STATISTICS = ["way", "query", "support", "most shots", "fewest", "first class", "last class"]


def distance(one, other):
    """Returns the Kolmogorov-Smirnov distance of two samples."""
    at = np.union1d(one, other)
    cumulative = [np.searchsorted(np.sort(x), at, side="right") / len(x) for x in (one, other)]
    return np.abs(cumulative[0] - cumulative[1]).max()


def compositions(num_episodes, sizes, **options):
    episode = VariableEpisode(max_way=min(50, len(sizes)), **options)
    draw = jax.jit(jax.vmap(functools.partial(variable.composition, episode, jnp.asarray(sizes))))
    return jax.tree.map(np.asarray, draw(jax.random.split(jax.random.key(0), num_episodes)))


@pytest.mark.parametrize(
    ("sizes", "num_episodes"),
    [
        (np.random.default_rng(1).integers(20, 700, 60), 2_000),
        pytest.param([2, 3, 9, 40, 90, 300, 2000], 20_000, marks=pytest.mark.slow, id="few"),
        pytest.param([20] * 300, 20_000, marks=pytest.mark.slow, id="omniglot"),
        pytest.param([600] * 64, 20_000, marks=pytest.mark.slow, id="mini-imagenet"),
        pytest.param(
            np.random.default_rng(1).integers(2, 1300, 712),
            20_000,
            marks=pytest.mark.slow,
            id="many",
        ),
    ],
)
def test_compositions_are_distributed_as_those_of_meta_dataset(sizes, num_episodes):
    rng = np.random.default_rng(2)
    expected = np.array([statistics(*published(rng, sizes)) for _ in range(num_episodes)])
    drawn = compositions(num_episodes, sizes)
    rows = zip(drawn.way, drawn.query[:, 0], drawn.shots.tolist(), strict=True)
    found = np.array([statistics(*row) for row in rows])
    limit = 1.95 * np.sqrt(2 / num_episodes)  # exceeded by 1 of 1,000 pairs of equal distributions
    distances = [distance(one, other) for one, other in zip(found.T, expected.T, strict=True)]
    assert max(distances) < limit, dict(zip(STATISTICS, distances, strict=True))


@pytest.mark.slow
def test_a_class_has_more_shots_than_it_adds_to_the_size_of_the_support():
    drawn = compositions(2_000, [2000, *[60] * 9], max_contribution=30)
    assert drawn.shots.max() > 150
    assert drawn.shots.sum(1).max() <= 10 * 30
    bounded = compositions(2_000, [2000, *[60] * 9], max_contribution=30, max_shot=20)
    assert bounded.shots.max() == 20
    np.testing.assert_array_equal(bounded.shots, np.minimum(drawn.shots, 20))


@settings(max_examples=3)  # each example compiles a program
@given(data=st.data())
def test_episodes_hold_their_rules(data):
    sizes = data.draw(st.lists(st.integers(2, 12), min_size=2, max_size=6))
    options = {
        "min_way": 2,
        "max_way": data.draw(st.integers(2, 7)),
        "max_shot": data.draw(st.none() | st.integers(1, 6)),
        "max_query": data.draw(st.integers(1, 5)),
        "max_support": data.draw(st.integers(7, 40)),
    }
    tasks = sampled(sizes, key=data.draw(st.integers(0, 99)), num_tasks=20, **options)
    assert tasks.support["targets"].shape[1] <= options["max_support"]
    for number in range(20):
        support, query = _one(tasks, number)
        _check_task(support, query, sizes, options)


def _one(tasks, number):
    return jax.tree.map(lambda leaf: leaf[number : number + 1], tasks)


def _check_task(support, query, sizes, options):
    seen, class_of = set(), {}
    for batch in (support, query):
        weights, targets = batch["weights"][0], batch["targets"][0]
        assert (targets >= 0).all()
        assert (targets < min(options["max_way"], len(sizes))).all()
        for weight, slot, (label, example) in zip(
            weights, targets, identities(batch)[0], strict=True
        ):
            if weight == 0:
                continue
            assert weight == 1
            assert class_of.setdefault(slot, label) == label
            assert (label, example) not in seen
            seen.add((label, example))
    way = len(class_of)
    assert 2 <= way <= options["max_way"]
    assert sorted(class_of) == list(range(way))
    assert len(set(class_of.values())) == way
    smallest = min(sizes[label] for label in class_of.values())
    counts = np.bincount(query["targets"][0][query["weights"][0] > 0], minlength=way)
    assert (counts == min(options["max_query"], smallest // 2)).all()
    shots = np.bincount(support["targets"][0][support["weights"][0] > 0], minlength=way)
    assert shots.min() >= 1
    assert shots.max() <= (options["max_shot"] or np.inf)


def test_tasks_have_the_compositions_of_their_keys():
    sizes = [30, 9, 14, 60, 5, 22, 41]
    tasks = sampled(sizes, num_tasks=40, max_way=6, max_support=50)
    episode = VariableEpisode(max_way=6, max_support=50)
    draw = jax.jit(jax.vmap(functools.partial(variable.composition, episode, jnp.array(sizes))))
    drawn = draw(jax.random.split(jax.random.key(0), 40))
    for batch, counts in ((tasks.support, drawn.shots), (tasks.query, drawn.query)):
        slots = jax.nn.one_hot(batch["targets"], 6) * batch["weights"][..., None]
        np.testing.assert_array_equal(slots.sum(1), counts)


@pytest.mark.slow
def test_every_example_is_equally_frequent_in_support_and_query():
    tasks = sampled([12] * 2, num_tasks=4000, min_way=2)
    for batch in tasks:
        examples = identities(batch)[..., 1]
        counts = np.bincount(examples[batch["weights"] > 0], minlength=12)
        assert abs(counts / counts.mean() - 1).max() < 0.05


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"min_way": 4, "max_way": 9}, ValueError, "min_way=4 is more than the 3 classes"),
        ({"min_way": 3, "max_way": 2}, ValueError, "min_way=3 must be at most max_way=2"),
        ({"max_shot": 0}, ValueError, "max_shot must be an integer, 1 or more"),
        ({"max_contribution": 0}, ValueError, "max_contribution must be an integer, 1 or more"),
        ({"max_query": 1.5}, TypeError, "max_query must be an integer, 1 or more"),
        ({"max_support": 1}, ValueError, "max_support=1 must be at least max_way=2"),
        ({"sizes": [5, 1, 4]}, ValueError, "'class 1' has one image"),
    ],
)
def test_settings_that_cannot_be_are_refused(changed, error, message):
    options = {"sizes": [5, 6, 4], "min_way": 2, "max_way": 2, "max_shot": 3} | changed
    with pytest.raises(error, match=message):
        sampled(options.pop("sizes"), **options)
