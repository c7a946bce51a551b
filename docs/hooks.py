# Copyright 2026 The peft_ogpsa authors.
# SPDX-License-Identifier: Apache-2.0
"""Links that work in the repository and on the site, and the site's files outside `docs/`."""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
_PAGES = {"contributing.md": ROOT / "CONTRIBUTING.md", "changelog.md": ROOT / "CHANGELOG.md"}
# Marks of Hugging Face's docstring style, which mkdocstrings shows as they are.
_TYPE = re.compile(r"<code>[^<]*`[^<]*</code>")
_NAME = re.compile(r"\[<code>~?(?P<name>[\w.]+)</code>\]")
_LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?P<anchor>#[^)]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Adds the pages at the root of the repository and the figures that benchmarks made."""
    figures = {
        f"figures/{path.relative_to(RESULTS).as_posix()}": path
        for path in sorted(RESULTS.rglob("*.png"))
    }
    for place, path in {**_PAGES, **figures}.items():
        files.append(File.generated(config, place, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """Turns links between files of the repository into links on the site, or to the repository.

    Raises:
        FileNotFoundError: If there is no such file.
    """
    on_site = {
        Path(file.abs_src_path): file.src_uri for file in files if not file.inclusion.is_excluded()
    }
    folder = Path(page.file.abs_src_path).parent
    place = posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        target = (folder / match["path"]).resolve()
        anchor = match["anchor"] or ""
        if target in on_site:
            return f"]({posixpath.relpath(on_site[target], place or '.')}{anchor})"
        if not target.exists():
            raise FileNotFoundError(
                f"{page.file.src_uri} links to {match['path']}, which does not exist."
            )
        kind = "tree" if target.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{target.relative_to(ROOT).as_posix()}{anchor})"

    return _LINK.sub(link, markdown)


def on_page_content(html: str, page: Any, config: Any, files: Any) -> str:
    """Removes the marks of Hugging Face's docstring style from the reference."""
    if page.file.src_uri != "api.md":
        return html
    html = _TYPE.sub(lambda match: re.sub(r"\[`~?|`\]|[`*]", "", match[0]), html)
    return _NAME.sub(r"<code>\g<name></code>", html)
