"""Reads the part of WML (the game's data language) that unit files need: tags, keys, strings, conditions, macros."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

_TOKEN = re.compile(
    r"""
    (?P<define>^[ \t]*\#define[ \t]+(?P<macro>[^\s]+)(?P<arguments>[^\n]*)\n(?P<body>.*?)\#enddef)
  | (?P<condition>^[ \t]*\#(?P<word>ifdef|ifndef|ifhave|ifnhave|ifver|ifnver|else|endif)[^\n]*)
  | (?P<comment>\#[^\n]*)
  | (?P<tag>\[(?P<close>/)?\+?(?P<name>[A-Za-z0-9_]+)\])
  | (?P<key>[A-Za-z_][A-Za-z0-9_]*(?:,[A-Za-z_][A-Za-z0-9_]*)*)[ \t]*=[ \t]*
  | (?P<call>\{)
  | (?P<other>.)
    """,
    re.VERBOSE | re.DOTALL | re.MULTILINE,
)
_STRING = re.compile(r'_?[ \t]*"((?:[^"]|"")*)"')


@dataclass
class Tag:
    """One ``[name] … [/name]`` with its keys, in file order, and the tags inside it."""

    name: str
    keys: dict[str, str] = field(default_factory=dict)
    children: list[Tag] = field(default_factory=list)

    def all(self, name: str) -> Iterator[Tag]:
        """The tags called ``name`` directly inside this one."""
        return (child for child in self.children if child.name == name)


def parse(text: str) -> Tag:
    """Parse a file into a nameless tag that holds its top-level tags.

    ``#ifdef`` is taken as not defined. Macros without arguments that the text itself defines are put in their place in
    values; other macro calls are left out (they hold animations and traits, which carry none of the keys read here).

    Raises:
        ValueError: a tag is closed that was not open, or is never closed.
    """
    root = Tag("")
    stack = [root]
    macros: dict[str, str] = {}
    conditions: list[bool] = []
    position = 0
    while match := _TOKEN.match(text, position):
        position = match.end()
        if match.group("define") is not None:
            if not match.group("arguments").split("#")[0].strip():
                macros[match.group("macro")] = match.group("body").strip()
            continue
        if match.group("condition") is not None:
            word = match.group("word")
            if word == "else":
                conditions[-1] = not conditions[-1]
            elif word == "endif":
                conditions.pop()
            else:
                conditions.append(word in ("ifndef", "ifnhave", "ifnver"))
            continue
        active = all(conditions)
        if match.group("call") is not None:
            position = _after_braces(text, position)
        elif match.group("tag") is not None and active:
            name = match.group("name")
            if match.group("close"):
                if stack[-1].name != name:
                    raise ValueError(f"[/{name}] closes [{stack[-1].name}]")
                stack.pop()
            else:
                tag = Tag(name)
                stack[-1].children.append(tag)
                stack.append(tag)
        elif match.group("key") is not None:
            value, position = _value(text, position)
            if active:
                stack[-1].keys[match.group("key")] = _expand(value, macros)
    if len(stack) > 1:
        raise ValueError(f"[{stack[-1].name}] is not closed")
    return root


def _after_braces(text: str, position: int) -> int:
    depth = 1
    while depth and position < len(text):
        depth += {"{": 1, "}": -1}.get(text[position], 0)
        position += 1
    return position


def _value(text: str, position: int) -> tuple[str, int]:
    string = _STRING.match(text, position)
    if string is None:
        end = text.find("\n", position)
        end = len(text) if end < 0 else end
        return text[position:end].split("#")[0].strip(), end
    value, position = string.group(1).replace('""', '"'), string.end()
    while following := re.compile(r"[ \t]*\+[ \t]*\n?[ \t]*").match(text, position):
        string = _STRING.match(text, following.end())
        if string is None:
            break
        value, position = value + string.group(1).replace('""', '"'), string.end()
    return value, position


def _expand(value: str, macros: dict[str, str]) -> str:
    for _ in range(4):  # a macro may hold another one
        expanded = re.sub(r"\{([^{}\s]+)\}", lambda call: macros.get(call.group(1), call.group(0)), value)
        if expanded == value:
            break
        value = expanded
    return value
