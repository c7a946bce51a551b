# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Links from the pages to files of the repository that are no pages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links to other files of the repository into links to the repository's own site.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    folder = Path(page.file.abs_src_path).parent

    def link(match: re.Match[str]) -> str:
        target = (folder / match["path"]).resolve()
        own = (
            files.get_file_from_path(str(target.relative_to(ROOT / "docs")))
            if (ROOT / "docs") in target.parents
            else None
        )
        if own is not None and not own.inclusion.is_excluded():
            return match[0]
        if not target.exists():
            raise FileNotFoundError(f"{page.file.src_uri} links to {match['path']}, which does not exist.")
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}{match['anchor'] or ''})"

    return _LINK.sub(link, markdown)
