r"""GBNF, llama.cpp's grammars, as llguidance's Lark.

GBNF works on characters, Lark on lexemes, each of which takes as much as it can. So what is
regular becomes one lexeme, as long as it may be: `[a-z]* "a"` is one, not two that never meet.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field

MAX_DEPTH = 100
MAX_RULES = 500
MAX_REPEAT = 100_000

_SPACE = re.compile(r"(?:[ \t\r\n]|#[^\n]*)*")
_NAME = re.compile(r"[A-Za-z0-9_-]+")
_RULE_START = re.compile(r"[A-Za-z0-9_-]+(?:[ \t\r\n]|#[^\n]*)*::=")
_REPEAT = re.compile(r"\{\s*(\d+)\s*(,?)\s*(\d*)\s*\}")
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_ESCAPED = {"n": "\n", "r": "\r", "t": "\t"}


class GbnfError(Exception):
    """`line` and `column` count from 1."""

    def __init__(self, problem: str, line: int, column: int) -> None:
        super().__init__(problem)
        self.problem = problem
        self.line = line
        self.column = column


@dataclass(slots=True)
class _Node:
    """An alternative of sequences, or one item; `suffix` repeats it."""

    # Of a literal or a class: Lark's text for it.
    text: str = ""
    # Of a reference.
    name: str = ""
    alternatives: list[list[_Node]] = field(default_factory=list)
    suffix: str = ""


def lark_of(source: str) -> str:
    """Raises: GbnfError."""
    rules, places = _Reader(source).rules()
    if "root" not in rules:
        raise GbnfError("has no rule named root", 1, 1)
    for name, place in places.items():
        if name not in rules:
            raise GbnfError(f"there is no rule named {name}", *_line_and_column(source, place))
    return _Writer(rules).text()


class _Reader:
    def __init__(self, source: str) -> None:
        self._source = source
        self._at = 0
        self._depth = 0
        # Where each name is first referred to.
        self._references: dict[str, int] = {}

    def rules(self) -> tuple[dict[str, _Node], dict[str, int]]:
        rules: dict[str, _Node] = {}
        self._skip()
        while self._at < len(self._source):
            name = self._match(_NAME, "a rule's name")
            if name in rules:
                raise self._error(f"the rule {name} is there twice")
            if len(rules) == MAX_RULES:
                raise self._error(f"more than {MAX_RULES} rules")
            self._skip()
            self._expect("::=")
            rules[name] = self._alternatives()
        return rules, self._references

    def _alternatives(self) -> _Node:
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise self._error("is nested too deeply")
        node = _Node(alternatives=[self._sequence()])
        while self._peek() == "|":
            self._at += 1
            node.alternatives.append(self._sequence())
        self._depth -= 1
        return node

    def _sequence(self) -> list[_Node]:
        items: list[_Node] = []
        while True:
            self._skip()
            if self._peek() in ("", "|", ")") or _RULE_START.match(self._source, self._at):
                return items
            item = self._item()
            item.suffix = self._suffix()
            items.append(item)

    def _item(self) -> _Node:
        match self._peek():
            case '"':
                return _Node(text=self._literal())
            case "[":
                return _Node(text=self._class())
            case ".":
                self._at += 1
                return _Node(text="/(?s:.)/")
            case "(":
                self._at += 1
                node = self._alternatives()
                self._expect(")")
                return node
        start = self._at
        name = self._match(_NAME, "a name, a literal, a class or a group")
        self._references.setdefault(name, start)
        return _Node(name=name)

    def _literal(self) -> str:
        self._at += 1
        text = ""
        while (char := self._peek()) != '"':
            text += self._escape() if char == "\\" else self._take()
        self._at += 1
        return json.dumps(text, ensure_ascii=False)

    def _class(self) -> str:
        self._at += 1
        negation = ""
        if self._peek() == "^":
            negation = self._take()
        parts: list[str] = []
        while (char := self._peek()) != "]":
            if char == "-" and parts and self._source[self._at + 1 : self._at + 2] != "]":
                self._at += 1
                parts.append("-")
                continue
            char = self._escape() if char == "\\" else self._take()
            parts.append(f"\\x{{{ord(char):x}}}")
        self._at += 1
        if not parts:
            raise self._error("an empty class matches nothing")
        return f"/[{negation}{''.join(parts)}]/"

    def _escape(self) -> str:
        self._at += 1
        kind = self._take()
        if kind in _HEX_DIGITS:
            digits = self._source[self._at : self._at + _HEX_DIGITS[kind]]
            try:
                char = chr(int(digits, 16))
                char.encode()
            except (ValueError, OverflowError):
                raise self._error(f"\\{kind}{digits} is no character") from None
            self._at += len(digits)
            return char
        if kind in _ESCAPED:
            return _ESCAPED[kind]
        if kind in '"\\[]-^':
            return kind
        raise self._error(f"\\{kind} is no escape")

    def _suffix(self) -> str:
        if self._peek() in ("*", "+", "?"):
            return self._take()
        if self._peek() != "{":
            return ""
        found = _REPEAT.match(self._source, self._at)
        if found is None:
            raise self._error("a repetition is {m}, {m,} or {m,n}")
        low, comma, high = found.groups()
        for number in (low, high or "0"):
            if len(number) > len(str(MAX_REPEAT)) or int(number) > MAX_REPEAT:
                raise self._error(f"repeats more than {MAX_REPEAT} times")
        self._at = found.end()
        return f"{{{int(low)}{comma}{int(high) if high else ''}}}"

    # ------------------------------------------------------------ characters

    def _skip(self) -> None:
        found = _SPACE.match(self._source, self._at)
        if found is not None:
            self._at = found.end()

    def _peek(self) -> str:
        return self._source[self._at : self._at + 1]

    def _take(self) -> str:
        char = self._peek()
        if not char or char == "\n":
            raise self._error("ends in the middle of a literal or a class")
        self._at += 1
        return char

    def _expect(self, text: str) -> None:
        if not self._source.startswith(text, self._at):
            raise self._error(f"expected {text}")
        self._at += len(text)

    def _match(self, pattern: re.Pattern[str], what: str) -> str:
        found = pattern.match(self._source, self._at)
        if found is None:
            raise self._error(f"expected {what}")
        self._at = found.end()
        return found.group()

    def _error(self, problem: str) -> GbnfError:
        return GbnfError(problem, *_line_and_column(self._source, self._at))


def _line_and_column(source: str, at: int) -> tuple[int, int]:
    return source.count("\n", 0, at) + 1, at - source.rfind("\n", 0, at)


class _Writer:
    def __init__(self, rules: dict[str, _Node]) -> None:
        self._rules = rules
        self._terminals = _terminals(rules)
        self._numbers = {name: number for number, name in enumerate(rules)}
        self._extra: list[str] = []

    def text(self) -> str:
        lines = [
            f"{self._name(name)}: {self._alternatives(node, name in self._terminals)}"
            for name, node in self._rules.items()
        ]
        return "\n".join([f"start: {self._name('root')}", *lines, *self._extra]) + "\n"

    def _name(self, name: str) -> str:
        # GBNF's names tell upper from lower case, Lark's say what a rule is by it.
        return f"{'T' if name in self._terminals else 'r'}{self._numbers[name]}"

    def _is_terminal(self, node: _Node) -> bool:
        if node.name:
            return node.name in self._terminals
        return all(self._is_terminal(item) for items in node.alternatives for item in items)

    def _alternatives(self, node: _Node, is_terminal: bool) -> str:
        if is_terminal:
            return " | ".join(self._sequence(items) for items in node.alternatives)
        return " | ".join(self._sequence(self._joined(items)) for items in node.alternatives)

    def _joined(self, items: list[_Node]) -> list[_Node]:
        """With neighbours that are regular as one terminal."""
        joined: list[_Node] = []
        run: list[_Node] = []

        def end_run() -> None:
            if len(run) > 1 or (run and (run[0].suffix or run[0].alternatives)):
                self._extra.append(f"X{len(self._extra)}: {self._sequence(run)}")
                joined.append(_Node(text=f"X{len(self._extra) - 1}"))
            else:
                joined.extend(run)
            run.clear()

        for item in items:
            if self._is_terminal(item):
                run.append(item)
            else:
                end_run()
                joined.append(item)
        end_run()
        return joined

    def _sequence(self, items: list[_Node]) -> str:
        return " ".join(map(self._item, items)) or '""'

    def _item(self, node: _Node) -> str:
        if node.name:
            return self._name(node.name) + node.suffix
        if node.text:
            return node.text + node.suffix
        return f"({self._alternatives(node, self._is_terminal(node))}){node.suffix}"


def _terminals(rules: dict[str, _Node]) -> frozenset[str]:
    """The rules that are regular because nothing in them, however deep, refers to itself."""
    missing = {name: len(set(_references(node))) for name, node in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, node in rules.items():
        for reference in set(_references(node)):
            users[reference].append(name)
    known: set[str] = set()
    ready = [name for name, count in missing.items() if count == 0]
    while ready:
        name = ready.pop()
        known.add(name)
        for user in users[name]:
            missing[user] -= 1
            if missing[user] == 0:
                ready.append(user)
    return frozenset(known)


def _references(node: _Node) -> list[str]:
    names = [node.name] if node.name else []
    return names + [
        name for items in node.alternatives for item in items for name in _references(item)
    ]
