"""The runs of the commands, and the candidate of each of them."""

import math

import jax
import pytest

from experiments.tiny import IMAGE_SHAPE, PRESET
from jaxmaml.experiments import candidates, networks, presets
from jaxmaml.experiments.candidates import Spec
from jaxmaml.experiments.learners import LEARNERS

KEY = jax.random.key(0)


def test_the_default_comparison_is_exact_against_first_order_maml():
    assert candidates.comparison(PRESET) == [
        Spec("exact", "exact", 0.4, "maml"), Spec("first", "first", 0.4, "maml")
    ]  # fmt: skip


def test_learners_are_compared_at_each_rate():
    assert candidates.comparison(PRESET, [0.1, 2.0], ["fomaml", "anil"]) == [
        Spec("fomaml@0.1", "first", 0.1, "maml"), Spec("anil@0.1", "exact", 0.1, "anil"),
        Spec("fomaml@2", "first", 2.0, "maml"), Spec("anil@2", "exact", 2.0, "anil"),
    ]  # fmt: skip


def test_rates_that_print_alike_have_labels_of_their_own():
    labels = [spec.label for spec in candidates.comparison(PRESET, [0.01, 0.010000001, 2.0])]
    assert labels == [
        "exact@0.01", "first@0.01", "exact@0.010000001", "first@0.010000001", "exact@2", "first@2"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("learner", "order", "expected"),
    [
        ("maml", "exact", ("exact", "exact", 0.4, "maml")),
        ("maml", "first", ("first", "first", 0.4, "maml")),
        ("fomaml", None, ("fomaml", "first", 0.4, "maml")),
        ("maml", None, ("exact", "exact", 0.4, "maml")),
        ("protonet", None, ("protonet", "exact", 0.4, "protonet")),
        ("anil", "first", ("anil", "first", 0.4, "anil")),
    ],
)
def test_a_single_run_is_called_by_its_learner_or_order(learner, order, expected):
    assert candidates.single(PRESET, learner, order) == Spec(*expected)


@pytest.mark.parametrize(
    ("rates", "names", "message"),
    [
        ([0.1, 0.1], [], "inner_lrs must differ"),
        ([math.inf], [], "each of inner_lrs must be 0 or more"),
        ([1e39], [], "each of inner_lrs must be 0 or more"),
        ([-0.1], [], "each of inner_lrs must be 0 or more"),
        ([1e-46], [], "each of inner_lrs must be 0 or more"),
        ([0.1, 0.2], ["maml", "protonet"], "inner_lrs has no effect: learner 'protonet'"),
        ([], ["maml", "maml"], "learners must differ"),
        ([], ["mamo"], "did you mean 'maml'"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(rates, names, message):
    with pytest.raises(ValueError, match=message):
        candidates.comparison(PRESET, rates, names)


def test_a_candidate_holds_what_scoring_needs():
    network = networks.build(PRESET, IMAGE_SHAPE, KEY)
    preset = presets.override(PRESET, headline_step=2, chunk_size="all")
    built = candidates.build(Spec("run", "exact", 0.1), preset, network.model, 5, KEY)
    assert (built.label, built.entry) == ("run", LEARNERS["maml"])
    assert (built.num_test_inner_steps, built.headline_step) == (3, 2)
    assert built.chunk_size is None


@pytest.mark.parametrize("order", ["exact", "first"])
@pytest.mark.parametrize("learner", ["fomaml", "reptile", "protonet"])
def test_an_order_without_effect_is_refused(learner, order):
    with pytest.raises(ValueError, match=f"order has no effect: learner '{learner}'"):
        candidates.single(PRESET, learner, order)


def test_an_unknown_order_is_refused():
    network = networks.build(PRESET, IMAGE_SHAPE, KEY)
    with pytest.raises(ValueError, match="order must be one of exact, first; got 'second'"):
        candidates.build(Spec("run", "second", 0.1), PRESET, network.model, 5, KEY)
