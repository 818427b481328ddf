"""Thresholds against a search over all decisions with scikit-learn's scores."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxlora.tasks import thresholds

oracle = pytest.importorskip("sklearn.metrics")
ORACLES = {
    "accuracy": oracle.accuracy_score,
    "balanced_accuracy": oracle.balanced_accuracy_score,
    "f1": lambda y, x: oracle.f1_score(y, x, zero_division=0),
    "macro_f1": lambda y, x: oracle.f1_score(y, x, average="macro", labels=[0, 1], zero_division=0),
}
# Few values, so that probabilities repeat.
PAIRS = st.lists(
    st.tuples(st.sampled_from([0.0, 0.1, 0.3, 0.5, 0.500001, 0.9, 1.0]), st.integers(0, 1)),
    min_size=1, max_size=25,
)  # fmt: skip


@pytest.mark.parametrize("measure", thresholds.MEASURES)
@settings(max_examples=60, deadline=None)
@given(pairs=PAIRS)
@pytest.mark.filterwarnings("ignore:A single label was found", "ignore:y_pred contains classes")
def test_no_other_threshold_has_a_better_score(measure, pairs):
    p, y = np.array(pairs).T
    threshold, score = thresholds.choose(p, y, measure)
    assert 0 < threshold < 1
    if y.min() == y.max():
        assert threshold == 0.5
        return
    cuts = [*p[p < 1], *([-1] if p.min() > 0 else [])]  # a threshold is between 0 and 1
    assert score == pytest.approx(max(ORACLES[measure](y, p > cut) for cut in cuts))
    assert ORACLES[measure](y, p > threshold) == pytest.approx(score)


def test_of_equally_good_thresholds_the_one_nearest_to_one_half_is_chosen():
    assert thresholds.choose(np.array([0.2, 0.3, 0.8, 0.9]), np.array([0, 0, 1, 1]))[0] == 0.5
    p, y = np.array([0.1, 0.3, 0.6, 0.9]), np.array([0, 1, 0, 1])  # 0.2 is as good as 0.75
    assert thresholds.choose(p, y, "accuracy") == (0.75, 0.75)
    assert thresholds.choose(np.array([0.1, 0.2, 0.3]), np.array([0, 1, 1]))[0] == pytest.approx(
        0.15
    )


def test_a_rare_class_has_a_low_threshold():
    rng = np.random.default_rng(0)
    y = (rng.random(5000) < 0.03).astype(float)
    p = 1 / (1 + np.exp(-(2 * y + rng.normal(0, 1, 5000) - 4)))
    threshold, score = thresholds.choose(p, y)
    assert threshold < 0.4 and score > oracle.f1_score(y, p > 0.5) + 0.05
