#!/usr/bin/env bash
# install.sh PACKAGE... installs Debian packages, or says how to.
set -euo pipefail

as_root=()
if [[ $EUID != 0 ]]; then as_root=(sudo -n); fi

if ! command -v apt-get >/dev/null || ! "${as_root[@]}" true 2>/dev/null; then
	brew=("${@/%-server/}")
	cat >&2 <<-END
		$* is missing, and cannot be installed from here. Run
		    sudo apt-get install $*
		or, with Homebrew,
		    brew install ${brew[*]/%postgresql/postgresql@16}
	END
	exit 1
fi

install=("${as_root[@]}" env DEBIAN_FRONTEND=noninteractive apt-get install -y --no-install-recommends "$@")
echo "$* is missing. Installing it: ${install[*]}"
"${install[@]}" || { "${as_root[@]}" apt-get update && "${install[@]}"; }
