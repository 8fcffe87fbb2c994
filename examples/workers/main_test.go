package main

import (
	"bytes"
	"io"
	"os"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"
)

// TestMain lets the test binary act as a worker, since run starts copies of it.
func TestMain(m *testing.M) {
	if len(os.Args) > 1 && os.Args[1] == "worker" {
		main()
		return
	}
	os.Exit(m.Run())
}

func TestFiveWorkersKeepTheLimitTogether(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	_, err := run([]string{"-for", "4s"}, &out)
	require.NoError(t, err)
	assert.Regexp(t, `^[5-8] calls, by the workers: \[`, out.String())
}

func TestANumberOfWorkersThatCannotBeIsAnError(t *testing.T) {
	t.Parallel()
	for _, n := range []string{"-1", "0", "9000000000000000000"} {
		_, err := run([]string{"-workers", n}, io.Discard)
		assert.ErrorContains(t, err, "-workers is "+n)
	}
}

func TestFiveWorkersGetSharesWithin20PercentOfEachOther(t *testing.T) {
	t.Parallel()
	var out bytes.Buffer
	sent, err := run([]string{"-for", "6s", "-rate", "20"}, &out)
	require.NoError(t, err)
	require.Len(t, sent, 5)
	assert.Greater(t, sent[0], 5, out.String())
	assert.LessOrEqual(t, float64(sent[4]-sent[0]), 0.2*float64(sent[4]), out.String())
}
