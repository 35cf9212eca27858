"""Write the option tables of docs/cli.md from the parsers of the commands.

python tools/cli_tables.py           write them
python tools/cli_tables.py --check   exit with status 1 if the document is out of date
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from pyggml.cli import COMMANDS, parser_of  # noqa: E402

PAGE = ROOT / "docs" / "cli.md"
MARKS = re.compile(r"(<!-- options: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def rows(parser: argparse.ArgumentParser) -> Iterator[tuple[str, str]]:
    """Every argument except --help: its spelling and its meaning."""
    formatter = parser._get_formatter()
    for action in parser._actions:
        if isinstance(action, argparse._HelpAction):
            continue
        names = ", ".join(f"`{name}`" for name in action.option_strings)
        metavar = formatter._metavar_formatter(action, action.dest)(1)[0]
        value = f"`{metavar}`" if action.nargs != 0 else ""
        if action.nargs == "?":
            value = f"[{value}]"
        spelling = " ".join(filter(None, (names, value))).replace("|", r"\|")
        yield spelling, formatter._expand_help(action).replace("|", r"\|")


def table(command: str) -> str:
    lines = ["| option | meaning |", "|---|---|"]
    lines += [f"| {spelling} | {meaning} |" for spelling, meaning in rows(parser_of(command))]
    return "\n".join(lines) + "\n"


def page(text: str) -> str:
    """The document with its tables updated."""
    return MARKS.sub(lambda m: m[1] + table(m[2]) + m[3], text)


def main() -> int:
    old = PAGE.read_text()
    missing = [name for name in COMMANDS if f"<!-- options: {name} -->" not in old]
    if missing:
        print(f"docs/cli.md has no section for: {', '.join(missing)}", file=sys.stderr)
        return 1
    if page(old) == old:
        return 0
    if "--check" in sys.argv:
        print("docs/cli.md is out of date; run python tools/cli_tables.py", file=sys.stderr)
        return 1
    PAGE.write_text(page(old))
    return 0


if __name__ == "__main__":
    sys.exit(main())
