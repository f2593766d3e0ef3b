"""A disk that can lose power: it records what the spool does to its files, and says what a power cut may leave.

The spool runs unchanged on real files. `Disk.recording` replaces the functions of `os` that change files; for what lies
under the disk's directory they note what was done, in order, and what has been made durable since. After a power cut

- a directory keeps a prefix of the entries made, renamed and removed since its last fsync, as journals do;
- a file keeps, whatever the others keep, a prefix of the writes since its last fsync, the last of them torn at any
  byte, and may be filled with zeros behind it as far as it had reached;
- one sector of what was not synced may never have been written: it reads as zeros.
"""

import contextlib
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

__all__ = ["SECTOR", "Crash", "Disk"]

SECTOR = 512

Choose = Callable[[int, int], int]
"""Draws an integer, both bounds included; 0 stands for what harms least."""


class Crash(BaseException):
    """The machine or the process stops here: nothing in the product catches it."""


class _Write(NamedTuple):
    at: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        content.extend(bytes(max(0, self.at - len(content))))
        content[self.at : self.at + len(self.data)] = self.data


class _Truncate(NamedTuple):
    size: int

    def apply(self, content: bytearray) -> None:
        del content[self.size :]


class _Entries(NamedTuple):
    """Names that a directory gets at once; `None`: the name is removed."""

    nodes: "dict[str, _File | _Directory | None]"

    def apply(self, entries: "dict[str, _File | _Directory]") -> None:
        for name, node in self.nodes.items():
            if node is None:
                entries.pop(name, None)
            else:
                entries[name] = node


@dataclass(slots=True, eq=False)
class _File:
    content: bytearray = field(default_factory=bytearray)
    durable: bytes = b""
    pending: list[_Write | _Truncate] = field(default_factory=list)

    def do(self, change: _Write | _Truncate) -> None:
        change.apply(self.content)
        self.pending.append(change)

    def sync(self, count: int) -> None:
        """Make the first `count` of the pending changes durable."""
        durable = bytearray(self.durable)
        for change in self.pending[:count]:
            change.apply(durable)
        self.durable = bytes(durable)
        del self.pending[:count]

    def after_power_cut(self, choose: Choose) -> bytes:
        kept = bytearray(self.durable)
        count = len(self.pending) - choose(0, len(self.pending))
        for change in self.pending[:count]:
            change.apply(kept)
        if count < len(self.pending) and isinstance(torn := self.pending[count], _Write):
            _Write(torn.at, torn.data[: choose(0, len(torn.data))]).apply(kept)
        unsynced = range(-(-len(self.durable) // SECTOR), len(kept) // SECTOR)
        if unsynced and choose(0, 3) == 3:
            hole = unsynced[choose(0, len(unsynced) - 1)]
            kept[hole * SECTOR : (hole + 1) * SECTOR] = bytes(SECTOR)
        kept.extend(bytes(choose(0, max(0, len(self.content) - len(kept)))))
        return bytes(kept)


@dataclass(slots=True, eq=False)
class _Directory:
    entries: "dict[str, _File | _Directory]" = field(default_factory=dict)
    durable: "dict[str, _File | _Directory]" = field(default_factory=dict)
    pending: list[_Entries] = field(default_factory=list)

    def do(self, change: _Entries) -> None:
        change.apply(self.entries)
        self.pending.append(change)

    def sync(self, count: int) -> None:
        """Make the first `count` of the pending changes durable."""
        for change in self.pending[:count]:
            change.apply(self.durable)
        del self.pending[:count]

    def after_power_cut(self, choose: Choose) -> "dict[str, _File | _Directory]":
        kept = dict(self.durable)
        for change in self.pending[: len(self.pending) - choose(0, len(self.pending))]:
            change.apply(kept)
        return kept


class _Opened(NamedTuple):
    node: _File | _Directory
    path: Path
    identity: tuple[int, int]
    """Device and inode: a file object closes its descriptor below `os.close`, and the number may be used anew."""


class Disk:
    """The files under one directory, which stays the same over crashes."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.crashed = False
        """Set when `Crash` is raised; nothing changes from then until `kill` or `cut_power`."""
        self.syncing: Callable[[], None] | None = None
        """Called when the sync of a file has begun: it covers only what was written before."""
        self._tree = _Directory()
        self._opened: dict[int, _Opened] = {}
        self._crash_in: int | None = None
        self._part = 0.0
        self._restoring = False

    # -- crashes --

    def crash_after(self, changes: int | None, *, part: float = 0.0) -> None:
        """Crash after so many changes from now on; `part` of the next one is done if it is a write."""
        self._crash_in, self._part = changes, part

    def kill(self) -> None:
        """Go on after the process was killed: all that it wrote is there, and its locks are gone."""
        for descriptor, opened in list(self._opened.items()):
            with contextlib.suppress(OSError):
                if _identity(descriptor) == opened.identity:
                    os.close(descriptor)
        self._opened.clear()
        self.crashed, self._crash_in = False, None

    def cut_power(self, choose: Choose) -> None:
        """Go on after a power cut, with what the disk kept."""
        self.kill()
        self._restoring = True
        for path in self.root.iterdir():
            shutil.rmtree(path)
        self._tree = _restored(self._tree, self.root, choose)
        self._restoring = False

    def _may_change(self) -> bool:
        """Whether the next change is to be made; crashes if it is the time for that."""
        if self.crashed:
            return False
        if self._crash_in is not None:
            if self._crash_in == 0:
                self.crashed = True
                raise Crash
            self._crash_in -= 1
        return True

    # -- what is done to files --

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Record meanwhile."""
        with contextlib.ExitStack() as stack:
            for name in (
                "open",
                "close",
                "dup",
                "write",
                "pwrite",
                "ftruncate",
                "truncate",
                "fsync",
                "unlink",
                "replace",
                "rename",
                "mkdir",
            ):
                stack.enter_context(mock.patch.object(os, name, self._replacement(name, getattr(os, name))))
            yield

    def _replacement(self, name: str, real: Callable[..., Any]) -> Callable[..., Any]:
        method = getattr(self, f"_{name}")

        def call(subject: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401 - any function of os
            if self._restoring:
                return real(subject, *args, **kwargs)
            if isinstance(subject, int):
                opened = self._opened.get(subject)
                return real(subject, *args, **kwargs) if opened is None else method(real, subject, opened, *args)
            path = Path(subject)
            if path == self.root and name == "open":
                descriptor: int = real(subject, *args, **kwargs)
                self._opened[descriptor] = _Opened(self._tree, path, _identity(descriptor))
                return descriptor
            if path.is_relative_to(self.root):
                return method(real, path, *args)
            result = real(subject, *args, **kwargs)
            if name == "open":
                # The number may have been that of a file of ours, closed below Python.
                self._opened.pop(result, None)
            return result

        return call

    def _directory(self, path: Path) -> _Directory:
        directory: Any = self._tree
        for part in path.relative_to(self.root).parts:
            directory = directory.entries[part]
        assert isinstance(directory, _Directory)
        return directory

    def _open(self, real: Callable[..., int], path: Path, flags: int, mode: int = 0o777) -> int:
        siblings = self._directory(path.parent) if path.parent.is_dir() else _Directory()
        node = siblings.entries.get(path.name)
        new = node is None and bool(flags & os.O_CREAT)
        emptied = isinstance(node, _File) and bool(flags & os.O_TRUNC) and bool(node.content)
        if (new or emptied) and not self._may_change():
            raise Crash
        descriptor = real(path, flags, mode)
        if new:
            node = _File()
            siblings.do(_Entries({path.name: node}))
        elif emptied and isinstance(node, _File):
            node.do(_Truncate(0))
        assert node is not None
        self._opened[descriptor] = _Opened(node, path, _identity(descriptor))
        return descriptor

    def _close(self, real: Callable[..., None], descriptor: int, _: _Opened) -> None:
        del self._opened[descriptor]
        real(descriptor)

    def _dup(self, real: Callable[..., int], descriptor: int, opened: _Opened) -> int:
        duplicate = real(descriptor)
        self._opened[duplicate] = opened
        return duplicate

    def _write(self, real: Callable[..., int], descriptor: int, opened: _Opened, data: bytes) -> int:
        assert isinstance(opened.node, _File)
        return self._put(real, descriptor, opened.node, _Write(len(opened.node.content), bytes(data)))

    def _pwrite(self, real: Callable[..., int], descriptor: int, opened: _Opened, data: bytes, at: int) -> int:
        assert isinstance(opened.node, _File)
        return self._put(real, descriptor, opened.node, _Write(at, bytes(data)), at)

    def _put(self, real: Callable[..., int], descriptor: int, file: _File, change: _Write, *at: int) -> int:
        try:
            if not self._may_change():
                return len(change.data)
        except Crash:
            if part := change.data[: int(len(change.data) * self._part)]:
                real(descriptor, part, *at)
                file.do(change._replace(data=part))
            raise
        file.do(change)
        return real(descriptor, change.data, *at)

    def _ftruncate(self, real: Callable[..., None], descriptor: int, opened: _Opened, size: int) -> None:
        assert isinstance(opened.node, _File)
        if self._may_change():
            real(descriptor, size)
            opened.node.do(_Truncate(size))

    def _truncate(self, real: Callable[..., None], path: Path, size: int) -> None:
        file = self._directory(path.parent).entries[path.name]
        assert isinstance(file, _File)
        if self._may_change():
            real(path, size)
            file.do(_Truncate(size))

    def _fsync(self, _: Callable[..., None], __: int, opened: _Opened) -> None:
        if isinstance(opened.node, _File):
            self._observe(opened.node, opened.path)
        self._make_durable(opened.node)

    def sync(self, descriptor: int) -> None:
        """Be a lane's `Machine.sync`, in any thread: for what was written through `os`."""
        opened = self._opened.get(descriptor)
        if opened is not None:
            self._make_durable(opened.node)

    def _make_durable(self, node: _File | _Directory) -> None:
        if not self._may_change():
            return
        count = len(node.pending)
        if self.syncing is not None and isinstance(node, _File):
            self.syncing()
        if not self.crashed:
            node.sync(count)

    def _observe(self, file: _File, path: Path) -> None:
        """Learn what was written through a file object, below `os.write`."""
        content = path.read_bytes() if path.exists() else b""
        if content != file.content:
            file.do(_Truncate(0))
            file.do(_Write(0, content))

    def _unlink(self, real: Callable[..., None], path: Path) -> None:
        if self._may_change():
            real(path)
            self._directory(path.parent).do(_Entries({path.name: None}))

    def _replace(self, real: Callable[..., None], source: Path, target: os.PathLike[str]) -> None:
        if self._may_change():
            directory = self._directory(source.parent)
            node = directory.entries[source.name]
            if isinstance(node, _File):
                self._observe(node, source)
            real(source, target)
            directory.do(_Entries({source.name: None, Path(target).name: node}))

    _rename = _replace

    def _mkdir(self, real: Callable[..., None], path: Path, mode: int = 0o777) -> None:
        if path.exists() or not path.parent.exists():
            real(path, mode)
        if not self._may_change():
            raise Crash
        real(path, mode)
        self._directory(path.parent).do(_Entries({path.name: _Directory()}))


def _identity(descriptor: int) -> tuple[int, int]:
    status = os.fstat(descriptor)
    return status.st_dev, status.st_ino


def _restored(directory: _Directory, path: Path, choose: Choose) -> _Directory:
    """Choose what is left of `directory` after a power cut, and write it to `path`."""
    entries: dict[str, _File | _Directory] = {}
    for name, node in sorted(directory.after_power_cut(choose).items()):
        if isinstance(node, _Directory):
            (path / name).mkdir()
            entries[name] = _restored(node, path / name, choose)
        else:
            content = node.after_power_cut(choose)
            (path / name).write_bytes(content)
            entries[name] = _File(bytearray(content), content)
    return _Directory(entries, dict(entries))
