"""Control messages between an executor and its ranks on one machine: shared memory one way, sockets the other.

    executor                                   rank r
      RingWriter ── slots in shared memory ──►  RingReader     every rank reads every message
      socket r   ── a byte per slot: a bell ──►  socket         wakes it; nobody spins
      socket r   ◄── length and message ───────  socket         replies

The memory has no name and a socket closes with its process, so nothing is left behind whoever is killed, and a rank's
end is seen at once: its socket ends.
"""

from __future__ import annotations

import mmap
import os
import selectors
import socket
import struct
import tempfile
import time
from collections.abc import Callable, Sequence

SLOT_BYTES = 1 << 16
NUM_SLOTS = 16

_LENGTH = struct.Struct("<I")
_SLOT = struct.Struct("<II")  # bytes in this slot, and whether the message goes on in the next
_COUNTER_STRIDE = 64  # a cache line per counter: each has one writer
_FULL_POLL_S = 0.001


def make_memory(num_readers: int) -> int:
    """Shared memory for a ring, as a file descriptor that another process can be given."""
    size = _header_bytes(num_readers) + NUM_SLOTS * SLOT_BYTES
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("shardwright-ring")
    else:
        with tempfile.TemporaryFile() as file:
            descriptor = os.dup(file.fileno())
    os.ftruncate(descriptor, size)
    return descriptor


class _Ring:
    """Slots in shared memory. Counters only grow: of slots written, and per reader of slots read."""

    def __init__(self, descriptor: int, num_readers: int) -> None:
        header = _header_bytes(num_readers)
        self._memory = mmap.mmap(descriptor, header + NUM_SLOTS * SLOT_BYTES)
        self._counters = memoryview(self._memory)[:header].cast("Q")
        self._slots = memoryview(self._memory)[header:]

    def slot(self, number: int) -> memoryview:
        start = number % NUM_SLOTS * SLOT_BYTES
        return self._slots[start : start + SLOT_BYTES]

    def num_read(self, reader: int) -> int:
        return self._counters[reader * _COUNTER_STRIDE // 8]

    def set_num_read(self, reader: int, value: int) -> None:
        self._counters[reader * _COUNTER_STRIDE // 8] = value

    def close(self) -> None:
        self._counters.release()
        self._slots.release()
        self._memory.close()


class RingWriter:
    """Writes messages for all readers.

    Args:
        descriptor: from `make_memory`.
        bells: per reader, a socket that it waits at.
    """

    def __init__(self, descriptor: int, bells: Sequence[socket.socket]) -> None:
        self._ring = _Ring(descriptor, len(bells))
        self._bells = bells
        self._written = 0

    def send(self, message: bytes, *, is_lost: Callable[[], bool]) -> bool:
        """Hand a message to every reader. Waits while the slots are full.

        Returns: False if a reader was lost meanwhile, as `is_lost` says; then some may have got the message.
        """
        view = memoryview(message)
        room = SLOT_BYTES - _SLOT.size
        for start in range(0, max(len(message), 1), room):
            while self._written - min(map(self._ring.num_read, range(len(self._bells)))) >= NUM_SLOTS:
                if is_lost():
                    return False
                time.sleep(_FULL_POLL_S)
            piece = view[start : start + room]
            slot = self._ring.slot(self._written)
            _SLOT.pack_into(slot, 0, len(piece), start + room < len(message))
            slot[_SLOT.size : _SLOT.size + len(piece)] = piece
            self._written += 1
            for bell in self._bells:
                try:
                    bell.send(b"!")
                except OSError:
                    return False
        return True

    def close(self) -> None:
        self._ring.close()


class RingReader:
    """Reads messages, each once and in order.

    Args:
        descriptor: from `make_memory`.
        num_readers: of the ring.
        index: of this reader.
        bell: socket that the writer rings.
    """

    def __init__(self, descriptor: int, num_readers: int, index: int, bell: socket.socket) -> None:
        self._ring = _Ring(descriptor, num_readers)
        self._index = index
        self._bell = bell
        self._read = 0

    def receive(self) -> bytes:
        """The next message. Raises EOFError if the writer is gone."""
        pieces = []
        goes_on = 1
        while goes_on:
            if not self._bell.recv(1):
                raise EOFError
            slot = self._ring.slot(self._read)
            length, goes_on = _SLOT.unpack_from(slot)
            pieces.append(bytes(slot[_SLOT.size : _SLOT.size + length]))
            self._read += 1
            self._ring.set_num_read(self._index, self._read)
        return b"".join(pieces)


def send_reply(channel: socket.socket, message: bytes) -> None:
    """A rank's reply to its executor."""
    channel.sendall(_LENGTH.pack(len(message)) + message)


class Replies:
    """What ranks send back, and when one of them ends.

    Args:
        channels: per rank, the executor's end of its socket.
    """

    def __init__(self, channels: Sequence[socket.socket]) -> None:
        self._buffers = [bytearray() for _ in channels]
        self._selector = selectors.DefaultSelector()
        for rank, channel in enumerate(channels):
            self._selector.register(channel, selectors.EVENT_READ, rank)

    def poll(self, timeout_s: float) -> list[tuple[int, bytes | None]]:
        """Replies that have arrived, as (rank, message), None for a rank that has ended; [] after the timeout."""
        found: list[tuple[int, bytes | None]] = []
        for key, _ in self._selector.select(timeout_s):
            channel, rank = key.fileobj, key.data
            assert isinstance(channel, socket.socket)
            try:
                data = channel.recv(1 << 20)
            except OSError:
                data = b""
            self._buffers[rank] += data
            found += [(rank, message) for message in self._whole(self._buffers[rank])]
            if not data:
                self._selector.unregister(channel)
                found.append((rank, None))
        return found

    def close(self) -> None:
        self._selector.close()

    @staticmethod
    def _whole(buffer: bytearray) -> list[bytes]:
        """Take the messages that are complete."""
        messages = []
        while len(buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(buffer)[0]
            if len(buffer) < end:
                break
            messages.append(bytes(buffer[_LENGTH.size : end]))
            del buffer[:end]
        return messages


def _header_bytes(num_readers: int) -> int:
    return num_readers * _COUNTER_STRIDE
