"""The boundary: what a type says comes through unchanged, all else is refused in one line."""

import dataclasses
import json
import math
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field

from jaxlora.utils import files, schema
from jaxlora.utils.errors import UserError


@dataclasses.dataclass(frozen=True)
class Inner:
    name: str
    sizes: tuple[tuple[str, int], ...] = ()

    def __post_init__(self) -> None:
        if self.name == "forbidden":
            raise ValueError("name: is forbidden")


@dataclasses.dataclass(frozen=True)
class Outer:
    kind: Literal["a", "b"]
    count: Annotated[int, Field(ge=1)]
    rate: float
    on: bool
    inner: Inner | None
    many: dict[str, Inner]
    range: tuple[float, float] = (0.0, 1.0)
    words: str | tuple[str, ...] = ()
    free: dict[str, Any] = dataclasses.field(default_factory=dict)


SOUND = {
    "kind": "a", "count": 3, "rate": 0.5, "on": True,
    "inner": {"name": "x", "sizes": [["y", 2]]}, "many": {"z": {"name": "z"}},
}  # fmt: skip
words = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=9)
inners = st.builds(
    Inner,
    words.filter(lambda name: name != "forbidden"),
    st.lists(st.tuples(words, st.integers(-9, 9))).map(tuple),
)
outers = st.builds(
    Outer,
    kind=st.sampled_from("ab"),
    count=st.integers(1, 10**12),
    rate=st.floats(allow_nan=False, allow_infinity=False),
    on=st.booleans(),
    inner=st.none() | inners,
    many=st.dictionaries(words, inners, max_size=3),
    words=words | st.lists(words, max_size=3).map(tuple),
)


@settings(max_examples=60, deadline=None)
@given(outers)
def test_it_is_the_inverse_of_asdict_also_through_json(value):
    plain = dataclasses.asdict(value)
    assert schema.build(Outer, plain) == schema.build(Outer, json.loads(json.dumps(plain))) == value


def test_a_whole_number_is_a_float_where_one_is_wanted():
    found = schema.build(Outer, SOUND | {"rate": 2, "range": [1, 2]})
    assert [type(x) for x in (found.rate, *found.range)] == [float] * 3


NESTED: list = []
for _ in range(5000):
    NESTED = [NESTED]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "c"}, "kind: must be 'a' or 'b', not 'c'"),
        ({"count": 0}, "count: must be greater than or equal to 1, not 0"),
        ({"count": True}, "count: must be a whole number, not True"),
        ({"count": 3.0}, "count: must be a whole number, not 3.0"),
        ({"count": "3"}, "count: must be a whole number, not '3'"),
        ({"rate": math.nan}, "rate: must be a finite number, not nan"),
        ({"rate": 10**400}, "rate: must be a finite number"),
        ({"rate": True}, "rate: must be a number, not True"),
        ({"on": 1}, "on: must be true or false, not 1"),
        ({"inner": 3}, "inner: must be an object, not 3"),
        ({"inner": {"name": "forbidden"}}, "inner: name: is forbidden"),
        ({"inner": {"sizes": []}}, "inner.name: missing"),
        ({"many": {"z": {"name": "z", "sizes": [["y", "2"]]}}}, "many.z.sizes.0.1: must be a"),
        ({"range": [1]}, "range: has too few items"),
        ({"range": [1, 2, 3]}, "range: must have at most 2 items"),
        ({"words": 3}, "words: must be a string or a list, not 3"),
        ({"words": ["a", 3]}, "words.1: must be a string, not 3"),
        ({"kinds": "a"}, "kinds: unknown field; did you mean kind?"),
        ({"inner": {"nam": "x"}}, "inner.nam: unknown field; did you mean name?"),
        ({"x\n": 1}, r"'x\n': unknown field (known: count, free, "),
        ({"inner": {"name": "a\0"}}, r"inner.name: 'a\x00' is not text"),
        ({"free": {"deep": ["\ud800"]}}, r"free.deep.0: '\ud800' is not text"),
        ({"free": {"\0": 1}}, r"free: '\x00' is not text"),
        ({"inner": {"name": "x" * 10_001}}, "inner.name: must have at most 10000"),
        ({"free": {"x": {1, 2}}}, "{1, 2} is no JSON value"),
        ({"free": {"x": NESTED}}, "nested too deeply"),
    ],
)  # fmt: skip
def test_what_a_type_does_not_say_is_refused(change, message):
    with pytest.raises(ValueError) as caught:
        schema.build(Outer, SOUND | change)
    assert message in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1 and str(caught.value).isprintable()


def test_a_file_is_named_with_the_remedy():
    with pytest.raises(UserError, match=r"^a\.json: rate: must be a number, not 'x'; put it back$"):
        schema.parse(Outer, SOUND | {"rate": "x"}, "a.json", "put it back")


def test_any_hint_will_do():
    assert schema.build(tuple[int, ...], [1, 2]) == (1, 2)
    assert schema.build(Literal["a", 3], 3) == 3
    with pytest.raises(ValueError, match="must be an object"):
        schema.build(dict[str, float], [1])


def test_json_of_more_bytes_than_are_read(tmp_path, monkeypatch):
    (tmp_path / "a.json").write_text("[1, 2]")
    assert files.read_json(tmp_path / "a.json") == [1, 2]
    monkeypatch.setattr(files, "MOST_JSON", 5)
    with pytest.raises(UserError, match=r"a\.json: .*6 bytes, at most 5 are read"):
        files.read_json(tmp_path / "a.json")
