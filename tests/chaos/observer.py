"""The ear at the broker: what all can hear, when it was said, and so which phase a round is in."""

import asyncio
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass

from chaos.stage import FLEET, Stage
from covey_shared import wire
from covey_shared.errors import MalformedError
from covey_shared.messages import (
    Delivery,
    Manifest,
    Message,
    Result,
    Roster,
    RoundAbandoned,
    RoundCall,
    View,
    ViewProposal,
)
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import OFFLINE, ONLINE, Topics
from covey_shared.transport import Incoming

TOPICS = Topics(FLEET)
PHASES = ("gather", "share", "roster", "collect", "view", "unmask", "between")
"""The coordinator's, and what lies between a round's end and the next one's call."""

ENTERED_BY: dict[type[Message], str] = {
    RoundCall: "gather",
    Manifest: "share",
    Delivery: "roster",
    Roster: "collect",
    ViewProposal: "view",
    View: "unmask",
    Result: "between",
    RoundAbandoned: "between",
}


@dataclass(frozen=True)
class Overheard:
    """One message. sender: "coordinator" or a device. at: monotonic seconds."""

    at: float
    sender: str
    envelope: bytes
    message: Message


class Observer:
    """``async with`` listens. round, phase: of the open round, as the last message has it."""

    def __init__(self, stage: Stage) -> None:
        self.heard: list[Overheard] = []
        self.round = 0
        self.phase = "between"
        self.present: set[str] = set()
        self.connected = False
        self.coordinator_spoke_at = 0.0
        self.progress_at = 0.0
        self.changed = asyncio.Condition()
        self.n_chunks = 0
        self._entered_at = time.monotonic()
        self._lasted: dict[str, list[float]] = defaultdict(list)
        self._transport = MqttTransport(
            stage.broker_url,
            "ear",
            tls=stage.ear_context(),
            backoff_base_s=0.02,
            backoff_cap_s=0.05,
            connect_timeout_s=2.0,
        )
        self._tasks: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> "Observer":
        up = asyncio.Event()

        async def connected() -> None:
            self.connected = True
            up.set()

        def disconnected(reason: str) -> None:
            self.connected = False

        await self._transport.subscribe(f"covey/{FLEET}/#")
        await self._transport.start(self._on_message, connected, disconnected)
        async with asyncio.timeout(30):
            await up.wait()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._transport.stop()

    def typical_s(self, phase: str) -> float:
        """How long a phase lasts when nothing happens; a guess at first."""
        lasted = self._lasted[phase][-25:]
        return statistics.median(lasted) if lasted else 0.1

    async def entry_of(self, phase: str) -> None:
        """Wait for the moment at which a round enters this phase."""
        async with self.changed:
            await self.changed.wait()
            while self.phase != phase:
                await self.changed.wait()

    def _on_message(self, incoming: Incoming) -> None:
        now = time.monotonic()
        topic, payload = incoming.topic, incoming.payload
        if topic.startswith(TOPICS.presence("")):
            name = topic.removeprefix(TOPICS.presence(""))
            if payload == ONLINE:
                self.present.add(name)
            elif payload == OFFLINE:
                self.present.discard(name)
            return
        if not payload:
            return
        if topic.startswith((TOPICS.upload(""), TOPICS.blob(b""))):
            self.n_chunks += 1
            if topic.startswith(TOPICS.blob(b"")):
                self.coordinator_spoke_at = now
            return
        try:
            signed = wire.decode(payload)
        except MalformedError:
            return
        outbox = TOPICS.outbox("")
        sender = topic.removeprefix(outbox) if topic.startswith(outbox) else "coordinator"
        self.heard.append(Overheard(now, sender, signed.envelope, signed.message))
        if sender == "coordinator" and not incoming.retained:
            self.coordinator_spoke_at = now
            self._follow(signed.message, now)

    def _follow(self, message: Message, now: float) -> None:
        phase = ENTERED_BY.get(type(message))
        if phase is None:
            return
        number = getattr(message, "round", None)
        if isinstance(message, RoundCall):
            if message.round <= self.round:
                return
            self.round = message.round
        elif phase == "between":
            if number != self.round:
                return
        elif PHASES.index(phase) <= PHASES.index(self.phase):
            return  # said again
        if phase == self.phase:
            return
        lasted = now - self._entered_at
        self._lasted[self.phase].append(lasted)
        self.phase, self._entered_at, self.progress_at = phase, now, now
        self._spawn(self._tell())

    async def _tell(self) -> None:
        async with self.changed:
            self.changed.notify_all()

    def _spawn(self, work) -> None:  # type: ignore[no-untyped-def]
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
