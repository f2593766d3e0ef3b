"""The file `spool/.presence/journal`: what `State` is made of, record by record, in spool frames.

Written synchronously, as a lane is: what is written survives `kill -9`. At each start, and where it has many times
more records than the state needs, it is written anew beside the old one and takes its place.
"""

import asyncio
import contextlib
import errno
import os
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Final

from loguru import logger

from mq2mqtt.errors import LaneError
from mq2mqtt.presence.records import decode_record, encode_record
from mq2mqtt.presence.state import Record, State
from mq2mqtt.presence.syncing import Syncing
from mq2mqtt.spool.commit import GroupCommit
from mq2mqtt.spool.files import NO_SPACE, make_directory, map_errors, open_file, replace_file
from mq2mqtt.spool.frame import decode_frames
from mq2mqtt.spool.machine import Machine

__all__ = ["Journal"]

_NAME: Final = "journal"
_NEW_NAME: Final = "journal.new"
_SURELY_WORTH: Final = 20_000
_TIMES_THE_STATE: Final = 4
# Records of the new journal that are written with each one of the old: so nobody waits for 100 000 of them.
_AT_ONCE: Final = 16


class Journal:
    """The journal in `directory`; `state` is what it says, `append` comes before what it appends is applied there.

    With `power` what was written is synced soon after; without it, a loss of power may take the last records. Where the
    disk is full at the start, `problem` says so, and `rewrite` has to come before the first `append`.

    Raises:
        LaneError: the file cannot be read, or never written.
    """

    def __init__(self, directory: Path, *, power: bool = False, machine: Machine | None = None) -> None:
        machine = machine or Machine()
        self.path = directory / _NAME
        self._descriptor = -1
        self._records = 0
        self._written = 0
        self._anew: _Anew | None = None
        with map_errors(directory, "create"):
            make_directory(directory, mode=0o700)
        self._commit = GroupCommit(directory, sync=machine.sync, failed=self._sync_failed) if power else None
        self._syncing = Syncing(self._begin_sync)
        now_us = machine.now_us()
        self.state = State(seq=now_us)
        self._read()
        # No number is given out twice, whatever was lost: they rise more slowly than the clock.
        self.state.seq = max(self.state.seq, now_us)
        self.problem = self._begin()

    def _begin(self) -> str | None:
        try:
            self.rewrite()
        except LaneError as error:
            if not (isinstance(error.__cause__, OSError) and error.__cause__.errno in NO_SPACE):
                raise
            return str(error)
        return None

    def _read(self) -> None:
        try:
            # Between the two steps of `_take_over` only the new one is there, and whole.
            path = self.path if self.path.exists() else self.path.with_name(_NEW_NAME)
            data = path.read_bytes()
        except FileNotFoundError:
            return
        except OSError as error:
            raise LaneError(f"cannot read {self.path}: {error.strerror}") from error
        position, problem = 0, "an unfinished write"
        frames, ends = decode_frames(data, 0, max_frames=len(data))
        for frame, end in zip(frames, ends, strict=True):
            try:
                self.state.apply(decode_record(frame))
            except (ValueError, LookupError, TypeError) as error:
                problem = f"a record that does not fit: {error}"
                break
            position = end
        if position < len(data):
            logger.warning("{}: byte {}: {}; it and what follows is left out", self.path, position, problem)

    def rewrite(self) -> None:
        """Write the whole state anew, at once.

        Raises:
            LaneError: that is not possible now.
        """
        self._give_up()
        with map_errors(self.path, "write"):
            replace_file(self.path, b"".join(map(encode_record, self.state.snapshot())), sync=True)
            self._switch(open_file(self.path, os.O_WRONLY | os.O_APPEND))
            self.path.with_name(_NEW_NAME).unlink(missing_ok=True)

    def _switch(self, descriptor: int) -> None:
        self._let_go()
        self._descriptor, self._records = descriptor, 0

    def _let_go(self) -> None:
        if self._commit is not None:
            self._commit.file_finished(self._descriptor)
        elif self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1

    def append(self, record: Record) -> None:
        """Write one record.

        Raises:
            LaneError: that is not possible, nor any more before `rewrite`.
        """
        data = encode_record(record)
        try:
            _write(self._descriptor, data, self.path)
            self._records += 1
            self._written += 1
            self._write_anew(data)
        except OSError as error:
            # What stands there may be half a record, and nothing may follow it.
            self._give_up()
            self._let_go()
            raise LaneError(f"cannot write {self.path}: {error.strerror}") from error
        if self._commit is not None:
            self._syncing.soon()

    def _begin_sync(self) -> asyncio.Future[None] | None:
        if self._commit is None or not _loop_runs():
            return None
        return self._commit.wait(self._descriptor, upto=self._written)

    def _sync_failed(self, error: LaneError) -> None:
        logger.error("{}: {}", self.path, error)
        self._give_up()
        self._let_go()

    # -- the new one beside the old one --

    def _write_anew(self, data: bytes) -> None:
        """Go on with the new journal; begin it where that is worth it. `data` is what was just written to this one.

        Raises:
            OSError: this one is gone, and the new one did not take its place.
        """
        try:
            if self._anew is None:
                if self._records < _SURELY_WORTH or self._records < _TIMES_THE_STATE * self.state.size:
                    return
                self._anew = _Anew(self.path, self.state)
            if not self._anew.go_on(data):
                return
            if self._commit is None:
                self._take_over(self._anew)
            elif not self._anew.is_syncing:
                self._sync_anew(self._anew, self._commit)
        except OSError as error:
            if self._goes_on_without(error):
                return
            raise

    def _sync_anew(self, anew: "_Anew", commit: GroupCommit) -> None:
        """Have the new one on disk before it takes over; until then both get every record."""
        if not _loop_runs():
            return
        anew.is_syncing = True
        # The round that syncs a finished file closes it.
        commit.file_finished(os.dup(anew.descriptor))
        future = commit.wait(self._descriptor, upto=self._written)
        # None is for what is synced already, and this record is not.
        assert future is not None  # noqa: S101
        future.add_done_callback(partial(self._anew_synced, anew))

    def _anew_synced(self, anew: "_Anew", future: asyncio.Future[None]) -> None:
        failed = future.cancelled() or future.exception() is not None
        if anew is not self._anew:
            return
        if failed:
            self._give_up()
            self._records = 0
            return
        try:
            self._take_over(anew)
        except OSError as error:
            if not self._goes_on_without(error):
                # The next record finds nothing to go to.
                self._let_go()

    def _take_over(self, anew: "_Anew") -> None:
        # File systems write a file that takes another's place to the disk at once, for up to 0.3 s; so none does.
        self.path.unlink()
        anew.path.rename(self.path)
        self._anew = None
        self._switch(anew.descriptor)

    def _goes_on_without(self, error: OSError) -> bool:
        """Give the new one up; return whether the old one is still there."""
        logger.warning("{}: cannot be written anew yet: {}", self.path, error.strerror)
        is_there = bool(os.fstat(self._descriptor).st_nlink)
        # A start takes the new one where the old one is gone.
        self._give_up(discard=is_there)
        self._records = 0
        return is_there

    def _give_up(self, *, discard: bool = True) -> None:
        if self._anew is not None:
            self._anew.give_up(discard=discard)
            self._anew = None

    def close(self) -> None:
        """Let the file go. Idempotent."""
        self._give_up()
        if self._commit is not None:
            self._commit.close(self._descriptor)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = -1


class _Anew:
    """A new journal, some records at a time: first the state of now, then what was written since."""

    def __init__(self, journal: Path, state: State) -> None:
        self.path = journal.with_name(_NEW_NAME)
        self.is_syncing = False
        self._snapshot = state.snapshot()
        # Bounded: one for each `_AT_ONCE` of the snapshot.
        self._since: list[bytes] = []
        self.descriptor = open_file(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND)

    def go_on(self, data: bytes) -> bool:
        """Write some more; return whether it has everything."""
        self._since.append(data)
        records = [encode_record(record) for record in islice(self._snapshot, _AT_ONCE)]
        is_whole = not records
        if is_whole:
            records, self._since = self._since, []
        _write(self.descriptor, b"".join(records), self.path)
        return is_whole

    def give_up(self, *, discard: bool) -> None:
        """Go on with it no more."""
        os.close(self.descriptor)
        if discard:
            with contextlib.suppress(OSError):
                self.path.unlink()


def _loop_runs() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _write(descriptor: int, data: bytes, path: Path) -> None:
    """Write all of it, or raise an `OSError`."""
    if os.write(descriptor, data) != len(data):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))
