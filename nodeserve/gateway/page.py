"""The page at `/`: the files of web/ as one document, and the policy that lets nothing else in.

The document has its style and its scripts inside, each named by its hash in the policy: a browser
runs those and no other, loads nothing from anywhere, asks this gateway alone and parses no text as
HTML. There is nothing secret in it: what it shows comes from `/nodeserve/view`, which needs a key
where there are keys.
"""

import base64
import hashlib
import re
from dataclasses import dataclass
from importlib import resources

_SHEET = re.compile(r'<link rel="stylesheet" href="([\w.]+)">')
_SCRIPT = re.compile(r'<script src="([\w.]+)"></script>')


@dataclass(frozen=True, slots=True)
class Page:
    """A document and what is sent with it."""

    body: bytes
    headers: dict[str, str]


def load_page() -> Page:
    """Put together from the package's files."""
    folder = resources.files("nodeserve.gateway") / "web"
    hashes: dict[str, list[str]] = {"style": [], "script": []}

    def inside(tag: str, name: str) -> str:
        text = (folder / name).read_text(encoding="utf-8")
        digest = hashlib.sha256(text.encode()).digest()
        hashes[tag].append(f"'sha256-{base64.b64encode(digest).decode()}'")
        return f"<{tag}>{text}</{tag}>"

    text = (folder / "page.html").read_text(encoding="utf-8")
    text = _SHEET.sub(lambda found: inside("style", found[1]), text)
    text = _SCRIPT.sub(lambda found: inside("script", found[1]), text)
    return Page(text.encode(), headers_with(policy(hashes["style"], hashes["script"])))


def policy(styles: list[str], scripts: list[str]) -> str:
    """Content-Security-Policy: nothing but these, and requests to this gateway."""
    rules = [
        "default-src 'none'",
        f"style-src {' '.join(styles)}",
        f"script-src {' '.join(scripts)}",
        "connect-src 'self'",
        "img-src data:",  # its icon
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    ]
    return "; ".join(rules)


def headers_with(content_policy: str) -> dict[str, str]:
    return {
        "content-security-policy": content_policy,
        "cache-control": "no-cache",
        "referrer-policy": "no-referrer",
        "x-content-type-options": "nosniff",
    }
