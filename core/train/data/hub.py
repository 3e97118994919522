"""Hub datasets, and local folders of parquet or JSON, streamed through `datasets`."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

from core.errors import DataError
from core.train.config import Source
from core.train.data.documents import Record, problem

CHUNK = 256


@contextmanager
def named_errors(source: Source) -> Iterator[None]:
    """The hub client, fsspec and Arrow raise a dozen unrelated types; each becomes one line."""
    try:
        yield
    except DataError:
        raise
    except Exception as error:
        detail = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise DataError(
            f"data source {source.path} could not be read ({type(error).__name__}: {detail}); check its name, split "
            "and the network, then run the command again: with run.resume it continues where it stopped"
        ) from error


class HubCursor:
    """A place in the stream of one dataset. `datasets` seeks to it without reading what lies before its shard."""

    def __init__(self, source: Source) -> None:
        import datasets

        self.source = source
        with named_errors(source):
            self.data = datasets.load_dataset(source.path, name=source.subset, split=source.split, streaming=True)
            self.first = copy.deepcopy(self.data.state_dict())
        self.start(None)

    def start(self, state: Any | None) -> None:
        with named_errors(self.source):
            self.at = copy.deepcopy(self.first if state is None else state)
            self.data.load_state_dict(copy.deepcopy(self.at))
            self.rows = iter(self.data)  # lazy: until a row is read, `self.data` still tells its old place

    def state(self) -> Any:
        return copy.deepcopy(self.at)

    def take(self, count: int) -> list[Record]:
        """The next records; fewer than `count` only at the end."""
        with named_errors(self.source):
            records = [self.record(row) for row in islice(self.rows, count)]
            self.at = copy.deepcopy(self.data.state_dict())
        return records

    def record(self, row: dict[str, Any]) -> Record:
        field = self.source.text_field
        record = without_null({k: row[k] for k in ("id", "messages", "tools", "prompt_only") if row.get(k)})
        if "messages" not in record and field in row:
            record["text"] = row[field]
        wrong = problem(record, field)
        if wrong:
            columns = ", ".join(row)
            raise DataError(f"data source {self.source.path}: a row {wrong} (columns: {columns}); set its text_field")
        return record


def without_null(value: Any) -> Any:
    """Arrow gives every struct the keys of all others, null where a record had none; those go."""
    if isinstance(value, dict):
        return {k: without_null(v) for k, v in value.items() if v is not None}
    return [without_null(v) for v in value] if isinstance(value, list) else value


def hub_records(source: Source) -> Iterator[Record]:
    cursor = HubCursor(source)
    while records := cursor.take(CHUNK):
        yield from records
