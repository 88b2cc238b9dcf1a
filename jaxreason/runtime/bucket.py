"""Paths in buckets of Google Cloud Storage, gs://BUCKET/FOLDER, through etils' `epath`
with gcsfs (extra `gcs`), as orbax reads them.
"""

from __future__ import annotations

import os
import re
from typing import Any

SCHEME = "gs://"


def is_url(path: str | os.PathLike) -> bool:
    # `gs:bucket` and `gs:/bucket` count, so that `check_url` refuses them: libraries
    # below write some files of such a folder into a bucket, and others on this machine.
    return "://" in os.fspath(path) or os.fspath(path).startswith(SCHEME.rstrip("/"))


def check_url(url: str, flag: str = "--workdir") -> str:
    """Return the URL of a folder in a bucket, which `flag` named, without slashes at
    its end.

    Raises:
      ValueError: it does not name such a folder.
    """
    bucket, _, path = url.removeprefix(SCHEME).partition("/")
    if not url.startswith(SCHEME) or not re.fullmatch(r"[a-z0-9][a-z0-9._-]{1,220}[a-z0-9]", bucket) or not path.strip("/"):
        raise ValueError(f"{flag} got {url!r}; allowed: {SCHEME}BUCKET/FOLDER, or a folder of this machine")
    if re.search(r"[#?*\[\]\s\x00-\x1f\x7f]", path) or any(part in ("", ".", "..") for part in path.rstrip("/").split("/")):
        raise ValueError(
            f"{flag} got {url!r}; allowed: {SCHEME}BUCKET/FOLDER without spaces, #?*[], empty parts, . and .. in the folder"
        )
    return url.rstrip("/")


def remote(url: str) -> Any:
    """Return an `epath.Path`, which has the methods of `pathlib.Path`.

    Raises:
      ValueError: gcsfs is not installed.
    """
    try:
        import fsspec
        import gcsfs  # noqa: F401 (the file system behind epath)
        from etils import epath
    except ImportError:
        raise ValueError(f"{url} needs the package gcsfs: pip install gcsfs") from None

    # A listing that is kept would hide what orbax and other hosts write.
    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)
    return epath.Path(url)
