"""The files next to a vocabulary that say what its special tokens are: tokenizer_config.json, special_tokens_map.json, added_tokens.json.

Where they disagree, the order is that of transformers: a tokenizer_config.json with `added_tokens_decoder` comes first, and the two older
files only fill in what it leaves out; without that key the older files come first.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from partinf.foundation.documents import Table, read_json, shown
from partinf.foundation.errors import InvalidInput, raise_offences

_CONFIG, _MAP, _ADDED = "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
_MORE = "additional_special_tokens"
_MAX_ID = (1 << 31) - 1  # an id enters a step as a number of 32 bits


@dataclass(frozen=True)
class AddedToken:
    """A token that is found in a text before the vocabulary is used.

    Attributes:
        special: it is no text. lstrip, rstrip: it swallows the blanks before or after it. single_word: it is found only where no letter or
            digit stands next to it. normalized: it is found in the text as the normalizer leaves it.
    """

    id: int
    content: str
    special: bool
    lstrip: bool = False
    rstrip: bool = False
    single_word: bool = False
    normalized: bool = False


@dataclass(frozen=True)
class Settings:
    """What the files say; None where they say nothing.

    Attributes:
        names: the token of a role (`bos_token`, …), by its name. specials: every token that is named as special.
        added: tokens with their ids, each id and each name once.
        legacy: whether sentencepiece puts its space before every stretch of text between special tokens, not only before the first.
    """

    names: Mapping[str, str]
    specials: frozenset[str]
    added: tuple[AddedToken, ...]
    add_bos: bool | None
    add_eos: bool | None
    add_prefix_space: bool | None
    legacy: bool | None


def read_settings(directory: Path) -> Settings:
    """What the files of a directory say, whichever are there.

    Raises:
        InvalidInput: every value of a wrong type.
    """
    offences: list[str] = []
    config = Table(read_optional(directory / _CONFIG), str(directory / _CONFIG), offences)
    roles = Table(read_optional(directory / _MAP), str(directory / _MAP), offences)
    newer = isinstance(config.data.get("added_tokens_decoder"), dict)
    tables = (config, roles) if newer else (roles, config)
    names = {role: name for role in _NAMED if (name := next(filter(None, (_name(table, role) for table in tables)), None))}
    more = {name for table in tables for name in _more(table)}
    specials = frozenset(names.values()) | more
    listed = [*_decoder(config), *_added(directory, specials, offences)]
    by_id: dict[int, AddedToken] = {}
    known: set[str] = set()
    for token in listed:
        if token.id not in by_id and token.content not in known:
            by_id[token.id] = token
            known.add(token.content)
    flags = [_flag(config, key) for key in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy")]
    raise_offences(offences)
    return Settings(names, specials, tuple(by_id[token] for token in sorted(by_id)), *flags)


def is_present(path: Path) -> bool:
    """Whether there is anything of that name, be it a directory or a link to nowhere."""
    return path.exists() or path.is_symlink()


def read_optional(path: Path) -> dict[str, Any]:
    """The JSON object in a file, or nothing where there is no file.

    Raises:
        InvalidInput: what is there is no such object.
    """
    if not is_present(path):
        return {}
    value = read_json(path)
    if not isinstance(value, dict):
        raise InvalidInput(f"{path}: {shown(value)}; expected an object")
    return value


@contextmanager
def refusing(what: str) -> Iterator[None]:
    """Turns whatever a tokenizer library raises within into `InvalidInput`: it raises bare `Exception`, and its panics are none."""
    try:
        yield
    except (InvalidInput, KeyboardInterrupt, SystemExit, GeneratorExit):
        raise
    except BaseException as error:
        raise InvalidInput(f"{what} ({str(error).partition(chr(10))[0] or type(error).__name__})") from error


def _flag(table: Table, key: str) -> bool | None:
    return None if table.data.get(key) is None else table.flag(key)


def _content(value: Any) -> str | None:
    """A token as these files name it: a string, or an object with `content`. None where it is neither."""
    if isinstance(value, Mapping):
        value = value.get("content")
    return value if isinstance(value, str) else None


def _name(table: Table, role: str) -> str | None:
    value = table.data.get(role)
    name = _content(value)
    if value is not None and name is None:
        table.offences.append(f"{table.where}: {role} = {shown(value)}; expected a string, or an object with the string `content`")
    return name


def _more(table: Table) -> list[str]:
    value = table.data.get(_MORE)
    found = [_content(one) for one in value] if isinstance(value, list) else [None]
    if value is not None and None in found:
        table.offences.append(
            f"{table.where}: {_MORE} = {shown(value)}; expected a list of tokens, each a string or an object with `content`"
        )
    return [name for name in found if name]


def _decoder(config: Table) -> list[AddedToken]:
    """The tokens of `added_tokens_decoder`, which is a table by id."""
    if config.data.get("added_tokens_decoder") is None:
        return []
    tokens = []
    for key, value in config.table("added_tokens_decoder").data.items():
        where = f"{config.where} [added_tokens_decoder]"
        if not (key.isascii() and key.isdecimal() and len(key) < 12 and int(key) <= _MAX_ID):
            config.offences.append(f"{where}: {shown(key)}; expected token ids, whole numbers from 0 to {_MAX_ID:,}")
            continue
        row = Table(value, f"{where} [{key}]", config.offences)
        content = row.text("content")
        if not content:
            config.offences.append(f"{row.where}: content is empty; expected the token's text")
        flags = {name: row.flag(name, default=False) for name in ("special", "lstrip", "rstrip", "single_word", "normalized")}
        tokens.append(AddedToken(int(key), content, **flags))
    return tokens


def _added(directory: Path, specials: frozenset[str], offences: list[str]) -> list[AddedToken]:
    """The tokens of added_tokens.json, which is a table of ids by name."""
    table = Table(read_optional(directory / _ADDED), str(directory / _ADDED), offences)
    ids = {name: table.whole(name, high=_MAX_ID) for name in table.data}
    if "" in ids:
        offences.append(f"{table.where}: a token without text")
    return [AddedToken(token, name, name in specials) for name, token in ids.items()]
