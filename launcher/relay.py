"""A TCP relay: one stable local address for a server that may die, restart or move.

Each replica group's manager talks to the lighthouse through a relay of its own, inside the
launcher on its node: the lighthouse can come back on another port or host, and a group that
has been replaced is kept from coming back. It carries one group's heartbeats (ten a second)
and quorums (one a step), whatever the number of groups.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import socket
import struct
import threading
import time
from collections.abc import Callable

#: Seconds between two attempts to reach the server.
RETRY = 0.1
#: Seconds that connecting to the server may take.
CONNECT_SECONDS = 2.0
#: Bytes moved at a time.
CHUNK = 1 << 16
#: Bytes that a client may say while there is no server.
MOST_HELD = 1 << 20
#: Seconds between two looks at whether the server has fallen silent.
LISTEN_EVERY = 0.5
#: Seconds without a client after which nobody waits any more: they connect anew at once.
NOBODY = 2.0
#: Seconds for the relay to start and to stop.
PATIENCE = 5.0

#: Where the server is now: (host, port); None: nowhere yet, ask again.
Upstream = Callable[[], tuple[str, int] | None]


class Relay:
    """Listens and passes every connection on to where ``upstream`` says; port 0 is a free one.

    A client that connects while the server is away is held until there is one; when the
    server's side of a connection ends, the client's is ended too, and it connects again.
    ``upstream`` is asked in a thread of its own: it may read files.

    With ``silence``, seconds, every connection is ended when clients have spoken and nothing at
    all has been heard from the server for so long. A network that is cut ends no connection; when
    it is healed, the old ones would go on, and a copy that has been replaced with them.
    """

    def __init__(
        self,
        upstream: Upstream,
        *,
        host: str = "127.0.0.1",
        port: int = 0,
        silence: float | None = None,
    ) -> None:
        self._upstream = upstream
        self._silence = silence
        self._waiting: float | None = None
        """Since when clients wait for its answer, monotonic seconds; None: they do not."""
        self._left = -NOBODY
        """When the last client went."""
        self._made_anew = 0.0
        """When the connections were last ended for its silence."""
        self._listener = socket.create_server(
            (host, port),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=1024,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
        self._listener.setblocking(False)
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._joined: set[asyncio.Task[None]] = set()
        """Those that are connected to the server."""
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, name="relay", daemon=True)
        self._thread.start()
        self._ready.wait(PATIENCE)

    @property
    def port(self) -> int:
        """Port on which it listens."""
        return int(self._listener.getsockname()[1])

    def __enter__(self) -> Relay:
        return self

    def __exit__(self, *details: object) -> None:
        self.close()

    def close(self) -> None:
        """End every connection and stop listening."""
        if self._loop.is_closed():
            return
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE)
        self._listener.close()

    def reaches(self) -> bool:
        """Whether the server can be reached just now."""
        place = self._upstream()
        with contextlib.suppress(OSError):
            if place is not None:
                socket.create_connection(place, CONNECT_SECONDS).close()
                return True
        return False

    def away(self) -> float:
        """Seconds for which clients have waited for a word of the server; 0: they do not."""
        since = self._waiting
        return 0.0 if since is None or not self._tasks else time.monotonic() - since

    def drop(self) -> None:
        """End every connection, and wait for that; clients connect again, to where the server is
        then."""
        with contextlib.suppress(RuntimeError, TimeoutError, concurrent.futures.TimeoutError):
            asyncio.run_coroutine_threadsafe(self._drop(), self._loop).result(PATIENCE)

    async def _drop(self) -> None:
        ending = list(self._tasks)
        for task in ending:
            task.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(
            asyncio.start_server(self._serve, sock=self._listener)
        )
        listening = self._loop.create_task(self._listen())
        try:
            self._loop.call_soon(self._ready.set)
            self._loop.run_forever()
        finally:
            # Whoever is just connecting is accepted, and then ended like the others.
            self._loop.run_until_complete(asyncio.sleep(0.02))
            server.close()
            for task in [listening, *self._tasks]:
                task.cancel()
            self._loop.run_until_complete(
                asyncio.gather(listening, *self._tasks, return_exceptions=True)
            )
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if not self._tasks and time.monotonic() - self._left > NOBODY:
            self._waiting = None
        self._tasks.add(task)
        try:
            said = bytearray()
            server = await self._connect(reader, said)
            if server is not None:
                self._joined.add(task)
                try:
                    if said:
                        server[1].write(said)
                        self._spoken()
                    await self._join((reader, writer), server)
                finally:
                    _drop(server[1])
        except asyncio.CancelledError:
            pass  # dropped, or closing: only the connections are to end
        finally:
            self._joined.discard(task)
            self._tasks.discard(task)
            self._left = time.monotonic()
            await _close(writer)

    async def _connect(
        self, client: asyncio.StreamReader, said: bytearray
    ) -> tuple[asyncio.StreamReader, asyncio.StreamWriter] | None:
        """A connection to the server, waited for; None when the client has gone meanwhile.

        What the client says in that time is kept in ``said``. A client that has gone must not
        be heard any more: a lighthouse would take its old request for a living one.
        """
        while True:
            place = await self._loop.run_in_executor(None, self._upstream)
            if place is not None:
                with contextlib.suppress(OSError, asyncio.TimeoutError):
                    return await asyncio.wait_for(asyncio.open_connection(*place), CONNECT_SECONDS)
            self._spoken()  # it is here to speak
            if len(said) > MOST_HELD:
                return None
            try:
                data = await asyncio.wait_for(client.read(CHUNK), RETRY)
            except TimeoutError:
                continue
            except OSError:
                return None
            if not data:
                return None
            said += data

    async def _join(
        self,
        client: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        server: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        """Pass bytes both ways until either side ends."""
        ways = [
            asyncio.ensure_future(_pass_on(client[0], server[1], self._spoken)),
            asyncio.ensure_future(_pass_on(server[0], client[1], self._answered)),
        ]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)

    def _spoken(self) -> None:
        if self._waiting is None:
            self._waiting = time.monotonic()

    def _answered(self) -> None:
        self._waiting = None

    async def _listen(self) -> None:
        while self._silence is not None:
            await asyncio.sleep(LISTEN_EVERY)
            now, since = time.monotonic(), self._waiting
            if since is not None and now - max(since, self._made_anew) > self._silence:
                self._made_anew = now
                for task in self._joined:
                    task.cancel()


async def _pass_on(
    source: asyncio.StreamReader, sink: asyncio.StreamWriter, moved: Callable[[], None]
) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(CHUNK):
            moved()
            sink.write(data)
            await sink.drain()


def _drop(writer: asyncio.StreamWriter) -> None:
    """End a connection to the server, and whatever has not reached it. What lies in a connection
    that was cut would be delivered when the network is healed: an old request to join a quorum."""
    sock = writer.get_extra_info("socket")
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()


async def _close(writer: asyncio.StreamWriter) -> None:
    writer.close()
    with contextlib.suppress(OSError, asyncio.TimeoutError):
        await asyncio.wait_for(writer.wait_closed(), 1.0)
