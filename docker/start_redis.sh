#!/bin/sh
# Starts Redis with a configuration file and options, and with the password from REDISCLI_AUTH. The password comes on
# standard input: every user of the host could read it from a command line.
set -eu
: "${REDISCLI_AUTH:?needs the password of Redis}"
exec redis-server "$@" - <<PASSWORD
requirepass "$REDISCLI_AUTH"
PASSWORD
