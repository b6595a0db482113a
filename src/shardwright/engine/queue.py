"""Requests that wait, in the order in which they shall run."""

from __future__ import annotations

import heapq

from shardwright.engine.request import Request


class WaitingQueue:
    """A heap by `Request.sort_key`; removal in the middle is lazy.

    The key holds the policy: (0, arrival) for first come, first served; (priority, arrival) for priorities. A preempted
    request keeps its key, so it goes back to where it came from.
    """

    def __init__(self) -> None:
        self._heap: list[tuple[tuple[int, int], str]] = []
        self._members: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._members)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._members

    def push(self, request: Request) -> None:
        self._members[request.request_id] = request
        heapq.heappush(self._heap, (request.sort_key, request.request_id))

    def peek(self) -> Request | None:
        """The request to run next."""
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._members[self._heap[0][1]] if self._heap else None

    def pop(self) -> Request:
        """Take out the request that `peek` shows. Raises IndexError when empty."""
        if self.peek() is None:
            raise IndexError("the queue is empty")
        _, request_id = heapq.heappop(self._heap)
        return self._members.pop(request_id)

    def remove(self, request_id: str) -> Request | None:
        """Take out one request, wherever it stands."""
        return self._members.pop(request_id, None)
