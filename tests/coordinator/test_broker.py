"""Brokers as child processes: private, on loopback, gone when we are gone."""

import asyncio
import contextlib
import os
import shutil
import signal
import socket
import ssl
import stat
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from brokers import PASSWORD, Brokers, client
from covey_coordinator.broker import RunningBroker, embedded, mosquitto, running, start_broker
from covey_coordinator.broker.access import access_control
from covey_shared.errors import ConfigError, StorageError, TransportError
from covey_shared.messages import DeviceId
from covey_shared.mqtt import MqttTransport
from covey_shared.topics import Topics
from covey_shared.transport import MAX_PAYLOAD_BYTES
from mqtt_clients import Listener, poll, run
from prerequisites import missing
from tls_files import make_tls_files

DEPLOY = Path(__file__).parents[2] / "deploy" / "mosquitto"


def test_it_listens_on_loopback_only_and_its_files_are_private(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        assert broker.running
        assert broker.kind == brokers.kind
        assert broker.version[0].isdigit()
        assert broker.url == f"mqtt://127.0.0.1:{broker.port}"
        listening = [
            c.laddr.ip
            for c in psutil.Process(broker.process.pid).net_connections("inet")
            if c.status == psutil.CONN_LISTEN
        ]
        assert listening == ["127.0.0.1"]
        await broker.stop()
        assert broker.process.returncode == 0
        assert stat.S_IMODE(broker.directory.stat().st_mode) == 0o700
        modes = {p.name: stat.S_IMODE(p.stat().st_mode) for p in broker.directory.iterdir()}
        assert {"passwords", "broker.log"} < modes.keys()
        assert set(modes.values()) == {0o600}

    run(scenario())


def test_no_password_is_kept_or_shown(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        async with client(broker, "x"):
            shown = "\0".join(psutil.Process(broker.process.pid).cmdline())
        await broker.stop()
        kept = b"".join(path.read_bytes() for path in broker.directory.iterdir())
        assert PASSWORD not in shown
        assert PASSWORD.encode() not in kept
        assert PASSWORD not in repr(broker)

    run(scenario())


def test_every_user_has_their_own_password(brokers: Brokers) -> None:
    async def scenario() -> None:
        users = {"one": "first password", "two": "zweites Kennwort#$% ä"}
        broker = await brokers.start(users=users)
        for name, password in users.items():
            async with client(broker, name, username=name, password=password):
                pass
        swapped = client(broker, "x", username="one", password=users["two"], connected=False)
        async with swapped:
            await swapped.until_reasons()
            assert "refuses user 'one'" in swapped.reasons[0]

    run(scenario())


def test_mosquitto_keeps_retained_messages_over_a_restart_and_the_embedded_one_does_not(
    brokers: Brokers,
) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        async with client(broker, "a") as a:
            await a.transport.publish("kept", b"still here", retain=True)
            await broker.stop()
            await brokers.start(port=broker.port)
            await a.transport.subscribe("kept", "end")
            await a.transport.publish("end", b"")
            await a.until(lambda: "end" in a.topics)
            kept = [(m.payload, m.retained) for m in a.messages if m.topic == "kept"]
            assert kept == ([(b"still here", True)] if brokers.kind == "mosquitto" else [])
        # the log of the first one, for whoever wonders why there was a second
        assert (broker.directory / "broker.log.1").exists()

    run(scenario())


def test_the_largest_payload_passes_on_the_longest_topic(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        topic = "covey/" + 32 * "f" + "/blob/" + 64 * "0"
        async with client(broker, "a") as a:
            await a.transport.subscribe(topic)
            await a.transport.publish(topic, bytes(MAX_PAYLOAD_BYTES))
            await a.until_messages(1)
            assert a.messages[0].payload == bytes(MAX_PAYLOAD_BYTES)

    run(scenario())


def test_a_taken_port_is_named(brokers: Brokers) -> None:
    async def scenario() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(TransportError, match=f"port {port} on 127.0.0.1 is taken"):
                await brokers.start(port=port)

    run(scenario())


def test_a_free_port_that_another_takes_first_is_tried_again(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def scenario() -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            taken = other.getsockname()[1]
            free = running._free_port
            ports = iter([taken, taken])
            monkeypatch.setattr(running, "_free_port", lambda: next(ports, None) or free())
            broker = await brokers.start()
            assert broker.port != taken
            monkeypatch.setattr(running, "_free_port", lambda: taken)
            with pytest.raises(TransportError, match="is taken"):
                await brokers.start("second")

    run(scenario())


def test_a_broker_that_ends_at_its_start_has_the_last_word(
    brokers: Brokers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(running, "HOST", "192.0.2.1")  # nobody's address, RFC 5737

    async def scenario() -> None:
        with pytest.raises(TransportError, match=f"{brokers.kind} ended at its start") as caught:
            await brokers.start(port=18830)
        assert "cannot assign requested address" in str(caught.value).lower()

    run(scenario())


def test_stop_kills_what_does_not_listen_to_reason(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        broker.process.send_signal(signal.SIGSTOP)
        await broker.stop(timeout_s=0.1)
        assert not broker.running
        assert broker.process.returncode == -signal.SIGKILL
        await broker.stop()
        assert "ended" in repr(broker)

    run(scenario())


def test_clients_that_stay_connected_do_not_hold_up_the_stop(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        async with client(broker, "a") as a:
            await broker.stop(timeout_s=60.0)
            assert broker.process.returncode == 0
            await a.until_reasons()

    run(scenario())


@pytest.mark.parametrize("how", [signal.SIGKILL, None])
def test_the_broker_ends_when_its_parent_does(brokers: Brokers, how: signal.Signals | None) -> None:
    script = (
        "import asyncio, sys, time\n"
        "from pathlib import Path\n"
        "from covey_coordinator.broker import start_broker\n"
        "broker = asyncio.run(start_broker(sys.argv[1], Path(sys.argv[2]), users={'a': 'b'}))\n"
        "print(broker.process.pid, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", script, brokers.kind, brokers.directory / "orphan"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    ) as parent:
        assert parent.stdout is not None
        assert parent.stdin is not None
        child = psutil.Process(int(parent.stdout.readline()))
        assert child.is_running()
        if how is None:
            parent.stdin.close()
        else:
            parent.send_signal(how)
        parent.wait(timeout=60)
    _, alive = psutil.wait_procs([child], timeout=60)
    assert not alive


def test_a_broker_whose_parent_is_gone_already_does_not_start() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "covey_coordinator.broker", "1234567", "/bin/echo", "started"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    assert "parent process ended" in done.stderr


def test_its_log_is_bounded_however_many_come_and_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mosquitto's, which has a line for each; the embedded broker says next to nothing."""
    if mosquitto.find() is None:
        missing("mosquitto is not installed: apt install mosquitto")
    monkeypatch.setattr(running, "MAX_LOG_BYTES", 2000)

    async def scenario() -> None:
        async with await start_broker("mosquitto", tmp_path, users={"covey": PASSWORD}) as broker:
            await talk(broker)

    async def talk(broker: RunningBroker) -> None:
        before = broker.directory / "broker.log.1"

        async def knock() -> None:
            """Somebody connects, or says at least something."""
            said = broker.log.stat().st_size
            reader, writer = await asyncio.open_connection(broker.host, broker.port)
            writer.write(b"\r\n" * 20)
            with contextlib.suppress(ConnectionError):
                await reader.read()
            writer.close()
            await poll(lambda: broker.log.stat().st_size > said)

        broker.trim_log()
        assert not before.exists()
        while broker.log.stat().st_size <= 2000:
            await knock()
        last = broker.last_log_lines(1)
        broker.trim_log()
        assert broker.log.stat().st_size == 0
        assert before.read_text().splitlines()[-1:] == last
        assert before.stat().st_mode & 0o777 == 0o600
        await knock()  # it goes on writing at the file's beginning, not where it was
        assert b"\0" not in broker.log.read_bytes()
        assert broker.log.stat().st_size < 2000

    run(scenario())


def test_ctrl_c_is_not_for_the_broker(brokers: Brokers) -> None:
    async def scenario() -> None:
        broker = await brokers.start()
        assert os.getpgid(broker.process.pid) != os.getpgid(0)

    run(scenario())


def test_leaving_the_block_stops_it_also_on_an_error(brokers: Brokers) -> None:
    started: list[RunningBroker] = []

    async def scenario() -> None:
        async with await brokers.start() as broker:
            started.append(broker)
            raise KeyError

    with pytest.raises(KeyError):
        run(scenario())
    assert not started[0].running


@pytest.mark.parametrize(
    "users",
    [{"": "x"}, {"a": ""}, {"a:b": "x"}, {"a": "x:y"}, {"a\nb": "x"}, {"a": "x\ny"}, {"a": "x\0"}],
)
def test_users_that_cannot_be_written_down_are_refused(
    users: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="broker user"):
        asyncio.run(start_broker("auto", tmp_path / "b", users=users))
    assert not (tmp_path / "b").exists()


def test_auto_takes_mosquitto_then_the_embedded_one_then_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert running._choose("auto") in ("mosquitto", "embedded")
    monkeypatch.setattr(mosquitto, "find", lambda program="mosquitto": Path("/mosquitto"))
    assert running._choose("auto") == "mosquitto"
    monkeypatch.setattr(mosquitto, "find", lambda program="mosquitto": None)
    monkeypatch.setattr(embedded, "available", lambda: True)
    assert running._choose("auto") == "embedded"
    with pytest.raises(ConfigError, match="apt install mosquitto"):
        running._choose("mosquitto")
    monkeypatch.setattr(embedded, "available", lambda: False)
    with pytest.raises(ConfigError, match="apt install mosquitto"):
        running._choose("auto")
    with pytest.raises(ConfigError, match="pip install"):
        running._choose("embedded")


def test_mosquitto_is_found_where_debian_hides_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "/usr/sbin" in mosquitto._MORE_PATH
    monkeypatch.setenv("PATH", "/nowhere")
    monkeypatch.setattr(mosquitto, "_MORE_PATH", (str(tmp_path),))
    assert mosquitto.find() is None
    program = tmp_path / "mosquitto"
    program.touch(0o755)
    assert mosquitto.find() == program


def test_a_directory_that_cannot_be_made_is_a_storage_error(brokers: Brokers) -> None:
    (brokers.directory / "file").write_bytes(b"")

    async def scenario() -> None:
        with pytest.raises(StorageError, match="cannot prepare the broker's directory"):
            await brokers.start("file/below")

    run(scenario())


def test_the_coordinator_does_not_load_the_embedded_broker() -> None:
    code = "import covey_coordinator.broker, sys; sys.exit('amqtt' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


class TestDeployedConfiguration:
    """deploy/mosquitto as an operator would install it, in another place."""

    @pytest.fixture
    def port(self, tmp_path: Path) -> int:
        return running._free_port()

    @pytest.fixture
    def installed(self, tmp_path: Path, port: int) -> Path:
        """A directory like /etc/mosquitto, with three users, and a main file like Debian's."""
        for program in ("mosquitto", "mosquitto_passwd"):
            if mosquitto.find(program) is None:
                missing(f"{program} is not installed: apt install mosquitto")
        (tmp_path / "conf.d").mkdir()
        certificates = tmp_path / "certs"
        certificates.mkdir()
        files = make_tls_files(certificates)
        files.certificate.rename(certificates / "broker.crt")
        files.key.rename(certificates / "broker.key")
        text = (DEPLOY / "covey.conf").read_text()
        assert "/etc/mosquitto/" in text
        text = text.replace("/etc/mosquitto", str(tmp_path))
        text = text.replace("listener 8883", f"listener {port} 127.0.0.1")
        (tmp_path / "conf.d" / "covey.conf").write_text(text)
        shutil.copy(DEPLOY / "covey.acl", tmp_path)
        passwords = tmp_path / "covey.passwd"
        passwords.write_text("".join(f"{u}:{u}\n" for u in ("coordinator", "pi-1", "pi-2")))
        subprocess.run([mosquitto.find("mosquitto_passwd") or "", "-U", passwords], check=True)
        (tmp_path / "mosquitto.conf").write_text(
            "persistence true\n"
            f"persistence_location {tmp_path}/\n"
            "log_dest stderr\n"
            f"include_dir {tmp_path}/conf.d\n" + ("user root\n" if os.geteuid() == 0 else "")
        )
        return tmp_path

    def test_every_client_is_confined_to_its_topics(self, installed: Path, port: int) -> None:
        trust = ssl.create_default_context(cafile=installed / "certs" / "ca.crt")
        topics = Topics("fleet")

        def user(name: str) -> Listener:
            transport = MqttTransport(
                f"mqtts://127.0.0.1:{port}", name, username=name, password=name, tls=trust
            )
            return Listener(transport)

        async def scenario() -> None:
            await poll(lambda: running._listens(process.pid, port))
            async with user("coordinator") as coordinator, user("pi-1") as one, user("pi-2") as two:
                await coordinator.transport.subscribe("covey/fleet/#")
                for device in (one, two):
                    await device.transport.subscribe("covey/#")
                # what the coordinator sends
                blob = topics.blob(bytes(32))
                for topic in (topics.round, topics.all, blob):
                    await coordinator.transport.publish(topic, bytes(MAX_PAYLOAD_BYTES))
                await coordinator.transport.publish(topics.inbox("pi-2"), b"for pi-2")
                await coordinator.transport.publish(topics.inbox("pi-1"), b"for pi-1")
                public = [topics.round, topics.all, blob]
                await one.until(lambda: one.topics == [*public, topics.inbox("pi-1")])
                await two.until(lambda: two.topics == [*public, topics.inbox("pi-2")])
                # what a device sends, for itself and for another
                coordinator.messages.clear()
                own = (topics.outbox, topics.upload, topics.presence)
                for make in own:
                    await one.transport.publish(make("pi-2"), b"forged")
                    await one.transport.publish(make("pi-1"), b"true")
                for topic in (topics.round, topics.all, topics.inbox("pi-2"), "other"):
                    await one.transport.publish(topic, b"forged")
                await two.transport.publish(topics.outbox("pi-2"), b"end")
                await coordinator.until(
                    lambda: (
                        coordinator.messages[-1:] != []
                        and coordinator.messages[-1].payload == b"end"
                    )
                )
                assert [(m.topic, m.payload) for m in coordinator.messages[:-1]] == [
                    (make("pi-1"), b"true") for make in own
                ]
                assert [topics.device_of(m.topic) for m in coordinator.messages] == [
                    *[DeviceId("pi-1")] * 3,
                    DeviceId("pi-2"),
                ]
                assert two.topics[4:] == []
                # a client id that is not one's own throws nobody off
                impostor = Listener(
                    MqttTransport(
                        f"mqtts://127.0.0.1:{port}",
                        "pi-2",
                        username="pi-1",
                        password="pi-1",
                        tls=trust,
                    )
                )
                async with impostor:
                    await two.transport.publish(topics.outbox("pi-2"), b"still here")
                assert two.reasons == []

        log = (installed / "log").open("wb")
        with (
            log,
            subprocess.Popen(
                [mosquitto.find() or "", "-c", installed / "mosquitto.conf"], stderr=log
            ) as process,
        ):
            try:
                run(scenario())
            finally:
                process.terminate()
        assert "Error" not in (installed / "log").read_text()

    def test_its_packet_limit_is_above_ours(self) -> None:
        lines = (DEPLOY / "covey.conf").read_text().splitlines()
        (limit,) = [int(line.split()[1]) for line in lines if line.startswith("max_packet_size")]
        assert limit == mosquitto.MAX_PACKET_BYTES
        assert limit > MAX_PAYLOAD_BYTES + 4096

    def test_its_rules_are_those_of_any_fleet(self) -> None:
        assert (DEPLOY / "covey.acl").read_text() == access_control("+")
