"""Who may come in, and what is whose: callers, accounts, passwords.

The accounts file has one line a person, `name:hash` or `name:hash:admin`; blank lines and lines
from `#` are skipped. Add a person, or give one a new password, which is read from the terminal or
the first line of stdin:

    python -m mochi_app.accounts add NAME [--admin]

The server looks at the file whenever it has changed: no restart. While it cannot be used, nobody
new logs in, and `/healthz` says so. Whoever is logged in stays so by what was read last, but for
those whose name is gone from the file.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import getpass
import hashlib
import hmac
import logging
import re
import secrets
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mochi_app.callers import ANONYMOUS, MACHINE
from mochi_app.files import rewrite, sweep_leftover
from mochi_app.settings import SettingsError, load_settings

log = logging.getLogger(__name__)
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,63}")
NAME_EXPECTED = (
    "1 to 64 of A-Z a-z 0-9 . _ @ -, the first a letter or digit,"
    f" neither {MACHINE} nor beginning with {ANONYMOUS}"
)
MIN_PASSWORD, MAX_PASSWORD = 8, 1024  # characters

# scrypt's n, r, p: 16 MiB and some 0.2 s a check. OWASP's cheat sheet on passwords, 2024.
COST = (2**14, 8, 5)
MAX_COST = (2**18, 8, 16)  # 256 MiB: a line of the file must not make a login eat the machine


class AccountsError(SettingsError):
    """The accounts file cannot be used. The message names file, line and what was expected."""


@dataclass(frozen=True, slots=True)
class PasswordHash:
    """One scrypt hash: `scrypt$n$r$p$salt$key`, the last two in base64."""

    n: int
    r: int
    p: int
    salt: bytes
    key: bytes

    @classmethod
    def of(cls, password: str) -> PasswordHash:
        """A fresh hash at today's cost."""
        salt = secrets.token_bytes(16)
        return cls(*COST, salt, derive(password, *COST, salt))

    @classmethod
    def parse(cls, text: str) -> PasswordHash:
        """The hash in `text`.

        Raises:
            ValueError: it is none, or its cost is out of bounds.
        """
        kind, *rest = text.split("$")
        if kind != "scrypt" or len(rest) != 5:
            raise ValueError("expected scrypt$n$r$p$salt$key")
        n, r, p = (int(word) if word.isascii() and word.isdecimal() else 0 for word in rest[:3])
        within = all(1 <= value <= most for value, most in zip((n, r, p), MAX_COST, strict=True))
        if not within or n < 2 or n & (n - 1):
            raise ValueError("expected n, r, p: a power of two, up to {}, {}, {}".format(*MAX_COST))
        try:
            salt, key = (base64.b64decode(word, validate=True) for word in rest[3:])
        except binascii.Error:
            raise ValueError("expected salt and key in base64") from None
        if len(salt) < 8 or len(key) != 32:
            raise ValueError("expected a salt of 8 bytes or more and a key of 32")
        return cls(n, r, p, salt, key)

    def __str__(self) -> str:
        salt, key = (base64.b64encode(part).decode("ascii") for part in (self.salt, self.key))
        return f"scrypt${self.n}${self.r}${self.p}${salt}${key}"

    def fits(self, password: str) -> bool:
        """Whether it is this password's; slow on purpose: not on the event loop."""
        return hmac.compare_digest(derive(password, self.n, self.r, self.p, self.salt), self.key)

    @property
    def mark(self) -> str:
        """Changes with the password: a login ends when its password does."""
        return hashlib.sha256(str(self).encode()).hexdigest()[:16]


def derive(password: str, n: int, r: int, p: int, salt: bytes) -> bytes:
    """scrypt's key of 32 bytes."""
    return hashlib.scrypt(
        password.encode("utf-8", "surrogatepass"),
        salt=salt,
        n=n,
        r=r,
        p=p,
        maxmem=128 * r * (n + p + 2) + 2**20,
        dklen=32,
    )


@dataclass(frozen=True, slots=True)
class Account:
    """One line of the accounts file."""

    name: str
    password: PasswordHash
    admin: bool = False

    def __str__(self) -> str:
        return f"{self.name}:{self.password}{':admin' if self.admin else ''}"


NOBODY = PasswordHash(*COST, b"nobody's salt", bytes(32))  # an unknown name costs the same time


def parse_accounts(text: str) -> dict[str, Account]:
    """The accounts of a file's text, by name.

    Raises:
        AccountsError: naming the line and what was expected of it; never showing a hash.
    """
    read = read_lines(text)
    if read.problem:
        raise AccountsError(read.problem)
    return read.accounts


@dataclass(slots=True)
class Lines:
    """What a file's lines say: the accounts of sound ones, by name; the names that the others
    begin with; what is wrong with the first of these, if there is one."""

    accounts: dict[str, Account] = field(default_factory=dict)
    doubted: set[str] = field(default_factory=set)
    problem: str = ""


def read_lines(text: str) -> Lines:
    """The lines of a file's text. A name with two lines is doubted: either may be meant."""
    read = Lines()
    for number, line in enumerate(text.split("\n"), 1):
        words = line.strip().split(":")
        if words == [""] or words[0].startswith("#"):
            continue
        try:
            account = parse_account(words)
            if account.name in read.accounts or account.name in read.doubted:
                raise AccountsError(f"{account.name} has a line already")
            read.accounts[account.name] = account
        except AccountsError as error:
            read.problem = read.problem or f"line {number}: {error}"
            read.doubted.add(words[0])
            read.accounts.pop(words[0], None)
    return read


def parse_account(words: Sequence[str]) -> Account:
    """The account of one line, split at its colons.

    Raises:
        AccountsError: saying what was expected; never showing a hash.
    """
    if len(words) not in (2, 3) or words[2:] not in ([], ["admin"]):
        raise AccountsError("expected name:hash or name:hash:admin")
    name = words[0]
    if not acceptable(name):
        raise AccountsError(f"expected a name of {NAME_EXPECTED}")
    try:
        password = PasswordHash.parse(words[1])
    except ValueError as error:
        raise AccountsError(f"the hash of {name}: {error}") from None
    return Account(name, password, admin=len(words) == 3)


def acceptable(name: str) -> bool:
    """Whether a person can have this name."""
    return bool(NAME.fullmatch(name)) and name != MACHINE and not name.startswith(ANONYMOUS)


def read_accounts(path: Path) -> Lines:
    """The accounts in a file.

    Raises:
        AccountsError: it cannot be read.
    """
    try:
        read = read_lines(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise AccountsError(f"accounts in {path}: {error}") from error
    if read.problem:
        read.problem = f"accounts in {path}: {read.problem}"
    return read


class Accounts:
    """The accounts of a file, read again when it changes; see above for one that cannot be used.

    Raises:
        AccountsError: it cannot be used at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        sweep_leftover(path)
        self._seen = self._stamp()
        read = read_accounts(path)
        if read.problem:
            raise AccountsError(read.problem)
        self._accounts: Mapping[str, Account] = read.accounts
        self._problem = ""
        if not read.accounts:
            log.warning("accounts in %s: there are none, so nobody can log in", path)

    @property
    def problem(self) -> str | None:
        """Why nobody new can log in, for anybody to read: the log has the file and the line."""
        self._look()
        if self._problem:
            return "accounts: the file cannot be used, so nobody new can log in; the log says why"
        return None

    @property
    def empty(self) -> bool:
        """Whether there is nobody who could log in."""
        self._look()
        return not self._accounts

    def find(self, name: str) -> Account | None:
        """The account of that name, by the file as it is now."""
        self._look()
        return self._accounts.get(name)

    def _look(self) -> None:
        """Read the file again if it has changed, or could not be used."""
        stamp = self._stamp()
        if stamp == self._seen and not self._problem:
            return
        self._seen = stamp
        told = self._problem
        try:
            read = read_accounts(self._path)
            kept = {name: old for name, old in self._accounts.items() if name in read.doubted}
            self._accounts, self._problem = kept | read.accounts, read.problem
        except AccountsError as error:
            self._problem = str(error)
        if self._problem and self._problem != told:
            log.error(
                "%s; nobody new can log in, the ones read before stay in force", self._problem
            )
        elif told and not self._problem:
            log.info("accounts in %s: can be used again", self._path)

    def _stamp(self) -> tuple[int, ...] | None:
        with contextlib.suppress(OSError):
            stat = self._path.stat()
            # The time of a change of owner or mode, too: what could not be read may be readable.
            return stat.st_mtime_ns, stat.st_ctime_ns, stat.st_size, stat.st_dev, stat.st_ino
        return None

    def check(self, name: str, password: str) -> Account | None:
        """The account, if name and password are right; none while the file cannot be used. As slow
        for an unknown name, and blocking: not on the event loop."""
        account = self.find(name) if not self.problem else None
        right = (account.password if account else NOBODY).fits(password[: MAX_PASSWORD + 1])
        return account if right else None


def add(path: Path, name: str, password: str, admin: bool) -> None:
    """Write a person's line, in place of an earlier one; the file is made if need be.

    Raises:
        AccountsError: name or password is not acceptable, or the file cannot be used.
    """
    if not acceptable(name):
        raise AccountsError(f"NAME: got {name[:80]!a}, expected {NAME_EXPECTED}")
    if not MIN_PASSWORD <= len(password) <= MAX_PASSWORD:
        raise AccountsError(
            f"password: got {len(password)} characters, expected {MIN_PASSWORD} to {MAX_PASSWORD}"
        )
    rewrite_accounts(path, name, str(Account(name, PasswordHash.of(password), admin)))


def remove(path: Path, name: str) -> None:
    """Take a person's line out; whoever is logged in under that name is so no more.

    Raises:
        AccountsError: there is no such line, or the file cannot be used.
    """
    if not path.exists():
        raise AccountsError(f"NAME: {path} has no {name[:80]!a}")
    rewrite_accounts(path, name, None)


def rewrite_accounts(path: Path, name: str, line: str | None) -> None:
    """Replace a person's line, or take it out; other lines and comments stay as they are.

    Raises:
        AccountsError: there is no line to take out, or the file cannot be used; it is as it was.
    """

    def change(content: bytes) -> bytes:
        text = content.decode("utf-8")
        known = parse_accounts(text)
        if line is None and name not in known:
            raise AccountsError(f"NAME: no {name[:80]!a}")
        kept = [other for other in text.splitlines() if other.strip().split(":")[0] != name]
        return "".join(f"{other}\n" for other in [*kept, *([line] if line else [])]).encode()

    try:
        in_place = rewrite(path, change)
    except (OSError, UnicodeDecodeError, AccountsError) as error:
        raise AccountsError(f"accounts in {path}: {error}") from error
    if in_place:
        log.warning(
            "accounts in %s: written in place, as it could not be replaced (%s): do not cut the"
            " power now, and check the file if somebody did",
            path,
            in_place,
        )


def read_password() -> str:
    """A password from the terminal, asked for twice, or the first line of stdin.

    Raises:
        AccountsError: the two differ.
    """
    if not sys.stdin.isatty():
        return sys.stdin.readline().rstrip("\r\n")
    password = getpass.getpass("Password: ")
    if getpass.getpass("Once more: ") != password:
        raise AccountsError("password: the two differ")
    return password


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; the exit code says whether it was done."""
    parser = argparse.ArgumentParser(prog="python -m mochi_app.accounts", description="Accounts.")
    parser.add_argument("--file", type=Path, help="the accounts file; default: MOCHI_AUTH_FILE")
    commands = parser.add_subparsers(dest="command", required=True)
    adding = commands.add_parser("add", help="add a person, or give one a new password")
    adding.add_argument("name")
    adding.add_argument("--admin", action="store_true", help="may act on everybody's jobs")
    commands.add_parser("remove", help="take a person out").add_argument("name")
    options = parser.parse_args(arguments)
    try:
        path = options.file or load_settings().auth_file
        if path is None:
            raise AccountsError("name the accounts file in MOCHI_AUTH_FILE or by --file")
        if options.command == "add":
            add(path, options.name, read_password(), options.admin)
        else:
            remove(path, options.name)
    except SettingsError as error:
        sys.stderr.write(f"{error}\n")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
