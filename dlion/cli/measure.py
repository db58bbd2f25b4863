"""The process beside a run that measures its snapshots, as seen by whoever wants its results.

Law: starts, hears and ends that process; measures nothing itself.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec

ERROR_LINES = 12
LAST_S = 60.0
"""What waits to be measured when the run is over gets so long."""


@asynccontextmanager
async def measuring(
    out: Path, heard: Callable[[str, float], None], tell: Callable[[str], None], peer: str = ""
) -> AsyncIterator[None]:
    """Measure the snapshots in ``out`` (only ``peer``'s, if given) until the block is left and none waits.

    ``heard(peer, accuracy)`` is called on the loop; ``tell`` is told why, should measuring fail: training goes on.
    """
    only = ["--peer", peer] * bool(peer)
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "dlion", "evaluate", str(out), *only),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        start_new_session=True,
    )
    listening = asyncio.create_task(_listen(process, heard, tell))
    try:
        yield
        assert process.stdin is not None
        process.stdin.close()
        if not (await asyncio.wait([listening], timeout=LAST_S))[0]:
            tell(f"the last snapshots could not be measured within {LAST_S:g} s")
    finally:
        listening.cancel()
        if process.returncode is None:
            process.kill()
            await process.wait()


async def _listen(
    process: asyncio.subprocess.Process, heard: Callable[[str, float], None], tell: Callable[[str], None]
) -> None:
    async def errors() -> str:
        assert process.stderr is not None
        return (await process.stderr.read()).decode(errors="replace")

    assert process.stdout is not None
    failing = asyncio.create_task(errors())
    try:
        while line := await process.stdout.readline():
            said = msgspec.json.decode(line)
            heard(said["peer"], said["accuracy"])
        if await process.wait():
            lines = (await failing).splitlines()[-ERROR_LINES:]
            tell("accuracy is not measured:" + "".join(f"\n  {line}" for line in lines))
    finally:
        failing.cancel()
