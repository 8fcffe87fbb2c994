#!/usr/bin/env bash
# others.sh [PACKAGE...] tests what uses Redis on Redis 8 and on Valkey 8. They come from Debian trixie,
# whatever Linux this is, with the libraries that they need, and are kept in bin/.trixie. The first
# time needs root, debootstrap and about a minute.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
servers=(redis-server valkey-server)
kept=$PWD/bin/.trixie
PATH=$PATH:/usr/sbin:/sbin # where debootstrap is
[[ $# -gt 0 ]] || set -- ./storage/redis/... ./internal/servers/...

get() {
	local as_root=() new=$kept.new script=/usr/share/debootstrap/scripts/sid server
	if [[ $EUID != 0 ]]; then as_root=(sudo -n); fi
	command -v debootstrap >/dev/null || internal/servers/install.sh debootstrap debian-archive-keyring
	"${as_root[@]}" rm -rf --one-file-system "$new" "$new.root"
	mkdir -p "$new/bin"
	# An older debootstrap does not know trixie, but what it does for sid is the same.
	"${as_root[@]}" debootstrap --variant=minbase \
		--include="$(IFS=,; echo "${servers[*]}")" trixie "$new.root" '' "$script"
	cp -RL "$new.root"/usr/lib/*-linux-gnu "$new/lib"
	for server in "${servers[@]}"; do
		cp -L "$new.root/usr/bin/$server" "$new/bin/"
		wrapper >"$new/$server"
		chmod +x "$new/$server"
	done
	"${as_root[@]}" rm -rf --one-file-system "$new.root"
	mv "$new" "$kept"
}

# wrapper prints what starts the program of its own name with the loader and the libraries next to it.
wrapper() {
	cat <<-'END'
		#!/bin/sh
		here=${0%/*}
		exec "$here"/lib/ld-linux-*.so.* --library-path "$here/lib" "$here/bin/${0##*/}" "$@"
	END
}

[[ $(uname -s) == Linux ]] || { echo "$0: the servers are programs of Debian, which run on Linux" >&2; exit 1; }
[[ -d $kept ]] || get
for server in "${servers[@]}"; do
	"$kept/$server" --version
	(set -x; env -u THROTTLER_REDIS_URL REDIS_SERVER="$kept/$server" "${GO:-go}" test -race -count=1 "$@")
done
