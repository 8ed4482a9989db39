"""How covey comes to a Pi: a tree of wheels for another machine, a .deb around it, and what it weighs.

Not part of the distribution: it is used from a checkout, on any Linux machine, and never on the Pi.

- ``target``: the releases of Debian and the architectures that packages are made for
- ``wheels``: which wheels those are, locked by hash, and how they are fetched
- ``tree``: a relocated venv of them, as it lies in /opt/covey
- ``deb``: a Debian package of such a tree
- ``weights``: what every distribution weighs, as a wheel and on the disk
"""
