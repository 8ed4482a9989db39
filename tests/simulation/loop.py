"""An event loop whose time is made up: nothing waits, nothing depends on the machine.

`asyncio`'s own tasks, locks and timeouts run on it unchanged. Callbacks run in the order in which they
fall due, those of one moment in the order in which they were asked for, so that the same program with the
same random choices does the same again. A `Process` is what can die: its tasks, its threads and whatever
it wants to do to the world outside, which goes through `Process.effect`.
"""

import asyncio
import contextvars
import heapq
import random
from collections import deque
from collections.abc import Callable, Coroutine
from typing import Any

RUNNING: contextvars.ContextVar["Process | None"] = contextvars.ContextVar("process", default=None)
"""Whose code runs at this moment; None: the simulation's own."""


class Crash(BaseException):
    """The process ends here. No BaseException of ours is ever caught by the code under test."""


class Task(asyncio.Task[Any]):
    """Sets of tasks are gone through in the order they were made, not in that of their addresses."""

    _serial = 0

    def __hash__(self) -> int:
        return self._serial


class Process:
    """One life of one program. threads: the delays of its threads, drawn from its own randomness.

    on_death: told when it dies, see `die_after`.
    """

    def __init__(self, loop: "Loop", name: str, seed: str) -> None:
        self.loop = loop
        self.name = name
        self.random = random.Random(seed)
        self.dead = False
        self._lives = 0
        self._lives_by = ""
        self.on_death: Callable[[str], None] = lambda where: None
        self.key: Any = None  # its machine's identity
        self.tasks: list[Task] = []
        self.thread_s: Callable[[Any], float] = lambda pool: 0.0
        self._busy_until: dict[Any, float] = {}
        self._running: dict[Any, tuple[asyncio.TimerHandle, Callable[[], None]]] = {}
        self.context = contextvars.copy_context()
        self.context.run(RUNNING.set, self)

    def bytes(self, n: int) -> bytes:
        """Stands in for os.urandom."""
        return self.random.randbytes(n)

    def die_after(self, effects: int, kind: str = "") -> None:
        """Let it die before one of its next effects; kind: of those alone that begin so. 0: let it
        live."""
        self._lives, self._lives_by = effects, kind

    def effect(self, what: str) -> None:
        """Something is about to be done that others can see. Raises Crash instead of returning if the
        process is dead, or dies here."""
        if self._lives and not self.dead and what.startswith(self._lives_by):
            self._lives -= 1
            if not self._lives:
                self.on_death(what)
        if self.dead:
            raise Crash(what)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Start a task of this process."""
        task: asyncio.Task[Any] = self.context.run(self.loop.create_task, work)
        return task

    def call(self, callback: Callable[..., Any], *args: Any) -> None:
        """Run a callback of this process soon, unless it dies first."""
        self.loop.call_soon(self._alive, callback, args, context=self.context)

    def _alive(self, callback: Callable[..., Any], args: tuple[Any, ...]) -> None:
        if not self.dead:
            callback(*args)

    def die(self) -> None:
        """Nothing of it is seen from now on. Its tasks unwind, so that nothing of them is left."""
        self.dead = True
        for task in self.tasks:
            if not task.done():
                task.cancel()

    def bury(self) -> None:
        """Cancel what held out against being cancelled, again and again."""
        for _ in range(20):
            left = [task for task in self.tasks if not task.done()]
            if not left:
                return
            for task in left:
                task.cancel()
            self.loop.settle()

    # -- threads ----------------------------------------------------------------------------------

    def in_thread(self, pool: Any, work: Callable[[], Any]) -> asyncio.Future[Any]:
        """A pool with a name has one thread; the nameless one has as many as it takes."""
        if self.dead:
            raise Crash("a thread")
        loop, future = self.loop, self.loop.create_future()
        start = loop.now if pool is None else max(loop.now, self._busy_until.get(pool, 0.0))
        duration = self.thread_s(pool)
        self._busy_until[pool] = start + duration

        def finish() -> None:
            self._running.pop(pool, None)
            if self.dead:
                return
            try:
                result = work()
            except Crash:
                return
            except BaseException as error:
                if not future.cancelled():
                    future.set_exception(error)
            else:
                if not future.cancelled():
                    future.set_result(result)

        def begin() -> None:
            if self.dead or future.cancelled():
                return
            if duration == 0.0:
                finish()
            else:
                handle = loop.call_later(duration, finish, context=self.context)
                self._running[pool] = (handle, finish)

        if start > loop.now:
            loop.call_at(start, begin, context=self.context)
        else:
            begin()
        return future

    def hurry(self, pool: Any, within_s: float) -> None:
        """What runs in this pool ends soon: it was asked to."""
        running = self._running.get(pool)
        if running is not None and running[0].when() > self.loop.now + within_s:
            handle, finish = running
            handle.cancel()
            again = self.loop.call_later(within_s, finish, context=self.context)
            self._running[pool] = (again, finish)
            self._busy_until[pool] = self.loop.now + within_s


class Loop(asyncio.AbstractEventLoop):
    """now: seconds since the simulation began. problems: what no task and no callback caught."""

    def __init__(self) -> None:
        self.now = 0.0
        self.problems: list[str] = []
        self._ready: deque[asyncio.Handle] = deque()
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._serial = 0
        self._tasks = 0

    def __enter__(self) -> "Loop":
        asyncio._set_running_loop(self)
        return self

    def __exit__(self, *exc: object) -> None:
        asyncio._set_running_loop(None)

    def step(self) -> bool:
        """Run the next callback; False if there is none and never will be."""
        while True:
            if self._ready:
                handle = self._ready.popleft()
            elif self._timers:
                when, _, handle = heapq.heappop(self._timers)
                if not handle.cancelled():
                    self.now = max(self.now, when)
            else:
                return False
            if not handle.cancelled():
                handle._run()
                return True

    def settle(self) -> None:
        """Run what is due now, and let no time pass."""
        while self._ready:
            handle = self._ready.popleft()
            if not handle.cancelled():
                handle._run()

    # -- what asyncio asks for --------------------------------------------------------------------

    def time(self) -> float:
        return self.now

    def call_soon(
        self, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.Handle:
        handle = asyncio.Handle(callback, args, self, context)
        self._ready.append(handle)
        return handle

    call_soon_threadsafe = call_soon

    def call_at(
        self, when: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        self._serial += 1
        heapq.heappush(self._timers, (when, self._serial, handle))
        return handle

    def call_later(
        self, delay: float, callback: Any, *args: Any, context: contextvars.Context | None = None
    ) -> asyncio.TimerHandle:
        return self.call_at(self.now + delay, callback, *args, context=context)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is passed over when its time comes."""

    def create_future(self) -> asyncio.Future[Any]:
        return asyncio.Future(loop=self)

    def create_task(
        self,
        coro: Any,
        *,
        name: str | None = None,
        context: contextvars.Context | None = None,
    ) -> asyncio.Task[Any]:
        process = RUNNING.get()
        if process is not None and process.dead:
            coro.close()
            raise Crash("a task")
        self._tasks += 1
        Task._serial = self._tasks  # before it is made, since making it puts it into a set
        task = Task(coro, loop=self, name=f"task {self._tasks}", context=context)
        task._serial = self._tasks
        if process is not None:
            process.tasks.append(task)
            if len(process.tasks) > 200:
                process.tasks = [task for task in process.tasks if not task.done()]
        return task

    def run_in_executor(  # type: ignore[override]
        self, executor: Any, func: Callable[..., Any], *args: Any
    ) -> asyncio.Future[Any]:
        process = RUNNING.get()
        if process is None:
            raise RuntimeError("a thread of nobody's")
        return process.in_thread(executor, lambda: func(*args))

    def get_debug(self) -> bool:
        return False

    def is_running(self) -> bool:
        return True

    def is_closed(self) -> bool:
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        error = context.get("exception")
        if not isinstance(error, Crash):
            self.problems.append(f"{context.get('message')}: {error!r}")
