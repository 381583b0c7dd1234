"""Gets a file of a public data set once, and makes sure that it is that file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from ..errors import DataError

_TIMEOUT_S = 60


@dataclass(frozen=True)
class RemoteFile:
    """A file and where to get it.

    Attributes:
        name: of the file, in a folder of its own data set.
        md5: hexadecimal, as its publisher gives it.
        urls: sites to try, in this order.
    """

    name: str
    md5: str
    urls: tuple[str, ...]


def fetch(file: RemoteFile, folder: Path) -> Path:
    """The path of ``file`` in ``folder``, downloaded if it is not there whole.

    A download arrives under another name and takes its own when its hash is right; one that fails leaves
    nothing.  Proxies are taken from the environment (HTTPS_PROXY and its like).

    Raises:
        DataError: no site gave the file; says what each one did.
    """
    try:
        import pooch
        import requests
    except ImportError as error:
        raise DataError(
            f"{file.name} is not in {folder}, and downloading needs pooch: pip install 'rlnas_fast[data]'"
        ) from error
    pooch.get_logger().setLevel(logging.WARNING)
    failures = []
    for url in file.urls:
        try:
            found = pooch.retrieve(
                url,
                known_hash=f"md5:{file.md5}",
                fname=file.name,
                path=folder,
                downloader=pooch.HTTPDownloader(timeout=_TIMEOUT_S),
            )
            return Path(found)
        except (requests.RequestException, OSError, ValueError) as error:
            failures.append(f"{url}: {_reason(error, file)}")
    raise DataError(
        f"cannot download {file.name}: {'; '.join(failures)}; "
        f"or put the file into the folder that RLNAS_DATA_DIR names"
    )


def _reason(error: Exception, file: RemoteFile) -> str:
    if isinstance(error, ValueError) and "hash" in str(error):
        return f"what came is not the file (its MD5 is not {file.md5})"
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return str(cause).strip().splitlines()[0] if str(cause).strip() else type(cause).__name__
