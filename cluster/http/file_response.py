"""A long file as a response, a piece at a time.

Owns: sending it, giving up a client that takes none of it, and closing it. Knows nothing of what is in it.
"""

from __future__ import annotations

import asyncio

from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from phi_cluster.cluster.session_api import Download


class FileResponse(Response):
    """Closes `download` in any case. `write_seconds`: a client that does not take a piece in this time is gone."""

    def __init__(self, download: Download, write_seconds: float):
        super().__init__(media_type="application/octet-stream")
        self.headers["content-length"] = str(download.nbytes)
        self._download = download
        self._write_seconds = write_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises ClientDisconnect."""

        async def send_in_time(message: Message) -> None:
            try:
                await asyncio.wait_for(send(message), self._write_seconds)
            except asyncio.TimeoutError:
                raise ClientDisconnect from None

        try:
            await send_in_time({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            async for chunk in self._download.chunks():
                await send_in_time({"type": "http.response.body", "body": chunk, "more_body": True})
            await send_in_time({"type": "http.response.body", "body": b"", "more_body": False})
        finally:
            self._download.close()
