"""Have covey-device wait while something else needs the machine: ``python veto.py 30 "the camera is on"``."""

import json
import socket
import sys

with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as covey:
    covey.connect("/run/covey-device/covey.sock" if len(sys.argv) < 4 else sys.argv[3])
    request = {"ask": "wait", "seconds": float(sys.argv[1]), "why": sys.argv[2]}
    covey.sendall(json.dumps(request).encode() + b"\n")
    print(covey.makefile().readline().strip())  # {"ok":true,"heeded":true}
