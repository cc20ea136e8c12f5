"""manifest.json beside weights: size and hash of every file of a model folder that this project wrote, compared before it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

from swirl_fast.config import ConfigError
from swirl_fast.files import content_hash, fsync, hash_file, write_json

MANIFEST = "manifest.json"
OWN = (MANIFEST, "trained.json")  # the latter is written when the folder is complete, and read by train alone
LOADED = (
    ".safetensors",
    ".bin",
    ".json",
    ".jinja",
    ".model",
)  # endings of what transformers and its tokenizers look for
TEXTS = ("vocab.txt", "merges.txt")  # likewise
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

    Raises ConfigError for a file that is missing or not as it was written, and for one that was put beside them and would be loaded."""
    path = folder / MANIFEST
    if not path.is_file():
        return
    try:
        written = json.loads(path.read_text(encoding="utf-8"))
        entries = {file: (entry["bytes"], entry["xxh64"]) for file, entry in written["files"].items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ConfigError(f"{name}: {MANIFEST} cannot be read ({error}): {REMEDY}") from error
    there = {entry.name: entry for entry in folder.iterdir() if entry.is_file()}
    for file, (size, wanted) in entries.items():
        problem = _damage(there[file], size, wanted) if file in there else "is missing"
        if problem is not None:
            shown = file if file.isprintable() and len(file) < 256 else f"{file!r:.80}"
            raise ConfigError(f"{name}: {shown} {problem}: {REMEDY}")
    for file, beside in sorted(there.items()):
        if file not in entries and file not in OWN and (beside.suffix in LOADED or file in TEXTS):
            raise ConfigError(f"{name}: {file} is not in {MANIFEST}: {REMEDY}")


def _damage(path: Path, size: object, wanted: object) -> str | None:
    if (found := path.stat().st_size) != size:
        return f"has {found} bytes instead of {size}"
    if (known := content_hash(path, read=True)) != wanted:
        return f"is damaged (xxh64 {known} instead of {wanted})"
    return None
