"""Pages: texts stay texts, and data survive."""

import json
import re

from jaxreason.look.page import escape, page

HOSTILE = '<script>alert(1)</script> & "quoted" \x1b[31mred\x07 \u202egnp.exe\u2066 \u2028 </script><!--'


def test_a_hostile_text_is_escaped_and_its_control_characters_are_visible():
    text = escape(HOSTILE + "\n\tkept")
    assert "<" not in text
    assert '"' not in text
    assert "&lt;U+001B&gt;[31mred&lt;U+0007&gt;" in text
    assert "&lt;U+202E&gt;gnp.exe&lt;U+2066&gt;" in text
    assert text.endswith("\n\tkept")
    for code in (0xAD, 0x2061, 0x200D, 0xFE0F, 0xE0041, 0x3164, 0x180E, 0xE000):
        assert escape(chr(code)) == f"&lt;U+{code:04X}&gt;"
    assert escape("a \ud800 b \U0001f600") == "a &lt;U+D800&gt; b \U0001f600"  # no encoding has a lone surrogate


def test_data_can_not_end_their_element():
    made = page("title", "<p>body</p>", data={"text": HOSTILE, "value": float("nan")})
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', made, re.S)[1]
    assert json.loads(block) == {"text": HOSTILE, "value": None}
    assert made.count("<script") == 2


def test_a_page_asks_the_network_for_nothing():
    made = page(HOSTILE, "")
    assert "default-src 'none'" in made
    assert not re.search(r"(src|href)\s*=|url\(|@import", made)
