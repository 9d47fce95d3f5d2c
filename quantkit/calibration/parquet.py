"""Rows of parquet files, on this machine or the Hub, a few at a time and only the columns that are wanted.

pyarrow's own threads are left out: one that still reads through Python when the interpreter ends aborts the process.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import closing
from typing import Any, BinaryIO

from quantkit.errors import InputError, MissingError

ROWS = 64  # a batch
BUFFER = 1 << 20  # bytes of a column that are fetched at once


def rows(file: BinaryIO, where: str, columns: tuple[str, ...]) -> Generator[tuple[dict[str, Any], str], None, None]:
    """Each row as a mapping of those of `columns` that there are, and its place; closes the file.

    Raises InputError when it is no parquet or has none of the columns.
    """
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise MissingError(f"{where}: reading parquet needs pyarrow: pip install datasets") from None
    try:
        with closing(file), parquet.ParquetFile(file, buffer_size=BUFFER, pre_buffer=False) as opened:
            known = opened.schema_arrow.names
            wanted = [name for name in columns if name in known]
            if not wanted:
                raise InputError(f"{where}: {no_column(columns, known)}")
            i = 0
            for batch in opened.iter_batches(batch_size=ROWS, columns=wanted, use_threads=False):
                for row in batch.to_pylist():
                    yield row, f"{where}, row {i}"
                    i += 1
    except (pyarrow.ArrowException, UnicodeDecodeError, OSError) as e:
        if isinstance(e, OSError) and (type(e) is not OSError or e.errno is not None):
            raise  # of the disk or the network; what pyarrow cannot decompress is a bare OSError too
        raise InputError(f"{where}: not readable as parquet ({' '.join(str(e).split())[:200]})") from None


def no_column(columns: tuple[str, ...], known: Any) -> str:
    """ "no column 'text' or 'messages'; there is 'words'"."""
    wanted = " or ".join(filter(None, [", ".join(map(repr, columns[:-1])), repr(columns[-1])]))
    return f"no column {wanted}; there is {', '.join(repr(str(name)) for name in known) or 'none'}"
