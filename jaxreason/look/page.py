"""Self-contained HTML pages: one file with its style, script and data, no network.

A page follows the reader's light or dark colour scheme. A content security policy
forbids every request, so that no text of a model can make the browser load anything.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import unicodedata
from typing import Any

from jaxreason.runtime.files import plain_json

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --paper: #ffffff; --faint: #5c6670; --line: #d5dade; --shade: #f3f5f7;
  --accent: #0072B2; --good: #00734f; --bad: #b3400f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e7ea; --paper: #15181c; --faint: #9aa4ad; --line: #353c43;
  --shade: #1f2429; --accent: #6cb8e6; --good: #4cc79a; --bad: #f0915f; } }
* { box-sizing: border-box; }
body { margin: 0; color: var(--ink); background: var(--paper); font: 15px/1.5 system-ui, sans-serif; }
code, pre, .mono { font: 13px/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
a { color: var(--accent); }
table { border-collapse: collapse; }
th, td { padding: .25rem .75rem .25rem 0; text-align: left; border-bottom: 1px solid var(--line); vertical-align: top; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 1px; }
"""


def escape(text: Any) -> str:
    """Return text as it can stand in HTML, with all invisible characters visible.

    Overrides of the writing direction, terminal escapes and characters that draw
    nothing are shown as their code points, since they could make a text look like
    another.
    """
    return html.escape("".join(c if shown(c) else f"<U+{ord(c):04X}>" for c in str(text)))


def shown(character: str) -> bool:
    """Tell whether a character may stand as it is: `visible` in page scripts."""
    hidden = unicodedata.category(character).startswith(HIDDEN) or any(a <= ord(character) <= b for a, b in IGNORABLE)
    return character in "\n\t" or not hidden


# Categories of Unicode that draw nothing, or no known thing: control, format,
# surrogate, private and unassigned characters; line and paragraph separators.
HIDDEN = ("C", "Zl", "Zp")
# The other characters that draw nothing, Default_Ignorable_Code_Point of Unicode, which
# `unicodedata` lacks: joiners, fillers, variation selectors.
IGNORABLE = (
    *((0x034F, 0x034F), (0x115F, 0x1160), (0x17B4, 0x17B5), (0x180B, 0x180F), (0x3164, 0x3164), (0xFE00, 0xFE0F)),
    *((0xFFA0, 0xFFA0), (0xE0000, 0xE0FFF)),
)

SCRIPT = r"""
function visible(text) {
  return text.replace(/(?![\n\t])[\p{C}\p{Zl}\p{Zp}\p{Default_Ignorable_Code_Point}]/gu,
    c => "<U+" + c.codePointAt(0).toString(16).toUpperCase().padStart(4, "0") + ">");
}
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== false && value != null) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children.flat().filter(child => child != null));
  return made;
}
const data = JSON.parse(document.getElementById("data").textContent);
"""


def page(title: str, body: str, *, style: str = "", script: str = "", data: Any = None) -> str:
    """Return a whole page.

    `body` is HTML: texts in it must have passed `escape`. `script` finds `data` under
    this name, beside `visible(text)`, which does what `escape` does to characters, and
    `element(tag, attributes, ...children)`, which inserts texts as texts.
    """
    code = SCRIPT + script
    # Within a script element only "</" and "<!--" mean anything, so "<" is written as
    # an escape of JSON.
    text = json.dumps(plain_json(data), allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    hashed = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    policy = f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{hashed}'"
    policy += "; base-uri 'none'; form-action 'none'"  # which default-src does not cover
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{escape(title)}</title>
<style>{STYLE}{style}</style>
</head>
<body>
{body}
<script type="application/json" id="data">{text}</script>
<script>{code}</script>
</body>
</html>
"""
