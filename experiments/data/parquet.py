"""What a Parquet file holds, the usual format of the Hugging Face hub."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from experiments.data.columns import no_column, no_text
from experiments.errors import UserError

_ROWS_AT_ONCE = 1024


def parquet_texts(path: Path, file: BinaryIO, column: str) -> Iterator[str]:
    """Yields the texts of a column, a block of rows in memory at a time.

    Args:
        path: Of the file, for errors.
        file: Its bytes.
        column: Name of a column of strings; a null is an empty text.

    Raises:
        UserError: If the file is damaged or not Parquet, has no such column, or the
            column holds something else.
    """
    for row in _rows(path, file, column):
        yield row[column] or ""


def parquet_rows(path: Path, file: BinaryIO) -> Iterator[dict[str, Any]]:
    """Yields the rows, values by column; arguments and errors are those above."""
    return _rows(path, file)


def _rows(path, file, column=None):
    row = 0
    try:
        table = pq.ParquetFile(file)
        _check_names(table.schema_arrow, path)
        if column is not None:
            _check_column(table.schema_arrow, column, path)
        columns = None if column is None else [column]
        for block in table.iter_batches(_ROWS_AT_ONCE, columns=columns):
            yield from block.to_pylist()
            row += block.num_rows
    except UnicodeDecodeError as error:
        what = "text" if column is None else f"column {column!r}"
        raise UserError(
            f"{path}, row {row + 1} or one of the {_ROWS_AT_ONCE} behind it: {what} "
            f"is not UTF-8 ({error.reason}); write the file again"
        ) from error
    except (pa.ArrowException, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path} is truncated, damaged or not Parquet: reading stopped "
            f"after {row:,} rows ({reason}); fetch it again"
        ) from error
    # Behind Arrow's, some of which are of these kinds too.
    except (OverflowError, ValueError) as error:
        raise UserError(
            f"{path}, row {row + 1} or one of the {_ROWS_AT_ONCE} behind it: a value "
            f"is none that Python has ({error}); leave out its column"
        ) from error


def _check_names(schema, path):
    for name in schema.names:
        if schema.names.count(name) > 1:
            raise UserError(
                f"{path}: two columns are called {name!r}; rename or drop one of them"
            )


def _check_column(schema, column, path):
    if column not in schema.names:
        raise no_column(column, schema.names, str(path))
    kind = schema.field(column).type
    if pa.types.is_dictionary(kind):
        kind = kind.value_type
    is_text = (
        pa.types.is_string(kind)
        or pa.types.is_large_string(kind)
        or pa.types.is_string_view(kind)
    )
    if not is_text:
        raise no_text(column, str(kind), str(path))
