package nearest_test

import (
	"testing"

	"github.com/stretchr/testify/assert"

	"github.com/go-throttler/throttler/internal/nearest"
)

func TestTheNearestWordIsFound(t *testing.T) {
	t.Parallel()
	words := []string{"requests_per_unit", "unit", "unlimited", "limits", "log"}
	for given, want := range map[string]string{
		"request_per_unit": "requests_per_unit",
		"limit":            "limits",
		"lgo":              "log",
		"UNIT":             "unit",
		"unlimted":         "unlimited",
		"banana":           "",
		"":                 "",
		"x":                "",
	} {
		assert.Equal(t, want, nearest.Word(given, words), given)
	}
}
