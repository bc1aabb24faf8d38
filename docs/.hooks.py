"""For mkdocs: a link from a page to a file outside docs/ becomes a page of the site that shows the file.

Only from pages that lie in docs/ itself: those in folders below link to these.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_OUTWARD = re.compile(r"\]\(\.\./([^)#]+)\)")
_LANGUAGES = {".py": "python", ".yaml": "yaml", ".yml": "yaml", ".toml": "toml", ".md": "markdown"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page per file that some page links to."""
    pages = [Path(config["docs_dir"], file.src_uri) for file in files.documentation_pages() if "/" not in file.src_uri]
    for path in sorted({path for page in pages for path in _OUTWARD.findall(page.read_text(encoding="utf-8"))}):
        text = (ROOT / path).read_text(encoding="utf-8")  # one that is not there stops the build
        shown = f"# {path}\n\n````{_LANGUAGES.get(Path(path).suffix, 'text')}\n{text}````\n"
        files.append(File.generated(config, f"source/{path}.md", content=shown))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point the links there; what is shown itself is left as it is."""
    return markdown if "/" in page.file.src_uri else _OUTWARD.sub(r"](source/\1.md)", markdown)


def on_post_page(output: str, page: Any, config: Any) -> str:
    """Leave out the one script that the offline plugin fetches from elsewhere: it is for search in pages opened from
    the disk, which without it is not there; it is where the site is served."""
    return re.sub(r'<script src="https://unpkg\.com/[^"]*"></script>', "", output)


def on_post_template(output_content: str, template_name: str, config: Any) -> str:
    """The same for what is no page: 404.html."""
    return on_post_page(output_content, None, config)
