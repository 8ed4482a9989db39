"""How devices join a networked fleet and renew their certificates.

`desk` decides, `listener` is the port it sits behind, `keeper` has both beside the rounds in `covey up`.
The messages are `covey_shared.enrolment`'s.
"""

from covey_coordinator.enrolment.desk import EnrolmentDesk, Peer
from covey_coordinator.enrolment.keeper import enrolment_of
from covey_coordinator.enrolment.listener import EnrolmentListener

__all__ = ["EnrolmentDesk", "EnrolmentListener", "Peer", "enrolment_of"]
