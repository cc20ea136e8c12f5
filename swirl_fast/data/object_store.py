"""Files of a URL: one copied from there, one copied to there, by the client that its kind needs.

    hf://datasets/ORG/NAME/PATH           huggingface_hub, which transformers brings
    file:///PATH                          nothing
    s3:// gs:// az:// abfs:// oci:// sftp://   fsspec, with a package for each: s3fs, gcsfs, adlfs (az, abfs), ocifs, paramiko

Credentials are where those clients look for them: environment variables, their own files, or fsspec's (~/.config/fsspec).
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import fsspec


def is_url(location: str) -> bool:
    return "://" in location


def download(url: str, target: Path) -> None:
    """Copies the file to `target`, whose folder is there.

    Raises ImportError, with the line to install it, where the client is missing; FileNotFoundError or the client's own error otherwise.
    """
    scheme, path = url.split("://", 1)
    if scheme == "file":
        shutil.copyfile(path, target)
    elif scheme == "hf":
        _from_hub(path, target)
    else:
        _client(url).get_file(url, str(target))


def upload(source: Path, url: str) -> None:
    """Copies the file to the URL; one that is there is replaced. Raises as `download`."""
    scheme, path = url.split("://", 1)
    if scheme != "file":
        _client(url).put_file(str(source), url)
        return
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{path}.tmp")
    shutil.copyfile(source, temporary)
    os.replace(temporary, path)


def check_client(url: str) -> None:
    """Raises ImportError, with the line to install it, where the client of such URLs is missing."""
    if url.split("://", 1)[0] not in ("file", "hf"):
        _class(url)


def _from_hub(path: str, target: Path) -> None:
    from huggingface_hub import hf_hub_download

    kind, organization, name, file = path.split("/", 3)
    if kind != "datasets":
        raise FileNotFoundError(f"hf://{path}: only data sets hold shards: hf://datasets/ORG/NAME/PATH")
    found = hf_hub_download(f"{organization}/{name}", file, repo_type="dataset", local_dir=target.parent)
    os.replace(found, target)


def _class(url: str) -> type[Any]:
    scheme = url.split("://", 1)[0]
    try:
        return fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or scheme
        raise ImportError(f"{url} needs a package that is not there ({error}): pip install {package}") from error


def _client(url: str) -> Any:
    _class(url)
    return fsspec.core.url_to_fs(url)[0]
