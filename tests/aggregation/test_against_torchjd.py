"""Every member against TorchJD 0.18, in float32 and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import degenerate, normal, update

from jaxlora.aggregation import MEMBERS, aggregate
from jaxlora.aggregation.method import raw_key, split_raw
from jaxlora.aggregation.methods.pcgrad import orders

torch = pytest.importorskip("torch")
theirs = pytest.importorskip("torchjd.aggregation")
scalarization = pytest.importorskip("torchjd.scalarization")
for needed in ("cvxpy", "quadprog", "qpsolvers"):
    pytest.importorskip(needed)

# What cvxpy says of the problems that TorchJD's Nash-MTL gives it.
pytestmark = [
    pytest.mark.filterwarnings(f"ignore:{said}:UserWarning")
    for said in ("You are solving a parameterized problem", "Solution may be inaccurate")
]

FEW, MANY = (3, 8), (2, 5, 16)
COUNTS = [*FEW, *(pytest.param(count, marks=pytest.mark.slow) for count in MANY)]


def projector():
    """Without the terms that TorchJD adds for stability; quadprog itself needs a little."""
    from torchjd._linalg import QuadprogProjector

    return QuadprogProjector(norm_eps=0.0, reg_eps=1e-13)


def nash():
    """TorchJD's, without the limit of the update's norm."""
    return theirs.NashMTL(n_tasks=3, max_norm=0.0, optim_niter=200)


# Member → TorchJD's, and how exactly that one is solved.
ORACLES = {
    "sum": (theirs.Sum, 1e-12),
    "mean": (theirs.Mean, 1e-12),
    "mgda": (lambda: theirs.MGDA(1e-14, 20_000), 5e-3),  # Frank-Wolfe: 1/steps
    "cagrad": (lambda: theirs.CAGrad(c=0.5, norm_eps=0.0), 1e-4),  # an interior point
    "imtl_g": (theirs.IMTLG, 1e-8),
    "aligned_mtl": (theirs.AlignedMTL, 1e-8),
    "nash_mtl": (nash, 1e-3),  # a sequence of convex programs
    "fairgrad": (lambda: theirs.FairGrad(2.0), 1e-6),  # least squares
    "upgrad": (lambda: theirs.UPGrad(projector=projector()), 1e-8),
    "dualproj": (lambda: theirs.DualProj(projector=projector()), 1e-8),
    "config": (theirs.ConFIG, 1e-8),
}


def theirs_of(name, J):
    aggregator = ORACLES[name][0]()
    if name == "nash_mtl":
        aggregator.n_tasks = len(J)
        aggregator.reset()
    return aggregator(torch.tensor(J, dtype=torch.float64)).numpy()


def assert_near(found, expected, J, tolerance):
    """Relative to the update, or to the gradients where they cancel in it."""
    size = max(np.abs(expected).max(), 0.1 * np.abs(J).max())
    np.testing.assert_allclose(found, expected, rtol=0, atol=tolerance * size)


@pytest.mark.parametrize("num_tasks", COUNTS)
@pytest.mark.parametrize("name", ORACLES)
def test_random_gradients(name, num_tasks):
    J = normal(num_tasks)
    expected = theirs_of(name, J)
    exact = ORACLES[name][1]
    assert_near(update(name, J), expected, J, max(1e-4, exact))
    with jax.enable_x64(True):
        assert_near(update(name, J), expected, J, exact)


# Where TorchJD answers otherwise, or not at all: its CAGrad gives zero once its shortest vector is;
# its MGDA nears zero too slowly; its IMTL-G depends on the scales of dependent gradients; without
# their terms for stability UPGrad and DualProj are 0/0; where Nash-MTL and FairGrad have no
# solution its solvers stop anywhere; with a huge and a tiny gradient its Nash-MTL is 63 long, while
# the conditions in `test_optimality.py` make it √3.
UNSOLVABLE = {"one zero", "all zero", "opposite", "rank one"}
OTHERWISE = {
    "cagrad": UNSOLVABLE,
    "mgda": {"one zero", "opposite", "rank one"},
    "imtl_g": {"rank one", "one direction"},
    "nash_mtl": UNSOLVABLE | {"huge and tiny"},
    "fairgrad": UNSOLVABLE,
    "upgrad": {"all zero"},
    "dualproj": {"all zero"},
    "config": {"all zero"},
}
# The smallest singular value of these is below float32's rounding of the largest one's square.
ONLY_IN_FLOAT64 = {("aligned_mtl", "huge and tiny")}


@pytest.mark.parametrize("name", ORACLES)
def test_degenerate_gradients(name):
    for case, J in degenerate(3).items():
        if case in OTHERWISE.get(name, ()):
            continue
        expected = theirs_of(name, J)
        exact = ORACLES[name][1]
        if (name, case) not in ONLY_IN_FLOAT64:
            assert_near(update(name, J), expected, J, max(1e-4, exact))
        with jax.enable_x64(True):
            assert_near(update(name, J), expected, J, max(exact, 1e-7))


@pytest.mark.parametrize("num_tasks", FEW)
@pytest.mark.parametrize(("name", "oracle"), [("pcgrad", "PCGrad"), ("gradvac", "GradVac")])
def test_methods_that_visit_in_random_order(name, oracle, num_tasks, monkeypatch):
    """Three updates in a row, on the orders that our keys give; GradVac's targets move."""
    aggregator = getattr(theirs, oracle)(**({"eps": 0.0} if name == "gradvac" else {}))
    tx = aggregate(name, num_tasks)
    with jax.enable_x64(True):
        state, key = tx.init(None), raw_key(0)
        for seed in range(3):
            J = normal(num_tasks, seed=seed)
            found, state = tx.update(jnp.asarray(J), state)
            key, now = split_raw(key)
            rows = iter(_visits(np.asarray(orders(now, num_tasks)), name == "gradvac"))
            with monkeypatch.context() as patched:
                patched.setattr(torch, "randperm", lambda n, rows=rows: torch.tensor(next(rows)))
                expected = aggregator(torch.tensor(J, dtype=torch.float64)).numpy()
            assert_near(found, expected, J, 1e-8)
            assert next(rows, None) is None


def _visits(orders, of_others):
    """TorchJD's GradVac permutes places in the list of others, its PCGrad numbers of tasks."""
    if not of_others:
        return orders
    rows = []
    for i, order in enumerate(orders):
        others = [j for j in range(len(orders)) if j != i]
        rows.append(np.array([others.index(j) for j in order if j != i]))
    return rows


LOSSES = np.random.default_rng(5).uniform(0.1, 3.0, (6, 3))


def weights_of(tx, state, losses):
    """The weights, by a gradient for each task along an axis of its own."""
    found, state = tx.update(jnp.eye(len(losses)), state, losses=jnp.asarray(losses))
    return np.asarray(found), state


def slopes(loss, values):
    """Derivatives of a scalarized loss by the losses: the weights of the gradients."""
    values = torch.tensor(values, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(loss(values), values)[0].numpy()


def test_geometric_mean():
    with jax.enable_x64(True):
        tx = aggregate("geometric_mean", 3)
        found, _ = weights_of(tx, tx.init(None), LOSSES[0])
    np.testing.assert_allclose(found, slopes(scalarization.GeometricMean(), LOSSES[0]), rtol=1e-9)


def test_dynamic_weight_average_over_epochs_of_two_steps():
    oracle = scalarization.DWA()
    with jax.enable_x64(True):
        tx = aggregate(MEMBERS["dwa"].make(steps_per_epoch=2), 3)
        state = tx.init(None)
        for step, losses in enumerate(LOSSES):
            found, state = weights_of(tx, state, losses)
            np.testing.assert_allclose(found, slopes(oracle, losses), rtol=1e-9)
            if step % 2:
                oracle.step()
    assert not np.allclose(found, 1)


def test_famo_learns_as_torchjds():
    """Its `update` gets the losses of our next step."""
    oracle = scalarization.FAMO(3, lr=0.1).double()
    with jax.enable_x64(True):
        tx = aggregate(MEMBERS["famo"].make(learning_rate=0.1), 3)
        state = tx.init(None)
        for step, losses in enumerate(LOSSES):
            if step:
                oracle.update(torch.tensor(losses))
            found, state = weights_of(tx, state, losses)
            np.testing.assert_allclose(found, slopes(oracle, losses), rtol=1e-6)


def test_uncertainty_weighting_descends_its_own_loss():
    oracle = scalarization.UW(3).double()
    descent = torch.optim.SGD(oracle.parameters(), lr=0.1)
    with jax.enable_x64(True):
        tx = aggregate(MEMBERS["uw"].make(learning_rate=0.1), 3)
        state = tx.init(None)
        for losses in LOSSES:
            found, state = weights_of(tx, state, losses)
            np.testing.assert_allclose(found, slopes(oracle, losses), rtol=1e-9)
            descent.zero_grad()
            oracle(torch.tensor(losses)).backward()
            descent.step()
