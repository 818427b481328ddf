"""Typed tables, read and written with pyarrow: Parquet files and folders saved by `datasets`."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from jaxlora.data.quoting import Quoting, Tally
from jaxlora.data.sheet import Kinds, Sheet, Write, refuse_options
from jaxlora.utils import files as file_system
from jaxlora.utils.errors import UserError
from jaxlora.utils.extras import explained

PARQUET, FOLDER = "Parquet", "a folder of `datasets`"
# Files that `datasets` writes: the state of one split, and the names of several splits.
STATE, SPLITS = "state.json", "dataset_dict.json"
_METADATA = b"huggingface"  # key of the schema metadata with the features and class names
_UNLABELLED = -1  # the class of a row without a label in `datasets`


@dataclasses.dataclass(frozen=True)
class ArrowSheet:
    """A `Sheet` of typed rows, numbered from 1.

    Attributes:
      path: path for messages.
      load: returns the schema and a function from column names to record batches of these columns
        (None: all columns).
    """

    path: Path
    load: Callable[[], tuple[Any, Callable[[list[str] | None], Iterator[Any]]]]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Callable[[list[str] | None], Iterator[Any]]]:
        with explained():
            import pyarrow as pa
        try:
            schema, load = self.load()
            _ = schema.names  # decode the names here, since damaged ones are not UTF-8
            return schema, load
        except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
            raise UserError(
                f"{self.path}: cannot be read, or is damaged ({_first_line(error)}); write it again"
            ) from None

    @property
    def unreadable(self) -> Mapping[str, str]:
        """Columns of lists, structs and bytes."""
        return {field.name: str(field.type) for field in self._loaded[0] if not _is_plain(field)}

    @functools.cached_property
    def lists(self) -> frozenset[str]:
        """Columns of lists of strings or integers."""
        return frozenset(field.name for field in self._loaded[0] if _is_list_of_names(field.type))

    @functools.cached_property
    def _classes(self) -> dict[str, list[str]]:
        """Column → class names, for columns that `datasets` declares as (lists of) ClassLabel."""
        written = (self._loaded[0].metadata or {}).get(_METADATA)
        try:
            features = file_system.loads(written)["info"]["features"] if written else {}
            inner = {name: _element(feature) for name, feature in features.items()}
            return {
                name: [str(one) for one in feature["names"]]
                for name, feature in inner.items()
                if isinstance(feature, dict) and feature.get("_type") == "ClassLabel"
            }
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{self.path}: the metadata of `datasets` in it cannot be read ({error!r}); "
                "write it again"
            ) from None

    def rows(self, tally: Tally | None = None) -> Iterator[tuple[int, list[str]]]:
        """Yield the header and the rows with their numbers, see `Sheet.rows`."""
        schema, load = self._loaded
        import pyarrow as pa

        places = [
            place
            for place, field in enumerate(schema)
            if _is_plain(field) or field.name in self.lists
        ]
        header = [schema.names[place] for place in places]
        yield 0, header
        # pyarrow may read a name with a dot as a field of a nested column.
        apart = len(set(schema.names)) == len(schema) and not any("." in n for n in schema.names)
        number = 0
        try:
            for batch in load(header if apart else None):
                columns = batch.columns if apart else [batch.columns[place] for place in places]
                named = zip(header, columns, strict=True)
                strings = [self._strings(name, column, number) for name, column in named]
                for fields in zip(*strings, strict=True):
                    number += 1
                    yield number, list(fields)
        except (pa.ArrowException, OSError) as error:
            raise UserError(
                f"{self.where(number + 1)}: is damaged from here on ({_first_line(error)}); "
                "write the file again"
            ) from None

    def _strings(self, name: str, column: Any, before: int) -> list[str]:
        """Return the values of a column as strings; `before` rows precede them."""
        import pyarrow as pa

        if name in self.lists:
            return [self._list(name, value, n) for n, value in enumerate(column, before + 1)]
        if name in self._classes:
            return self._class_names(name, column.to_pylist(), before)
        found = column.cast(pa.string()).fill_null("")
        for number, value in enumerate(found, before + 1):
            with contextlib.suppress(UnicodeDecodeError):
                if "\0" not in value.as_py():
                    continue
            raise UserError(f"{self.where(number)}: {name}: not UTF-8 text without NUL; fix it")
        strings: list[str] = found.to_pylist()
        return strings

    def _list(self, name: str, value: Any, number: int) -> str:
        """Return a list as JSON, with null for unknown classes; an empty string if missing."""
        try:
            items = value.as_py()
        except UnicodeDecodeError:
            raise UserError(f"{self.where(number)}: {name}: not UTF-8 text; fix it") from None
        if items is None:
            return ""
        if name in self._classes:
            items = map(dict(enumerate(self._classes[name])).get, items)
        names = [one if one is None else str(one) for one in items]
        return json.dumps(names, ensure_ascii=False)

    def _class_names(self, name: str, values: list[int | None], before: int) -> list[str]:
        classes = self._classes[name]
        named: dict[int | None, str] = {None: "", _UNLABELLED: "", **dict(enumerate(classes))}
        for number, value in enumerate(values, before + 1):
            if value not in named:
                raise UserError(
                    f"{self.where(number)}: {name}: {value} is none of its {len(classes)} classes"
                )
        return [named[value] for value in values]

    def where(self, number: int) -> str:
        """Return the file and the row."""
        return f"{self.path}: row {number}"

    def layout(self, columns: Sequence[str]) -> str:
        """Return the required columns as text for messages."""
        return f"columns of strings or numbers named {', '.join(columns)}"

    def describe(self, tally: Tally) -> list[str]:
        """Return no notes, since nothing about a typed file is guessed."""
        return []


def _is_list_of_names(kind: Any) -> bool:
    """Return whether a type is a list of strings or integers."""
    import pyarrow as pa

    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    inner = kind.value_type
    inner = inner.value_type if pa.types.is_dictionary(inner) else inner
    return bool(
        pa.types.is_string(inner) or pa.types.is_large_string(inner) or pa.types.is_integer(inner)
    )


def _element(feature: Any) -> Any:
    """Return the element feature of a `datasets` list feature; any other feature unchanged."""
    if isinstance(feature, dict) and feature.get("_type") in ("Sequence", "List", "LargeList"):
        return feature.get("feature")
    return feature[0] if isinstance(feature, list) and len(feature) == 1 else feature


def _is_plain(field: Any) -> bool:
    """Return whether the values of a column can be cast to strings."""
    import pyarrow as pa

    kind = field.type.value_type if pa.types.is_dictionary(field.type) else field.type
    if any(part in str(kind) for part in ("binary", "<")):
        return False
    try:
        pa.array([], kind).cast(pa.string())
    except (pa.ArrowException, TypeError):
        return False
    return True


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200] or type(error).__name__


def open_parquet(
    files: Mapping[str, tuple[Path, Path]], delimiter: str | None, quoting: Quoting | None
) -> dict[str, Sheet]:
    """Open Parquet files; `files` maps names to a path for messages and the file to read."""
    refuse_options(PARQUET, delimiter, quoting)
    return {
        name: ArrowSheet(path, functools.partial(_load_parquet, file))
        for name, (path, file) in files.items()
    }


def _load_parquet(file: Path) -> tuple[Any, Callable[[list[str] | None], Iterator[Any]]]:
    import pyarrow.parquet as pq

    parquet = pq.ParquetFile(file)
    return parquet.schema_arrow, lambda columns: parquet.iter_batches(columns=columns)


def open_folders(
    files: Mapping[str, tuple[Path, Path]], delimiter: str | None, quoting: Quoting | None
) -> dict[str, Sheet]:
    """Open folders saved by `datasets`, one per split; see `open_parquet` for `files`."""
    refuse_options(FOLDER, delimiter, quoting)
    return {
        name: ArrowSheet(path, functools.partial(_load_arrow, find_parts(file)))
        for name, (path, file) in files.items()
    }


def _load_arrow(parts: list[Path]) -> tuple[Any, Callable[[list[str] | None], Iterator[Any]]]:
    import pyarrow as pa

    def batches(columns: list[str] | None) -> Iterator[Any]:
        for part in parts:
            with pa.memory_map(str(part)) as file:
                for batch in pa.ipc.open_stream(file):
                    batch.validate(full=True)  # out-of-range offsets would crash the process
                    yield batch if columns is None else batch.select(columns)

    with pa.memory_map(str(parts[0])) as file:
        return pa.ipc.open_stream(file).schema, batches


def find_splits(folder: Path) -> dict[str, Path]:
    """Return the splits in a folder saved by `datasets`, name → folder; empty for a single split.

    Raises:
      UserError: if the file with the split names is damaged.
    """
    if not os.path.exists(folder / SPLITS):
        return {}
    names = file_system.read_object(folder / SPLITS).get("splits")
    return {str(name): folder / str(name) for name in names} if isinstance(names, list) else {}


def find_parts(folder: Path) -> list[Path]:
    """Return the Arrow files of a split saved by `datasets`.

    Raises:
      UserError: if the folder was not saved by `datasets`, holds several splits, or is damaged.
    """
    if splits := find_splits(folder):
        raise UserError(
            f"{folder}: holds the splits {', '.join(splits)}; name one, such as "
            f"{next(iter(splits.values()))}"
        )
    if not os.path.exists(folder / STATE):
        raise UserError(
            f"{folder}: is a folder, but not a dataset saved by `datasets` (it has no {STATE}); "
            "name a file, or such a folder"
        )
    listed = file_system.read_object(folder / STATE).get("_data_files")
    names = [one.get("filename") for one in listed or () if isinstance(one, dict)]
    parts = [folder / name for name in names if isinstance(name, str) and Path(name).name == name]
    if not parts or len(parts) != len(listed or ()) or not all(map(os.path.isfile, parts)):
        raise UserError(f"{folder / STATE}: does not name the Arrow files beside it; save it again")
    return parts


@contextlib.contextmanager
def writing_parquet(file: IO[bytes], columns: Kinds) -> Iterator[Write]:
    """Write each batch of records as a row group; `dict` columns become maps."""
    with explained():
        import pyarrow as pa
        import pyarrow.parquet as pq
    types = {
        str: pa.string(), float: pa.float64(), list: pa.list_(pa.string()),
        dict: pa.map_(pa.string(), pa.float64()),
    }  # fmt: skip
    schema = pa.schema({name: types[kind] for name, kind in columns.items()})

    with pq.ParquetWriter(file, schema) as writer:

        def write(records: Sequence[Mapping[str, Any]]) -> None:
            arrays = [
                pa.array([_plain(record[field.name]) for record in records], field.type)
                for field in schema
            ]
            writer.write_table(pa.Table.from_arrays(arrays, schema=schema))

        yield write


def _plain(value: Any) -> Any:
    return list(value.items()) if isinstance(value, dict) else value
