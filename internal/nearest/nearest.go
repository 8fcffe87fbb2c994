// Package nearest finds the word that somebody meant to write.
package nearest

import "strings"

// longest is how many bytes a word has at most: longer ones are not typing errors, and take long to compare.
const longest = 64

// Word is the one of words that is nearest to given, or "" if none is near: more than a third of its letters would
// have to change. Case does not count.
func Word(given string, words []string) string {
	best, least := "", len(given)/3+1
	if len(given) > longest {
		return ""
	}
	for _, w := range words {
		if d := distance(strings.ToLower(given), strings.ToLower(w)); d < least || d == least && best == "" {
			best, least = w, d
		}
	}
	return best
}

// distance is how many letters have to be inserted, removed, replaced, or exchanged with their neighbour.
func distance(a, b string) int {
	before, last := []int(nil), make([]int, len(b)+1)
	for j := range last {
		last[j] = j
	}
	for i := range len(a) {
		row := make([]int, len(b)+1)
		row[0] = i + 1
		for j := range len(b) {
			replaced := last[j]
			if a[i] != b[j] {
				replaced++
			}
			row[j+1] = min(replaced, last[j+1]+1, row[j]+1)
			if i > 0 && j > 0 && a[i] == b[j-1] && a[i-1] == b[j] {
				row[j+1] = min(row[j+1], before[j-1]+1)
			}
		}
		before, last = last, row
	}
	return last[len(b)]
}
