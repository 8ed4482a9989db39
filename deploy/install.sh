#!/bin/sh
# Installs covey-device on 64-bit Raspberry Pi OS or Debian, into /opt/covey; run again, it upgrades.
#
#   sudo sh install.sh [WHAT]
#
# WHAT is what pip installs: covey (the default), covey==0.2.0, the path of a wheel, or any of them with
# [coordinator] behind it, for a machine that is the coordinator too.
# `sudo covey-device uninstall` takes everything away again.
set -eu
umask 022

prefix=/opt/covey
mark=$prefix/.made-by-install.sh
links=/usr/local/bin
what=${1:-covey}

fail() {
	echo "install.sh: $*" >&2
	exit 1
}

[ "$#" -le 1 ] || fail "at most one argument: what pip is to install"
[ "$(id -u)" -eq 0 ] || fail "this changes the system: run it with sudo"

# A 64-bit kernel under a 32-bit system is common on Pis: the system decides which wheels run.
if command -v dpkg >/dev/null; then
	architecture=$(dpkg --print-architecture)
else
	architecture=$(uname -m)
fi
case $architecture in
arm64 | aarch64 | amd64 | x86_64) ;;
*) fail "this system is $architecture; onnxruntime exists for 64-bit systems alone: install the 64-bit Raspberry Pi OS" ;;
esac

command -v python3 >/dev/null || fail "no python3: apt install python3 python3-venv"
python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
	fail "$(python3 --version) is too old; covey needs 3.11, which Raspberry Pi OS has since bookworm"

if [ -e /var/lib/dpkg/info/covey-device.list ]; then
	fail "the Debian package covey-device is installed; upgrade that, or remove it first: sudo apt purge covey-device"
fi
if [ -e "$prefix" ] && [ ! -e "$mark" ]; then
	fail "$prefix is there already, and not by this script: remove it first"
fi

# Debian's Python has no ensurepip without python3-venv.
if ! python3 -c 'import ensurepip, venv' 2>/dev/null; then
	command -v apt-get >/dev/null || fail "python3 has no venv; install that first"
	echo "installing python3-venv"
	DEBIAN_FRONTEND=noninteractive apt-get install --yes --quiet --no-install-recommends python3-venv >/dev/null ||
		fail "python3-venv cannot be installed: apt update, and try again"
fi

# After an upgrade of the system to another Python, the old one's wheels are of no use.
python=$(python3 -c 'import sys; print("%d.%d" % sys.version_info[:2])')
if [ "$("$prefix/bin/python" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true)" != "$python" ]; then
	echo "making $prefix, with Python $python"
	mkdir -p "$prefix"
	: >"$mark"
	python3 -m venv --clear "$prefix"
	: >"$mark"
fi

echo "installing $what into $prefix"
set -- --disable-pip-version-check --quiet --no-input --upgrade --no-compile
file=${what%%\[*}
case $file in
*.whl)
	[ -e "$file" ] || fail "there is no $file"
	# The same version again is another wheel, perhaps.
	"$prefix/bin/python" -m pip install "$@" --force-reinstall --no-deps "$what"
	;;
esac
"$prefix/bin/python" -m pip install "$@" --only-binary :all: "$what"
"$prefix/bin/python" -m covey_device.trim
"$prefix/bin/python" -m compileall -q "$prefix/lib" || true # the service may not write there

mkdir -p "$links"
names=covey-device
if "$prefix/bin/python" -c 'import sqlalchemy' 2>/dev/null; then
	names="$names covey"
fi
for name in $names; do
	if [ -L "$links/$name" ] || [ ! -e "$links/$name" ]; then
		ln -sfn "$prefix/bin/$name" "$links/$name"
	else
		echo "install.sh: $links/$name is there and no link; the command is $prefix/bin/$name" >&2
	fi
done

"$prefix/bin/covey-device" --version
if [ -d /run/systemd/system ]; then
	if [ "$names" = covey-device ] || [ -e /etc/systemd/system/covey-device.service ]; then
		"$prefix/bin/covey-device" install-service
	else
		echo "to make a device of this machine, too: sudo covey-device join TOKEN"
	fi
	# A coordinator that runs goes on with the new program.
	[ ! -e /etc/systemd/system/covey-coordinator.service ] || systemctl try-restart covey-coordinator.service
else
	echo "no systemd runs here: start \`covey-device run\` with what does"
fi
