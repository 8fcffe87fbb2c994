#!/usr/bin/env bash
# check.sh [COMMIT] runs the short benchmarks in the process as they are here and as they were at a commit, by
# default the last tag, or else the one before. The runs take turns. It fails where benchstat finds (p < 0.05) that
# one takes longer by more than 10 %, and finds it again.
set -euo pipefail
cd "$(dirname "$0")/.."

go=${GO:-go}
base=${1:-$(git describe --tags --abbrev=0 2>/dev/null || echo HEAD~1)}
count=${COUNT:-10} benchtime=${BENCHTIME:-100ms}
benchmarks='^Benchmark(Clock|HotKey)' # all that need no long preparation

work=$(mktemp -d)
trap 'git worktree remove --force "$work/base" 2>/dev/null || true; rm -rf "$work"' EXIT
trap 'exit 130' INT TERM
git worktree add --quiet --detach "$work/base" "$base"

packages=() # those with such benchmarks, here and there
for package in . ./storage/runtime; do
	if grep -qsE 'func Benchmark(Clock|HotKey)' "$package"/*_test.go && grep -qsE 'func Benchmark(Clock|HotKey)' "$work/base/$package"/*_test.go; then
		packages+=("$package")
	fi
done
[[ ${#packages[@]} -gt 0 ]] || { echo "$base has none of these benchmarks: $benchmarks" >&2; exit 1; }

for package in "${packages[@]}"; do
	name=${package//[.\/]/_}
	$go test -c -o "$work/new$name" "$package"
	(cd "$work/base" && $go test -c -o "$work/old$name" "$package")
done

measure() {
	rm -f "$work"/{old,new}.txt
	for ((i = 0; i < count; i++)); do
		sides=(old new)
		if ((i % 2)); then sides=(new old); fi
		for side in "${sides[@]}"; do
			for package in "${packages[@]}"; do
				(cd "$package" && "$work/$side${package//[.\/]/_}" -test.run '^$' -test.bench "$benchmarks" -test.benchtime "$benchtime") >>"$work/$side.txt"
			done
		done
	done
	bin/benchstat -filter .unit:sec/op "$base=$work/old.txt" "here=$work/new.txt"
}

# In the columns: the name, seconds, spread, seconds, spread, and the change, which is "~" when it may be chance.
slower() {
	bin/benchstat -filter .unit:sec/op -format csv "$work/old.txt" "$work/new.txt" 2>/dev/null |
		awk -F, '$1 != "" && $1 != "geomean" && $6 ~ /^[+]/ && $6 + 0 > 10 { print $1 }' | sort
}

measure
first=$(slower)
[[ -n $first ]] || exit 0
echo "These seem to be slower, and so all are measured again:" $first
measure
both=$(comm -12 <(echo "$first") <(slower))
[[ -z $both ]] || { echo "slower than at $base, twice:" $both >&2; exit 1; }
