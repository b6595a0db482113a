from __future__ import annotations

import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardwright.parallel.channel import NUM_SLOTS, SLOT_BYTES, Replies, RingReader, RingWriter, make_memory, send_reply


@dataclass
class Channel:
    writer: RingWriter
    readers: list[RingReader]
    ours: list[socket.socket]
    theirs: list[socket.socket]

    def send(self, message: bytes, *, is_lost: bool = False) -> bool:
        return self.writer.send(message, is_lost=lambda: is_lost)

    def close(self) -> None:
        for end in (self.writer._ring, *(reader._ring for reader in self.readers)):
            end.close()
        for end in (*self.ours, *self.theirs):
            end.close()


def make_channel(num_readers: int) -> Channel:
    memory = make_memory(num_readers)
    pairs = [socket.socketpair() for _ in range(num_readers)]
    ours, theirs = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    readers = [RingReader(memory, num_readers, index, theirs[index]) for index in range(num_readers)]
    channel = Channel(RingWriter(memory, ours), readers, ours, theirs)
    os.close(memory)
    return channel


@pytest.fixture
def channel() -> Iterator[Channel]:
    made = make_channel(2)
    yield made
    made.close()


@settings(deadline=None, max_examples=30)
@given(
    messages=st.lists(
        st.one_of(
            st.binary(max_size=200),
            st.integers(0, 3 * NUM_SLOTS * SLOT_BYTES).map(lambda size: os.urandom(64) * (size // 64)),
        ),
        max_size=8,
    ),
    num_readers=st.integers(1, 3),
)
def test_every_reader_gets_every_message_in_order(messages: list[bytes], num_readers: int) -> None:
    """Messages longer than all slots together among them."""
    channel = make_channel(num_readers)
    got: list[list[bytes]] = [[] for _ in range(num_readers)]

    def read(index: int) -> None:
        for _ in messages:
            got[index].append(channel.readers[index].receive())

    threads = [threading.Thread(target=read, args=(index,)) for index in range(num_readers)]
    for thread in threads:
        thread.start()
    try:
        assert all(channel.send(message) for message in messages)
    finally:
        for thread in threads:
            thread.join(10)
        channel.close()
    assert got == [messages] * num_readers


def test_nothing_is_written_over_before_the_slowest_reader_has_read_it(channel: Channel) -> None:
    messages = [bytes([number]) * 10 for number in range(NUM_SLOTS)]
    for message in messages:
        assert channel.send(message)
        assert channel.readers[0].receive() == message
    assert not channel.send(b"one too many", is_lost=True)
    assert [channel.readers[1].receive() for _ in messages] == messages
    assert channel.send(b"now there is room")


def test_a_writer_waits_until_there_is_room(channel: Channel) -> None:
    for _ in range(NUM_SLOTS):
        channel.send(b"x")
    done = threading.Event()
    thread = threading.Thread(target=lambda: (channel.send(b"late"), done.set()))
    thread.start()
    assert not done.wait(0.05)
    for reader in channel.readers:
        reader.receive()
    assert done.wait(5)
    thread.join()


def test_readers_end_when_the_writer_is_gone(channel: Channel) -> None:
    channel.send(b"last")
    channel.ours[0].close()
    assert channel.readers[0].receive() == b"last"
    with pytest.raises(EOFError):
        channel.readers[0].receive()


def test_a_writer_is_told_when_a_reader_is_gone(channel: Channel) -> None:
    channel.theirs[1].close()
    assert not channel.send(b"hello")


def test_replies_come_whole_whatever_their_size_and_the_end_comes_last() -> None:
    pairs = [socket.socketpair() for _ in range(2)]
    replies = Replies([ours for ours, _ in pairs])
    long = os.urandom(3 << 20)
    thread = threading.Thread(target=lambda: (send_reply(pairs[1][1], long), pairs[1][1].close()))
    thread.start()
    send_reply(pairs[0][1], b"")
    send_reply(pairs[0][1], b"short")
    found: list[tuple[int, bytes | None]] = []
    while len(found) < 4:
        found += replies.poll(5)
    thread.join()
    assert [message for rank, message in found if rank == 0] == [b"", b"short"]
    assert [message for rank, message in found if rank == 1] == [long, None]
    assert replies.poll(0) == []
    replies.close()
    pairs[0][1].close()
    for ours, _ in pairs:
        ours.close()
