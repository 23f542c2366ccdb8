"""The explorer as one HTML file: the same JavaScript, the arrays beside it, no network."""

import base64
import json
from html import escape

from nsa_lite.checks import require
from nsa_lite.show.explorer.packing import packed_within, page_limit
from nsa_lite.show.explorer.script import script, style
from nsa_lite.show.explorer.sequence import TracedSequence

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
 content="default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:">
<title>{title}</title>
<style>
body {{ margin: 0 auto; max-width: 86rem; padding: 0.5rem; font-family: system-ui, sans-serif;
       color: #222; background: #fff; color-scheme: light dark; }}
h1 {{ font-size: 1.3rem; margin: 0.3rem 0; }}
@media (prefers-color-scheme: dark) {{ body {{ color: #ececec; background: #1b1b1d; }} }}
{css}
</style>
</head>
<body>
<main>
<h1>{title}</h1>
<noscript><p>{sentence}</p><img alt="{sentence}" src="data:image/png;base64,{picture}"></noscript>
<div id="explorer"></div>
</main>
<script type="application/json" id="facts">{facts}</script>
<script type="application/json" id="state">{state}</script>
<script type="text/plain" id="data">{data}</script>
<script type="module">
{module}
openPage();
</script>
</body>
</html>
"""


def page_of(
    sequence: TracedSequence, state: dict[str, int], title: str, sentence: str, picture: bytes
) -> str:
    """The page's text; of the compressed scores it holds as much as its size allows.

    Errors: ValueError when even the chosen blocks alone need more than page_limit.
    """
    text = {
        "title": escape(title),
        "sentence": escape(sentence),
        "css": style(),
        "module": script(),
        "picture": base64.b64encode(picture).decode(),
    }
    limit = page_limit(sequence.length)
    room = limit - len(PAGE) - sum(len(x.encode()) for x in text.values())
    room -= len(_json(sequence.tokens).encode()) + 5_000  # facts and state: tokens, a few numbers
    facts, data = packed_within(sequence, room * 3 // 4)  # base64 makes 4 bytes of 3
    require(
        len(data) <= room * 3 // 4,
        "the page",
        f"{len(data):,} bytes of scores",
        f"must stay below {limit:,} bytes: pass fewer checkpoints or layers, or of fewer queries, "
        "as TracedSequence(traces, tokens).only(positions)",
    )
    _, most = facts["ranges"]["n"]
    shown = _json(state | {"n": min(state["n"], most)})
    return PAGE.format(
        **text, facts=_json(facts), state=shown, data=base64.b64encode(data).decode()
    )


def _json(value: object) -> str:
    """JSON that HTML cannot end early or read as a tag: a token may be "</script>"."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")
