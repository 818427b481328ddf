"""The figures of docs/tour.md show what the page says, and are small."""

import re
from pathlib import Path

import numpy as np
import pytest

from experiments import tour
from jaxlora.aggregation import MEMBERS
from jaxlora.tasks.sharing import VARIANTS
from jaxlora.tasks.task import NAMES

DOCS = Path(__file__).parents[2] / "docs"


def test_the_adapter_finds_a_change_of_its_rank():
    found = tour.learn()
    values = np.linalg.svd(np.asarray(found.change), compute_uv=False)
    assert values[tour.RANK - 1] > 0.1 and values[tour.RANK] < 1e-5
    np.testing.assert_allclose(found.change, found.wanted, atol=1e-2)
    assert np.linalg.matrix_rank(np.asarray(found.kernel)) == tour.SIZE


def test_projected_gradients_are_at_a_right_angle_to_the_other_task():
    first, second = np.array([3.0, 1.0]), np.array([-1.5, 1.5])
    found = tour.operate(first, second)
    assert first @ second < 0
    assert found.projected[0] @ second == pytest.approx(0, abs=1e-6)
    assert found.projected[1] @ first == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(found.sums, [first + second, [1.4, 3.8]], rtol=1e-6)


def test_gradients_that_agree_are_not_changed():
    found = tour.operate((3.0, 1.0), (1.0, 2.0))
    np.testing.assert_array_equal(found.projected, found.gradients)


def test_methods_are_drawn_for_a_conflict_that_their_sum_does_not_resolve():
    found, gradients = tour.directions(), np.array(tour.CONFLICT)
    assert len(found) == 15  # as the page says
    assert (gradients @ found["sum"]).min() < 0 < (gradients @ found["upgrad"]).min()
    kept = [name for name in found if "non-conflicting" in MEMBERS[name].promises]
    assert kept and all((gradients @ found[name]).min() >= -1e-6 for name in kept)


def test_the_cone_holds_what_harms_neither_task():
    gains = tour.harmless() @ np.array(tour.CONFLICT).T
    assert (gains >= -1e-12).all()
    np.testing.assert_allclose(np.sort(gains, axis=1)[:, 0], 0, atol=1e-12)  # its edges
    np.testing.assert_allclose(np.linalg.norm(tour.harmless(), axis=1), 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_boxes_hold_every_task_once(name):
    columns = [left + n for left, width in tour.spans(VARIANTS[name].groups) for n in range(width)]
    assert columns == list(range(len(NAMES)))


def test_the_figures_drawn_are_those_of_the_page(tmp_path):
    assert tour.cli([f"--out={tmp_path}"]) == 0
    shown = set(re.findall(r"\((tour-\w+\.png)\)", (DOCS / "tour.md").read_text(encoding="utf-8")))
    assert shown == {path.name for path in tmp_path.iterdir()}
    for folder in (DOCS, tmp_path):
        assert all(1_000 < (folder / name).stat().st_size < 150_000 for name in shown)
