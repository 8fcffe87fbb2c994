package rules_test

import (
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/rules"
)

// TestALongPathIsLimitedLikeAnyOther has rules whose names are their paths and values, and so are longer than an identifier
// may be.
func TestALongPathIsLimitedLikeAnyOther(t *testing.T) {
	t.Parallel()
	long := strings.Repeat("x", 1000)
	for _, more := range []string{"", "y", strings.Repeat("y", 2000)} {
		e := engine(t, "rules:\n- {path: /"+long+more+", descriptors: [{key: user, unit: hour, requests_per_unit: 2}]}\n"+
			"- {path: /, descriptors: [{key: plan, value: a"+long+more+", unit: hour, requests_per_unit: 2}, {key: plan, value: b"+long+more+", unit: hour, requests_per_unit: 2}]}\n")
		for _, of := range [][]rules.Entry{
			entries("path", "/"+long+more, "user", "1"), entries("path", "/"+long+more, "user", "2"), entries("path", "/"+long+more, "user", long+more),
			entries("path", "/", "plan", "a"+long+more), entries("path", "/", "plan", "b"+long+more),
		} {
			for i := range 3 {
				v, applied, err := e.Decide(t.Context(), rules.Request{Entries: of})
				require.NoError(t, err)
				require.Len(t, applied, 1)
				assert.Equal(t, i < 2, v.Allowed)
				assert.LessOrEqual(t, len(applied[0].Levels[0].Identifier), 1024)
				assert.Equal(t, "default", rules.HashTag(applied[0].Levels[0].Identifier))
			}
		}
	}
}
