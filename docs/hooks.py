"""For `make docs`: pages that lie elsewhere in the repository, and links from the pages to its other files.

A link that leaves docs/ is right on GitHub, where it is tested that its file is there. In the site it leads to the page that this file
became, or to the file's address in the repository.
"""

from __future__ import annotations

import logging
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
# Files of the repository that are pages too.
PAGES = {
    "SECURITY.md": "security.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "LOG.md": "log.md",
    "kernels/README.md": "kernels.md",
}
LINK = re.compile(r"(\]\()(?!\w+:|#)([^)\s#]+)(#[^)\s]*)?")
log = logging.getLogger("mkdocs.hooks")


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for source, target in PAGES.items():
        files.append(File.generated(config, target, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    name = page.file.src_uri
    source = next((source for source, target in PAGES.items() if target == name), f"docs/{name}")

    def elsewhere(found: re.Match[str]) -> str:
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), found[2]))
        if not (ROOT / path).exists():
            log.warning("%s links to %s, which is not there", source, path)
        if path in PAGES:
            address = PAGES[path]
        elif path.startswith("docs/") and path.removeprefix("docs/") in files.src_uris:
            address = path.removeprefix("docs/")
        else:
            address = f"{config.repo_url}/{'tree' if (ROOT / path).is_dir() else 'blob'}/main/{path}"
        return f"{found[1]}{address}{found[3] or ''}"

    return LINK.sub(elsewhere, markdown)
