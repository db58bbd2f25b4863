"""The admin application: is this peer alive, is it ready, what is it doing.

Law: HTTP around a ``status`` callable; reads, never changes. It has no authentication: keep it on loopback, or mount
it behind your own application's doors.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager

import msgspec
from aiohttp import web

from dlion.observe import metrics
from dlion.observe.status import PeerStatus

LOOPBACK = "127.0.0.1"
_FRESH: Mapping[str, str] = {"Cache-Control": "no-store"}


def admin_application(status: Callable[[], PeerStatus]) -> web.Application:
    """An application to serve or to mount: /livez, /readyz, /status.json, /metrics.

    ``status`` is called on the event loop for each request and must be quick. /livez answers as long as the loop
    turns; /readyz answers 200, or 503 with the reasons, as ``status`` says (ready when it is silent and training).
    """

    async def livez(request: web.Request) -> web.Response:
        return _json({"live": True})

    async def readyz(request: web.Request) -> web.Response:
        ready, reasons = readiness(status())
        return _json({"ready": ready, "reasons": reasons}, 200 if ready else 503)

    async def status_json(request: web.Request) -> web.Response:
        return _json(status())

    async def exposition(request: web.Request) -> web.Response:
        text = metrics.exposition(status())
        return web.Response(body=text.encode(), headers={"Content-Type": metrics.CONTENT_TYPE, **_FRESH})

    application = web.Application()
    application.router.add_get("/livez", livez)
    application.router.add_get("/readyz", readyz)
    application.router.add_get("/status.json", status_json)
    application.router.add_get("/metrics", exposition)
    return application


def readiness(status: PeerStatus) -> tuple[bool, list[str]]:
    """Whether the peer takes part in the training, and why not, or what else somebody should mend."""
    reasons = list(status.get("reasons", []))
    state = status["state"]
    ready = status.get("ready", state in ("training", "waiting") and not reasons)
    if not ready and not reasons:
        reasons.append(f"state is {state}")
    return ready, reasons


@asynccontextmanager
async def served(application: web.Application, host: str = LOOPBACK, port: int = 0) -> AsyncIterator[tuple[str, int]]:
    """Serve ``application`` within the block; yields the address in use. ``port`` 0: any free one. Raises OSError."""
    runner = web.AppRunner(application, access_log=None, handle_signals=False, shutdown_timeout=0.5)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        address = runner.addresses[0]
        yield address[0], address[1]
    finally:
        await runner.cleanup()


def _json(value: object, code: int = 200) -> web.Response:
    return web.Response(body=msgspec.json.encode(value), status=code, content_type="application/json", headers=_FRESH)
