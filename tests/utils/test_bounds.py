import dataclasses
from typing import Annotated

import pytest

from jaxlora.utils import bounds
from jaxlora.utils.bounds import Bound
from jaxlora.utils.errors import ConfigError

NAN, INFINITY = float("nan"), float("inf")


@dataclasses.dataclass
class Numbers:
    count: Annotated[int | None, Bound(1)] = 1
    rate: Annotated[float, Bound(0, open=True)] = 1.0
    dropout: Annotated[float, Bound(0, 1), "a note of another kind"] = 0.0
    free: float = NAN


@pytest.mark.parametrize(
    "values",
    [{}, {"count": None}, {"count": 10**9}, {"rate": 1e-300}, {"dropout": 0.999}],
)
def test_within(values):
    bounds.check(Numbers(**values))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"count": 0}, "`count` 0: must be at least 1"),
        ({"rate": 0.0}, "`rate` 0.0: must be above 0"),
        ({"rate": INFINITY}, "`rate` inf: must be above 0"),
        ({"rate": NAN}, "`rate` nan: must be above 0"),
        ({"dropout": 1.0}, "`dropout` 1.0: must be from 0 to below 1"),
        ({"dropout": -0.1}, "`dropout` -0.1: must be from 0 to below 1"),
        ({"dropout": NAN}, "`dropout` nan: must be from 0 to below 1"),
    ],
)
def test_outside(values, said):
    with pytest.raises(ConfigError) as caught:
        bounds.check(Numbers(**values))
    assert str(caught.value) == said and caught.value.field in values
