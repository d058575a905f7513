"""How the pages look.

On the verifier's, from pale to deep blue is rounding, from orange to brown is off. Blue and
orange are told apart by people of every colour vision; what is off has a frame as well.
"""

from __future__ import annotations

COLOURS = (
    "#f4f7fb",
    "#e1ebf6",
    "#c6dbef",
    "#9ecae1",
    "#6baed6",
    "#fdae6b",
    "#f16913",
    "#a63603",
    "#5b1a00",
)
"""Of each level of `heat_map.level`: five of what rounding explains, four of what is off."""
_WHITE_TEXT_FROM = 7

_STYLE = """
:root { color-scheme: light; font: 14px/1.45 system-ui, sans-serif; color: #1b2733; }
body { margin: 0 auto; max-width: 1240px; padding: 20px 28px 60px; background: #fff; }
header { border-left: 6px solid; padding: 4px 20px; margin-bottom: 28px; background: #f7f9fb; }
header.agrees, header.run { border-color: #2b7bba; }
header.differs { border-color: #d94801; }
header.differs h1 b { color: #b33c00; }
header.agrees h1 b { color: #1f6299; }
h1 { font-size: 24px; font-weight: 500; margin: 10px 0 4px; }
header p { font-size: 15px; margin: 4px 0 10px; overflow-wrap: anywhere; }
header ul { margin: 4px 0 10px; padding-left: 18px; }
dl { display: flex; flex-wrap: wrap; gap: 4px 28px; margin: 10px 0; }
dt { font-size: 11px; color: #5b6b7b; }
dd { margin: 0; font-weight: 600; }
h2 { font-size: 17px; margin: 32px 0 8px; }
h2 small { font-size: 13px; font-weight: 400; color: #5b6b7b; margin-left: 6px; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
.list th { text-align: left; font-size: 12px; color: #5b6b7b; font-weight: 500; }
.list th, .list td { padding: 4px 18px 4px 0; border-bottom: 1px solid #e6ebf0; }
.list td { vertical-align: top; white-space: nowrap; }
.list td small { display: block; color: #5b6b7b; white-space: normal; }
.list td b { color: #b33c00; }
.list i { font-style: normal; display: inline-block; padding: 0 7px; border-radius: 3px; }
.heat { border-collapse: separate; border-spacing: 2px; }
.heat th { font-size: 12px; font-weight: 500; padding: 2px 6px; color: #3c4c5c; }
.heat th[scope=row] { text-align: right; white-space: nowrap; padding-right: 10px; }
.heat td { min-width: 66px; height: 24px; text-align: center; font-size: 12px; padding: 0 4px; }
.heat td[colspan] { padding: 0; }
.heat [title] { cursor: help; border-radius: 3px; }
.alone { display: flex; gap: 2px; }
.alone div { flex: 1; line-height: 24px; padding: 0 8px; white-space: nowrap; }
.off { outline: 2px solid #2a1000; outline-offset: -2px; font-weight: 700; }
.legend { font-size: 12px; color: #5b6b7b; margin: 34px 0 -16px; }
.legend span { display: inline-block; min-width: 46px; text-align: center; padding: 1px 5px; }
.legend sup { line-height: 0; }
figure { margin: 12px 0; }
figure svg { max-width: 100%; height: auto; display: block; }
code { font-size: 12px; }
details { margin-top: 14px; }
summary { cursor: pointer; font-weight: 600; margin-bottom: 8px; }
"""

_LEVELS = "\n".join(
    f".l{number} {{ background: {colour}; "
    f"color: {'#fff' if number >= _WHITE_TEXT_FROM else '#16222e'}; }}"
    for number, colour in enumerate(COLOURS)
)

PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>STYLE</style>
</head>
<body>
{body}
</body>
</html>
""".replace("STYLE", (_STYLE + _LEVELS + "\n").replace("{", "{{").replace("}", "}}"))
"""To be formatted with `title` and `body`, both HTML."""
