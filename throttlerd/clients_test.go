//go:build clients

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// Clients that are not Go programs of this module: Node, and grpcurl, which make test builds and names in GRPCURL.

const clientRules = "domain: api\nrules:\n- {name: http, when: {path: /http}, limits: [LIMIT/1h]}\n- {name: grpc, when: {path: /grpc}, limits: [LIMIT/1h]}\n"

func limited(limit string) string { return strings.ReplaceAll(clientRules, "LIMIT", limit) }

func TestANodeClientSeesTheLimitAndTheReload(t *testing.T) {
	t.Parallel()
	file := written(t, limited("1"))
	d := start(t, nil, "-rules", file)
	ask := func() (seen struct {
		Status     int
		RetryAfter *string
		Allowed    bool
	}) {
		out := run(t, "node", "testdata/client.js", "http://"+d.address("http"))
		require.NoError(t, json.Unmarshal([]byte(out), &seen), out)
		return seen
	}
	first := ask()
	require.Equal(t, 200, first.Status)
	require.True(t, first.Allowed)
	require.Nil(t, first.RetryAfter)
	second := ask()
	require.Equal(t, 429, second.Status)
	require.False(t, second.Allowed)
	require.NotNil(t, second.RetryAfter)
	require.Regexp(t, `^3[56]\d\d$`, *second.RetryAfter)
	overwrite(t, file, limited("2"))
	eventually(t, func() bool { return d.engine.Rules().Rules()[0].Limits[0].Capacity() == 2 }, "the file counts")
	require.Equal(t, 200, ask().Status)
	require.Equal(t, 429, ask().Status)
}

func TestGrpcurlSeesTheLimitAndTheReload(t *testing.T) {
	t.Parallel()
	require.NotEmpty(t, os.Getenv("GRPCURL"), "GRPCURL must name the program: make test builds it")
	file := written(t, limited("1"))
	d := start(t, nil, "-rules", file, "-reflection")
	ask := func() (out struct {
		OverallCode          string
		ResponseHeadersToAdd []struct{ Key, Value string }
	}) {
		said := run(t, os.Getenv("GRPCURL"), "-plaintext", "-max-time", "30", "-d", `{"domain":"api","descriptors":[{"entries":[{"key":"path","value":"/grpc"}]}]}`,
			d.address("grpc"), "envoy.service.ratelimit.v3.RateLimitService/ShouldRateLimit")
		require.NoError(t, json.Unmarshal([]byte(said), &out), said)
		return out
	}
	require.Equal(t, "OK", ask().OverallCode)
	over := ask()
	require.Equal(t, "OVER_LIMIT", over.OverallCode)
	require.Equal(t, "retry-after", over.ResponseHeadersToAdd[2].Key)
	require.Regexp(t, `^3[56]\d\d$`, over.ResponseHeadersToAdd[2].Value)
	overwrite(t, file, limited("2"))
	eventually(t, func() bool { return d.engine.Rules().Rules()[0].Limits[0].Capacity() == 2 }, "the file counts")
	require.Equal(t, "OK", ask().OverallCode)
	require.Equal(t, "OVER_LIMIT", ask().OverallCode)
	require.Contains(t, run(t, os.Getenv("GRPCURL"), "-plaintext", d.address("grpc"), "grpc.health.v1.Health/Check"), `"SERVING"`)
}

// run returns the output of a program.
func run(t *testing.T, program string, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	c := exec.CommandContext(t.Context(), program, args...)
	c.Stderr = &stderr
	out, err := c.Output()
	require.NoError(t, err, "%s", stderr.String())
	return string(out)
}
