"""Topic names: the seven of them, and which device one belongs to."""

import hashlib

import pytest

from covey_shared.topics import Topics

T = Topics("farm")
DIGEST = hashlib.sha256(b"").digest()
LONGEST = Topics("f" * 32)


def test_the_names_are_the_documented_ones():
    assert [T.round, T.all, T.inbox("pi-1"), T.outbox("+"), T.upload("pi-1"), T.presence("+")] == [
        "covey/farm/round",
        "covey/farm/all",
        "covey/farm/to/pi-1",
        "covey/farm/from/+",
        "covey/farm/up/pi-1",
        "covey/farm/presence/+",
    ]
    assert T.blob(DIGEST) == "covey/farm/blob/" + DIGEST.hex()


def test_brokers_limits_are_kept():
    device = "d" * 32
    topics = [LONGEST.round, LONGEST.all, LONGEST.blob(DIGEST)]
    topics += [
        name(device) for name in (LONGEST.inbox, LONGEST.outbox, LONGEST.upload, LONGEST.presence)
    ]
    assert max(topic.count("/") + 1 for topic in topics) <= 7  # AWS IoT
    assert max(len(topic.encode()) for topic in topics) <= 256
    assert len(set(topics)) == 7


@pytest.mark.parametrize("name", ["outbox", "upload", "presence", "inbox"])
def test_a_topic_names_its_device(name: str):
    assert T.device_of(getattr(T, name)("pi-1")) == "pi-1"


@pytest.mark.parametrize(
    "topic",
    [
        "",
        "covey",
        "covey/farm/round",
        "covey/farm/all",
        "covey/other/from/pi-1",
        "other/farm/from/pi-1",
        "covey/farm/from/pi-1/more",
        "/covey/farm/from/pi-1",
    ],
)
def test_other_topics_belong_to_no_device(topic: str):
    assert T.device_of(topic) is None
