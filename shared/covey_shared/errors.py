"""The one error tree.

::

    CoveyError
    ├── LocalProtocolError      our own misuse: an illegal event, an argument out of range
    ├── RemoteProtocolError     a peer's fault: whatever bytes from the network can cause
    │   ├── MalformedError      the bytes are not a message, a chunk or a plan at all
    │   ├── SignatureError      well-formed, but not signed by whom it names
    │   └── RefusedError        well-formed and signed, but a rule of the protocol refuses it
    ├── RoundAbandonedError     a round ended without a sum; the reason is for the operator
    ├── ConfigError             a configuration file or key; names the file and the key
    ├── DataError               a data source; names the file, array or column
    ├── CompileError            a torch model that cannot become a plan; names operator and line
    ├── TrainingError           training ended without a usable update (NaN, out of memory)
    ├── TransportError          the broker is not there or refuses us
    └── StorageError            a file cannot be written or read (full disk, permissions)

Decoding bytes from the network raises the RemoteProtocolError family and nothing else. Errors
carry the fields a log line needs, and a message that says what to do next.

A message may quote what a device's owner would not show to others: a file's name, a column, a value.
So what a device tells the coordinator of an error is `public`, a sentence that quotes nothing.
"""


class CoveyError(Exception):
    """Base of every error that covey raises on purpose. public: what others may be told of it."""

    public: str = "an error, told in its log"


class LocalProtocolError(CoveyError):
    """We broke a rule ourselves: a bug or a misuse of the API, never a peer's doing."""


class RemoteProtocolError(CoveyError):
    """A peer broke a rule. The message is dropped or the round refused; the service lives.

    sender: the device id (or "coordinator") that the fault is attributed to, if the protocol
    can tell; attribution by an unverified field is never stored here.
    """

    def __init__(self, message: str, *, sender: str | None = None) -> None:
        super().__init__(message)
        self.sender = sender
        self.public = message  # it quotes what came from the network, and nothing else


class MalformedError(RemoteProtocolError):
    """The bytes are not what they claim to be: wrong version, length, type or digest."""


class SignatureError(RemoteProtocolError):
    """A signature or certificate does not verify."""


class RefusedError(RemoteProtocolError):
    """A rule of the protocol refuses a message that is well-formed and correctly signed."""


class RoundAbandonedError(CoveyError):
    """A round ended without a sum."""

    def __init__(self, round_id: int, reason: str) -> None:
        super().__init__(f"round {round_id} abandoned: {reason}")
        self.round_id = round_id
        self.reason = reason


class ConfigError(CoveyError):
    """A configuration file cannot be used. The message names the file, the key and the fix."""


class DataError(CoveyError):
    """A data source does not fit the plan, or cannot be read."""

    public = "its data does not fit the plan, or cannot be read"


class CompileError(CoveyError):
    """A torch model cannot be compiled into a plan."""


class TrainingError(CoveyError):
    """Local training gave no usable update; the device declines the round and says why.

    public: the kind of failure, without losses, counts or names.
    """

    def __init__(self, message: str, *, public: str = "its training failed") -> None:
        super().__init__(message)
        self.public = public


class TransportError(CoveyError):
    """The broker cannot be reached or refuses us."""


class StorageError(CoveyError):
    """A file cannot be written or read."""

    public = "its disk cannot be written or read"
