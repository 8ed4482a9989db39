"""Where a device stands in a round, and what leads from where to where."""

import enum


class Phase(enum.Enum):
    """Where a device stands in a round."""

    IDLE = "idle"
    FETCHING = "fetching"  # called; getting plan and model
    CHECKED_IN = "checked in"  # waiting for the manifest
    TRAINING = "training"  # shares sent, no roster yet
    TRAINED = "trained"  # update ready, no roster yet
    WITHDRAWN = "withdrawn"  # no update to give, no roster yet; still serves
    ROSTERED = "rostered"  # roster stands, still training
    SERVING = "serving"  # uploaded, withdrawn or left out; waits for the view
    VOTED = "voted"  # signed the one view
    REVEALED = "revealed"  # gave up the shares that the view allows
    FINISHING = "finishing"  # restarted after its upload began: sends the same again, nothing else


class Event(enum.Enum):
    """What can happen to a device in a round."""

    RESTART = "restart with an unfinished upload"
    CALL = "round call"
    READY = "plan and model ready"
    MANIFEST = "manifest"
    DELIVERY = "delivery"
    ROSTER = "roster"
    LEFT_OUT = "roster without this device"
    UPDATE = "update trained"
    NO_UPDATE = "training failed"
    PROPOSAL = "view proposal"
    VIEW = "view"
    END = "result, abandoned or left"


_P, _E = Phase, Event

TRANSITIONS: dict[Phase, dict[Event, Phase]] = {
    _P.IDLE: {_E.CALL: _P.FETCHING, _E.RESTART: _P.FINISHING},
    _P.FETCHING: {_E.CALL: _P.FETCHING, _E.READY: _P.CHECKED_IN, _E.END: _P.IDLE},
    _P.CHECKED_IN: {_E.CALL: _P.FETCHING, _E.MANIFEST: _P.TRAINING, _E.END: _P.IDLE},
    _P.TRAINING: {
        _E.CALL: _P.FETCHING,
        _E.DELIVERY: _P.TRAINING,
        _E.UPDATE: _P.TRAINED,
        _E.NO_UPDATE: _P.WITHDRAWN,
        _E.ROSTER: _P.ROSTERED,
        _E.LEFT_OUT: _P.SERVING,
        _E.END: _P.IDLE,
    },
    _P.TRAINED: {
        _E.CALL: _P.FETCHING,
        _E.DELIVERY: _P.TRAINED,
        _E.ROSTER: _P.SERVING,
        _E.LEFT_OUT: _P.SERVING,
        _E.END: _P.IDLE,
    },
    _P.WITHDRAWN: {
        _E.CALL: _P.FETCHING,
        _E.DELIVERY: _P.WITHDRAWN,
        _E.ROSTER: _P.SERVING,
        _E.LEFT_OUT: _P.SERVING,
        _E.END: _P.IDLE,
    },
    _P.ROSTERED: {
        _E.CALL: _P.FETCHING,
        _E.DELIVERY: _P.ROSTERED,
        _E.UPDATE: _P.SERVING,
        _E.NO_UPDATE: _P.SERVING,
        _E.PROPOSAL: _P.VOTED,
        _E.END: _P.IDLE,
    },
    _P.SERVING: {
        _E.CALL: _P.FETCHING,
        _E.DELIVERY: _P.SERVING,
        _E.PROPOSAL: _P.VOTED,
        _E.END: _P.IDLE,
    },
    _P.VOTED: {_E.CALL: _P.FETCHING, _E.VIEW: _P.REVEALED, _E.END: _P.IDLE},
    _P.REVEALED: {_E.CALL: _P.FETCHING, _E.END: _P.IDLE},
    _P.FINISHING: {_E.CALL: _P.FETCHING, _E.END: _P.IDLE},
}
