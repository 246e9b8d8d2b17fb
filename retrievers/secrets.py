"""Keys of services: they stay in environment variables, whose names options give, and are taken out of messages."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

from retrievers.base import RetrieverError

ENV_SUFFIX = "_env"
"""Ends the name of an option whose values are names of environment variables."""

_SECRET_WORDS = {
    "authorization",
    "bearer",
    "cookie",
    "credential",
    "credentials",
    "passwd",
    "password",
    "secret",
    "token",
}
_KEY_OWNERS = {"access", "account", "api", "auth", "client", "private", "secret", "subscription"}
_WORD = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_URL_PARAMETER = re.compile(r"[?&]([^=&#]+)=[^&#]")
_URL_PASSWORD = re.compile(r"://[^/?#@]*:[^/?#@]+@")


def from_environment(variable: str, option: str) -> str:
    """The secret in an environment variable.

    Args:
        variable: its name.
        option: that gave the name, for messages.

    Raises:
        RetrieverError: if the name is none, the variable is not set, or its value cannot stand in a header.
    """
    if not isinstance(variable, str) or not _VARIABLE.fullmatch(variable):
        # What stands there may well be the secret itself.
        raise RetrieverError(
            f"{option} must be the name of the environment variable that holds the key, such as MY_KEY"
        )
    value = os.environ.get(variable, "")
    if not value:
        raise RetrieverError(f"{option}: the environment has no {variable}; put the key into it")
    if not (value.isascii() and value.isprintable()):
        raise RetrieverError(f"{option}: the key in {variable} must be printable ASCII; check it for line breaks")
    return value


def all_from_environment(variables: Mapping[str, str], option: str) -> dict[str, str]:
    """The secrets in several variables, by the names that they are sent under. Raises RetrieverError as above."""
    if not isinstance(variables, Mapping):
        raise RetrieverError(f"{option} must give each name its environment variable, such as {{X-Key: MY_KEY}}")
    return {name: from_environment(variable, f"{option}.{name}") for name, variable in variables.items()}


def hiding(secrets: Iterable[str]) -> Callable[[str], str]:
    """A function that replaces each secret in a text by `[key]`: servers repeat what they are sent.

    A secret is also known as a URL or JSON writes it. Hide before a text is cut, since the cut may go through a secret.
    """
    # Shorter ones are no keys, and hiding them would spoil the message.
    hidden = sorted({secret for secret in secrets if len(secret) >= 4}, key=len, reverse=True)
    if not hidden:
        return str
    pattern = re.compile("|".join("".join(map(_written, secret)) for secret in hidden))
    return lambda text: pattern.sub("[key]", text)


def redacting(secrets: Iterable[str], error: Callable[[str], Exception] = RetrieverError) -> Callable[[str], Exception]:
    """A maker of what `error` makes of a message, in which each secret is hidden."""
    hide = hiding(secrets)
    return lambda message: error(hide(message))


def public_url(url: str) -> str:
    """A URL as a message may show it: without user and password, and without its parameters."""
    rest = url.partition("?")[0]
    scheme, separator, place = rest.partition("://")
    authority, slash, path = place.partition("/")
    return f"{scheme}{separator}{authority.rpartition('@')[2]}{slash}{path}" if separator else rest


class PublicUrls(logging.Filter):
    """Shortens the URLs that an HTTP library logs to their public part, since a key may stand in their parameters."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Change the record; it is always logged."""
        if isinstance(record.args, tuple):
            record.args = tuple(public_url(str(a)) if type(a).__name__ == "URL" else a for a in record.args)
        return True


def find_literal_key(options: Any, path: str = "") -> str | None:
    """Where in nested options a key stands as it is, such as "headers.Authorization"; None if there is none.

    By its name (authorization, token, password, api_key …) with a text as its value, in the parameters or the password of
    a URL, as an argument of a command, or by the word Bearer before it. What stands under a name that ends in `_env` is the
    name of a variable, and is a key if it cannot be one.
    """
    if isinstance(options, Mapping):
        for name, value in options.items():
            where = f"{path}.{name}" if path else str(name)
            if str(name).lower().endswith(ENV_SUFFIX):
                if (found := _find_no_variable(value, where)) is not None:
                    return found
                continue
            if isinstance(value, str) and value and _is_secret_name(str(name)):
                return where
            if (found := find_literal_key(value, where)) is not None:
                return found
    elif isinstance(options, Sequence) and not isinstance(options, str | bytes):
        for position, value in enumerate(options):
            where = f"{path}.{position}"
            if isinstance(value, str) and (value.startswith("-") or "=" in value):
                argument = value.partition("=")[0]
                if not argument.strip().count(" ") and _is_secret_name(argument):
                    return where
            if (found := find_literal_key(value, where)) is not None:
                return found
    elif isinstance(options, str) and _holds_key(options):
        return path
    return None


def check_no_literal_key(options: Any, name: str) -> None:
    """Raise RetrieverError, without the key, if options that are written down hold a key as it is.

    Args:
        name: of the options, for the message.
    """
    found = find_literal_key(options)
    if found is not None:
        raise RetrieverError(
            f"`{name}{'.' if found else ''}{found}` holds a key, and these settings are written into files; put the key into an "
            f"environment variable and give the variable's name, in an option that ends in {ENV_SUFFIX}: "
            "token_env: MY_KEY, headers_env: {X-Key: MY_KEY}, parameters_env: {api_key: MY_KEY} or environment: [MY_KEY]"
        )


def _holds_key(text: str) -> bool:
    if text.lower().startswith("bearer ") or _URL_PASSWORD.search(text):
        return True
    return any(_is_secret_name(name) for name in _URL_PARAMETER.findall(text))


def _find_no_variable(value: Any, where: str) -> str | None:
    if isinstance(value, Mapping):
        named = ((_find_no_variable(inner, f"{where}.{name}")) for name, inner in value.items())
        return next((found for found in named if found is not None), None)
    return where if isinstance(value, str) and not _VARIABLE.fullmatch(value) else None


def _written(character: str) -> str:
    """A pattern of the ways in which URLs and JSON write an ASCII character."""
    code = f"{ord(character):02x}"
    in_url = rf"%(?i:{code})" + (r"|\+" if character == " " else "")
    # The longest way first: `%` alone would leave the rest of `%25`.
    return rf"(?:{in_url}|\\u00(?i:{code})|\\*{re.escape(character)})"


def _is_secret_name(name: str) -> bool:
    words = [word.lower() for word in _WORD.findall(name)]
    if _SECRET_WORDS & set(words) or "apikey" in words or words == ["key"]:
        return True
    return any(before in _KEY_OWNERS and word == "key" for before, word in pairwise(words))
