"""manifest.json beside weights: size and hash of every file of a model folder that this project wrote, compared before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from swirl_fast.config import ConfigError
from swirl_fast.files import content_hash, fsync, hash_file, write_json

MANIFEST = "manifest.json"
REMEDY = (
    "copy the folder again from where it is whole, or remove it and have train or export write it again; where the file was changed on "
    f"purpose, remove {MANIFEST}"
)


def write_manifest(folder: Path) -> None:
    """Of all files that are there, which get the same mode and are flushed to disk."""
    files = sorted(path for path in folder.iterdir() if path.is_file() and path.name != MANIFEST)
    entries = {path.name: {"bytes": path.stat().st_size, "xxh64": hash_file(path)} for path in files}
    write_json(folder / MANIFEST, {"files": entries})
    mode = (folder / MANIFEST).stat().st_mode & 0o777  # as the user's umask has it; safetensors writes 600
    for path in files:
        path.chmod(mode)
        fsync(path)
    fsync(folder / MANIFEST)
    fsync(folder)


def check_manifest(folder: Path, name: str) -> None:
    """Does nothing for a folder without a manifest of this project's. name: of messages.

    Raises ConfigError for a file that is missing or not as it was written, and for weights that were put beside them."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        entries = {file: (entry["bytes"], entry["xxh64"]) for file, entry in written["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ConfigError(f"{name}: {MANIFEST} cannot be read ({error}): {REMEDY}") from error
    for file, (size, wanted) in entries.items():
        if (problem := _damage(folder / file, size, wanted)) is not None:
            raise ConfigError(f"{name}: {file} {problem}: {REMEDY}")
    for weights in sorted(folder.glob("*.safetensors")):
        if weights.name not in entries:
            raise ConfigError(f"{name}: {weights.name} is not in {MANIFEST}: {REMEDY}")


def _damage(path: Path, size: object, wanted: object) -> str | None:
    if not path.is_file():
        return "is missing"
    if (found := path.stat().st_size) != size:
        return f"has {found} bytes instead of {size}"
    if (known := content_hash(path, read=True)) != wanted:
        return f"is damaged (xxh64 {known} instead of {wanted})"
    return None
