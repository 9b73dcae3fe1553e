"""Owns what of an address may be shown: all but the names, passwords and keys in it."""

import re

# SQLAlchemy takes a password with slashes in it, a web server's address has none.
_OF_DATABASE = re.compile(r"\b((?![Hh][Tt][Tt][Pp][Ss]?:)[A-Za-z][\w+.-]*://)[^\s:/@]*:[^\s@]*@")
_OF_ADDRESS = re.compile(r"//[^/\s]*@")
_IN_QUERY = re.compile(
    r"([?&][\w-]*(?:password|passwd|pwd|access_key|secret_key|account_key|token|signature)=)[^&\s]*",
    re.IGNORECASE,
)


def without_password(text: str) -> str:
    """Return a text without the names and passwords of the addresses in it."""
    text = _OF_DATABASE.sub(r"\1", text)
    text = _OF_ADDRESS.sub("//", text)
    return _IN_QUERY.sub(r"\1***", text)


def holds_credentials(address: str) -> bool:
    """Tell whether an address has a name, a password or a key in it."""
    return without_password(address) != address
