"""Secrets that must not be shown: one table of the names that hide them.

A secret is found in three ways. By its name, in every spelling: a variable, an option (``--api-key
X``, ``--api-key=X``), a header (``Authorization: …``), JSON, the query of a URL, a command inside
an argument, a line of a log. By its form: ``user:password@host``, ``Bearer …``, tokens of known
makers. And by its value, once :class:`Secrets` has seen it under such a name.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

__all__ = ["HIDDEN", "Secrets", "command", "is_secret"]

HIDDEN = "***"

# The table. A name is split into words (API_KEY, api-key, apiKey). A name is secret if one of its
# words ends with one of these,
_ANYWHERE = ("apikey", "authorization", "bearer", "cookie", "credential", "credentials", "jwt",
             "passcode", "passphrase", "passwd", "password", "secret", "secrets")  # fmt: skip
# or if its last word is one of these,
_LAST = {"auth", "keys", "pass", "pat", "pw", "sas", "sig", "signature", "userpwd"}
# or if its last word ends with one of these,
_ENDS = ("key", "token")
# or if its last word is one of these and not the only word ($PWD is a folder, --max-tokens a
# number).
_BEHIND: dict[str, set[str] | None] = {
    "pwd": None,
    "tokens": {"access", "api", "auth", "bearer", "hf", "secret", "session"},
}
_MEANINGLESS = {"b64", "base64", "hex", "value"}  # words that do not count at the end of a name

_USER_OPTIONS = ("-u", "--user", "--proxy-user")  # curl's: user:password

_TOO_COMMON = {"auto", "default", "empty", "false", "none", "null", "true"}
_LEAST = 4  # the fewest characters of a value that is looked for in any text

_NAME = re.compile(r"""(?<![\w.-])-{0,2}(?P<name>[A-Za-z_][\w.-]*)\\*["']?\s*(?:=>|[:=])\s*""")
_OPTION = re.compile(r"""(?<![\w.-])--?(?P<name>[A-Za-z][\w.-]*)\\*["']?,?\s+(?!\\*["']?--)""")
_VALUE = re.compile(
    r"""(?P<open>\\*["'])(?P<quoted>.*?)(?P=open)|"""
    r"""[\[{(].*?[\]})]|\\*["'\[{(][^\n]*|"""  # the second form is a value that is cut off
    r"""(?:(?:Bearer|Basic|Token|Digest|ApiKey|Negotiate)\s+)?[^\s,;&"'<>\])}\\]+""",
    re.S | re.I,
)
_REST = re.compile(r"""[^"'\n]+""")  # of a header, whose value can contain blanks
_HEADERS = ("authorization", "cookie")
_USER = re.compile(
    r"""(?<![A-Za-z0-9+.-])(?P<scheme>[A-Za-z][A-Za-z0-9+.-]*://)(?P<user>[^/\s"'<>]*)@|"""
    r"""(?<![\w/:@.+-])(?P<name>[\w.+-]+):(?P<password>[^\s/:@"'<>]+)@(?=[\w\[])"""
)
_FORMS = re.compile(
    r"\b(?P<word>[Bb]earer\s+)[\w.~+/=-]{4,}|"
    r"\b(?:hf_|sk-|gh[opsur]_|github_pat_|glpat-|xox[abprs]-|nvapi-|AKIA|eyJ)[A-Za-z0-9._-]*"
    r"[A-Za-z0-9]{16,}[\w.-]*"
)


def is_secret(name: str) -> bool:
    """Whether the value under a name (a variable, an option, a header, a key) is a secret."""
    spaced = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)
    words = [word.lower() for word in re.split(r"[^A-Za-z0-9]+", spaced) if word]
    if any(word.endswith(_ANYWHERE) for word in words):
        return True
    while words and (words[-1].isdigit() or words[-1] in _MEANINGLESS):
        words.pop()
    if words[-2:] == ["key", "id"]:  # AWS_ACCESS_KEY_ID
        words.pop()
    if not words:
        return False
    last = re.sub(r"\d+$", "", words[-1])
    if last in _BEHIND and len(words) > 1:
        before = _BEHIND[last]
        return before is None or words[-2] in before
    return last in _LAST or last.endswith(_ENDS)


def command(parts: Sequence[str], found: list[str] | None = None) -> list[str]:
    """Return a command line without its secrets; hidden values are added to ``found``."""
    found = [] if found is None else found
    out: list[str] = []
    hide = more = False
    for part in parts:
        if hide and not part.startswith("--"):
            found.append(part)
            out.append(HIDDEN)
            hide = more  # `--api-key A B`: an option that takes several values
            continue
        hide = False
        if out and out[-1] in _USER_OPTIONS and ":" in part:
            name, _, value = part.partition(":")
            out.append(f"{name}:{_hidden(value, found)}")
            continue
        name, equals, value = part.partition("=")
        option = re.fullmatch(r"--?[A-Za-z][\w.-]*", name)
        if option and equals:
            out.append(
                f"{name}={_hidden(value, found) if is_secret(name) else _part(value, found)}"
            )
        elif option:
            hide = is_secret(name)
            more = hide and bool(re.search(r"keys?$", name, re.I))
            out.append(part)
        else:
            out.append(_part(part, found))
    return out


def _hidden(value: str, found: list[str]) -> str:
    found.append(value)
    return HIDDEN


def _part(text: str, found: list[str]) -> str:
    """Return one argument without its secrets: JSON, a header, a command, or any other text."""
    if text.lstrip()[:1] in ("{", "["):
        try:
            loaded = json.loads(text)
        except (ValueError, RecursionError):
            pass
        else:
            told = _data(loaded, found)
            return text if told == loaded else json.dumps(told)
    whole = re.match(r"([A-Za-z][\w.-]*)\s*[:=]\s*", text)
    if whole and is_secret(whole[1]):
        return whole[0] + _hidden(text[whole.end() :], found)
    try:
        parts = shlex.split(text)
    except ValueError:
        parts = []
    if len(parts) > 1:
        told = command(parts, found)
        if told != parts:
            return shlex.join(told)
    return _text(text, found)


def _data(value: Any, found: list[str]) -> Any:
    """Return JSON data without the values under the names of secrets."""
    if isinstance(value, Mapping):
        return {
            name: _all_hidden(each, found) if is_secret(str(name)) else _data(each, found)
            for name, each in value.items()
        }
    if isinstance(value, (list, tuple)):
        return [_data(each, found) for each in value]
    return _text(value, found) if isinstance(value, str) else value


def _all_hidden(value: Any, found: list[str]) -> Any:
    if value is None or isinstance(value, bool):
        return value
    each = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(each, (list, tuple)):
        for one in each:
            _all_hidden(one, found)
        return HIDDEN
    return _hidden(str(value), found)


def _text(text: str, found: list[str]) -> str:
    """Return a text of any form (a log, an error, a URL) without its secrets."""
    text = _USER.sub(lambda match: _user(match, found), text)
    for pattern in (_NAME, _OPTION):
        text = _named(text, pattern, found)

    def form(match: re.Match[str]) -> str:
        found.append(match[0][len(match["word"] or "") :])
        return f"{match['word'] or ''}{HIDDEN}"

    return _FORMS.sub(form, text)


def _user(match: re.Match[str], found: list[str]) -> str:
    """Hide the password of ``user:password@host``, and a user that may be a token."""
    name, colon, password = (match["user"] or f"{match['name']}:{match['password']}").partition(":")
    if colon or len(name) >= 8:
        found.append(password if colon else name)
    return f"{match['scheme'] or ''}{name + ':' if colon else ''}{HIDDEN}@"


def _named(text: str, pattern: re.Pattern[str], found: list[str]) -> str:
    out, at = [], 0
    for match in pattern.finditer(text):
        if match.start() < at or not is_secret(match["name"]):
            continue
        header = match["name"].lower().endswith(_HEADERS)
        value = _VALUE.match(text, match.end())
        if header and value is not None and not value["open"]:
            value = _REST.match(text, match.end())
        if value is None or value[0].strip() in ("", HIDDEN):
            continue
        if _prose(match[0], match["name"], value[0]):
            continue
        groups = value.groupdict()
        found.append(groups["quoted"] if groups.get("open") else value[0])
        mark = groups.get("open") or ""
        out.append(f"{text[at : match.end()]}{mark}{HIDDEN}{mark}")
        at = value.end()
    return "".join([*out, text[at:]])


def _prose(whole: str, name: str, value: str) -> bool:
    """Whether a name and its value are more likely plain words: "ms a token: 2.5"."""
    bare = re.fullmatch(r"[a-z]+", name) and not name.endswith(_ANYWHERE)
    return bool(bare and re.search(r"[:\s]\s+$", whole) and '"' not in whole and "'" not in whole
                and "--" not in whole and len(value) < 8)  # fmt: skip


class Secrets:
    """The secrets of a run: the values of secret names in its environments and command lines.

    Args: environs: environments; the values of their secret names become known. commands: command
    lines; the values of their secret options become known.
    """

    def __init__(
        self, environs: Iterable[Mapping[str, str]] = (), commands: Iterable[Sequence[str]] = ()
    ) -> None:
        found: list[str] = []
        for environ in environs:
            for name, value in environ.items():
                if is_secret(name):
                    found.append(value)
                else:
                    _USER.sub(lambda match: _user(match, found), value)
        for each in commands:
            command(each, found)
        values: set[str] = set()
        for value in found:
            scheme, _, rest = value.partition(" ")
            value = value.strip("\\\"' ")
            lines = [value, *value.splitlines(), *([rest] if scheme.lower() in _SCHEMES else [])]
            for line in map(str.strip, lines):
                values |= {line, _quoted(line), json.dumps(line)[1:-1]}
        self._values = sorted(filter(_telling, values), key=len, reverse=True)

    def text(self, text: str) -> str:
        """Return a text of any form without its secrets."""
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return _text(text, [])

    def data(self, value: Any) -> Any:
        """Return JSON data with every text as :meth:`text` gives it; names stay.

        Only the names of environment variables count here: "key" may be a figure.
        """
        if isinstance(value, Mapping):
            return {
                name: HIDDEN
                if _VARIABLE.fullmatch(str(name)) and is_secret(str(name)) and each
                else self.data(each)
                for name, each in value.items()
            }
        if isinstance(value, (list, tuple)):
            return [self.data(each) for each in value]
        return self.text(value) if isinstance(value, str) else value

    def command(self, parts: Sequence[str]) -> list[str]:
        """Return a command line without its secrets."""
        return [self._known(part) for part in command(parts)]

    def environ(self, environ: Mapping[str, str]) -> dict[str, str]:
        """Return an environment without its secrets."""
        return {
            name: HIDDEN if is_secret(name) else self.text(value) for name, value in environ.items()
        }

    def _known(self, text: str) -> str:
        for value in self._values:
            text = text.replace(value, HIDDEN)
        return text


_VARIABLE = re.compile(r"[A-Z][A-Z0-9_]*")
_SCHEMES = {"apikey", "basic", "bearer", "digest", "negotiate", "token"}


def _quoted(text: str) -> str:
    """Return a text in the encoding of a URL."""
    return "".join(
        c
        if c.isascii() and (c.isalnum() or c in "-_.~")
        else "".join(f"%{byte:02X}" for byte in c.encode(errors="replace"))
        for c in text
    )


def _telling(value: str) -> bool:
    """Whether a value can be searched for in any text without hiding ordinary text."""
    return (
        len(value) >= _LEAST
        and value.lower() not in _TOO_COMMON
        and not (value.isdigit() and len(value) < 6)
        and value != HIDDEN
    )
