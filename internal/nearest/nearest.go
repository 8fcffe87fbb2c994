// Package nearest finds the word that was probably meant by a misspelt one.
package nearest

import "strings"

// longest is the length in bytes up to which a word is compared. A longer one is no typing error, and would take long.
const longest = 64

// Word returns the word that is nearest to given, the first of equally near ones. It returns "" if more than a third of
// the bytes of given, and one more, would have to change, or if given has more than 64 bytes. Case does not count.
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

// distance returns how many bytes must be inserted, removed, replaced, or exchanged with their neighbour to make b of
// a. This is the optimal string alignment distance: https://en.wikipedia.org/wiki/Damerau-Levenshtein_distance.
//
// It needs three rows of the usual table: row i has the distances of the first i bytes of a from each beginning of b.
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
