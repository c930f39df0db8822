"""Makes one HTML file of style, script and data, with a policy that lets nothing else run or load."""

from __future__ import annotations

import base64
import hashlib
import html
import json
from collections.abc import Mapping
from importlib.resources import files
from typing import Any

SCRIPTS = (
    *("dom.js", "charts.js", "bars.js", "curves.js", "runs.js", "evaluation.js", "group_card.js", "groups.js"),
    "main.js",  # last: it uses the others
)
GENERATOR = '<meta name="generator" content="popo show">'
ESCAPES = str.maketrans({"<": "\\u003c", ">": "\\u003e", "&": "\\u0026"})


def page(title: str, content: Mapping[str, Any]) -> str:
    """Text of the file, in ASCII.

    Args:
        title: Title of the window.
        content: Contents of the page, in plain containers.
    """
    there = files("popo_lightning.cli.show") / "page"
    style = (there / "style.css").read_text("utf-8")
    script = "(() => {\n'use strict';\n" + "".join((there / name).read_text("utf-8") for name in SCRIPTS) + "})();\n"
    style, script = _ascii_css(style), _ascii_js(script)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )
    return PAGE.format(
        generator=GENERATOR,
        policy=policy,
        title=html.escape(title).encode("ascii", "xmlcharrefreplace").decode(),
        style=style,
        data=data_text(content),
        script=script,
    )


def data_text(content: Mapping[str, Any]) -> str:
    """JSON that cannot end a script element, whatever a policy wrote."""
    return json.dumps(content, allow_nan=False, separators=(",", ":")).translate(ESCAPES)


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _ascii_js(text: str) -> str:
    return "".join(c if c.isascii() else f"\\u{{{ord(c):x}}}" for c in text)


def _ascii_css(text: str) -> str:
    return "".join(c if c.isascii() else f"\\{ord(c):06x}" for c in text)


PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{generator}
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<meta name="referrer" content="no-referrer">
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<noscript>This page draws its charts with its own script, which this browser does not run.</noscript>
<div id="page"></div>
<script type="application/json" id="data">{data}</script>
<script>{script}</script>
</body>
</html>
"""
