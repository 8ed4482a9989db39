"""The checks that need what is installed: known answers, the tiny plan, the device's files, its network."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from covey_device.config import LimitsConfig
from covey_device.doctor import enrolled, network, unit
from covey_device.doctor.enrolled import Enrolled
from covey_device.doctor.estimate import Estimate, Plan, cached_plan, estimated, plan_at
from covey_device.doctor.findings import Finding, guarded
from covey_device.doctor.first_step import first_step
from covey_device.doctor.known_answers import known_answers
from covey_device.doctor.machine import Machine
from covey_device.doctor.round import Round
from covey_device.host.config import HostConfig
from covey_shared.errors import CoveyError


class Device:
    """What `covey-device join` made, if it did. enrolled: None without a device.toml that can be used.
    estimate: of a round, once `findings` is through, if a plan is known."""

    def __init__(
        self, config_path: Path, here: Machine, asked: Round, plan_path: Path | None
    ) -> None:
        self._here, self._asked, self._plan_path = here, asked, plan_path
        self.enrolled: Enrolled | None
        self._said, self.enrolled = enrolled.load(config_path, here)
        self._policy: list[Finding] = []
        self._state: list[Finding] = []
        self.signed_unix = 0.0
        """The latest time that the coordinator signed; 0 if none is known."""
        self.limits = LimitsConfig()
        """The owner's, or the defaults."""
        self.conditions: HostConfig | None = None
        """The owner's, once there is a policy."""
        self.estimate: Estimate | None = None
        if (found := self.enrolled) is not None:
            self._policy = guarded("policy", lambda: self._look_at_policy(found))
            self._state = guarded("state", lambda: self._look_at_state(found))
            self.enrolled = replace(found, signed_unix=self.signed_unix)

    @property
    def max_memory_mb(self) -> int:
        """What the owner gives to a round."""
        return self.limits.max_memory_mb

    def _look_at_policy(self, found: Enrolled) -> Finding:
        finding, policy = enrolled.policy(found, self._here)
        if policy is not None:
            self.limits, self.conditions = policy.limits, policy.host
        return finding

    def _look_at_state(self, found: Enrolled) -> Finding:
        finding, self.signed_unix = enrolled.state(found)
        return finding

    def findings(self, show: unit.Show) -> Iterator[Finding]:
        """All but those of the machine, in their order."""
        yield from guarded("known-answers", known_answers)
        yield from guarded("training", first_step)
        yield self._said
        plan, refusal = self._plan()
        if self.enrolled is not None:
            yield from self._of(self.enrolled, plan, show)
        if refusal is not None:
            yield refusal
        elif plan is not None:
            yield from guarded("plan", lambda: self._estimated(plan))
        elif self.enrolled is not None:
            says = "none is known yet; --plan DIR estimates what a round of one costs here"
            yield Finding("plan", "ok", says)

    def _of(self, device: Enrolled, plan: Plan | None, show: unit.Show) -> Iterator[Finding]:
        here = self._here
        running = network.service_runs(here, device.state)
        yield from self._policy
        yield from guarded("keys", lambda: enrolled.keys(device))
        yield from guarded("certificates", lambda: enrolled.certificates(device, here.clock()))
        yield from self._state
        fits = None if plan is None else _fits(device, plan)
        yield from guarded("data", lambda: enrolled.data(device, here, fits))
        yield from guarded("broker", lambda: network.broker(device, running))
        yield from guarded("enrolment-port", lambda: network.enrolment_port(device) or [])
        pids: list[int | None] = [None]

        def service() -> Finding:
            finding, pids[0] = unit.service(here, running[0], show)
            return finding

        yield from guarded("service", service)
        pid = pids[0] or running[1]
        yield from guarded("limits", lambda: unit.limits(here, pid, self.max_memory_mb))

    def _plan(self) -> tuple[Plan | None, Finding | None]:
        if self._plan_path is not None:
            try:
                return plan_at(self._plan_path), None
            except CoveyError as error:
                return None, Finding("plan", "problem", str(error))
        if self.enrolled is None:
            return None, None
        return cached_plan(self.enrolled.cache), None

    def _estimated(self, plan: Plan) -> Finding:
        finding, self.estimate = estimated(plan, self._asked, self.limits, self._here)
        return finding


def _fits(device: Enrolled, plan: Plan) -> Callable[[], str]:
    """Opens the data as training would."""

    def fits() -> str:
        from covey_device.data import open_source

        source = open_source(device.config.data, plan.header, base=device.base)
        return f"{source.n_examples:,} examples, which fit plan {plan.header.name!r}"

    return fits
