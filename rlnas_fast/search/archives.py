"""Reads .npz archives that come from elsewhere, and writes files all at once."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from ..errors import DataError


def read_npz(
    path: Path, required: Sequence[str] = (), optional: Sequence[str] | None = None
) -> dict[str, np.ndarray]:
    """The named arrays of an archive; all of them where ``optional`` is None.  Never reads pickles.

    Raises:
        DataError: it is not there, not an archive, damaged, holds objects, or lacks a required array
            (the message lists those it has).
    """
    try:
        with path.open("rb") as stream:
            archive = np.load(stream, allow_pickle=False)
            if not isinstance(archive, np.lib.npyio.NpzFile):
                raise DataError(f"{path} is a single array; give an .npz archive")
            missing = [name for name in required if name not in archive.files]
            if missing:
                raise DataError(
                    f"{path} has no {', '.join(missing)}; it holds {', '.join(archive.files) or 'nothing'}"
                )
            wanted = archive.files if optional is None else (*required, *optional)
            return {name: archive[name] for name in wanted if name in archive.files}
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"no data file {path}: give the path of an .npz archive") from error
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path} as an .npz archive of plain arrays: {error}") from error


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Lets ``write`` fill a new file and puts it in the place of ``path``; if that fails, nothing changes.

    Makes the folder where there is none.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        write(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
