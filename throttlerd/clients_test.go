//go:build clients

package main

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	ratelimitv3 "github.com/envoyproxy/go-control-plane/envoy/service/ratelimit/v3"
	"github.com/stretchr/testify/require"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
)

// Clients in other languages, which make test gets and names in NODE_PATH and GRPCURL.

const clientRules = "domain: api\nrules:\n- {name: http, when: {path: /http}, limits: [LIMIT/1h]}\n- {name: grpc, when: {path: /grpc}, limits: [LIMIT/1h]}\n"

func limited(limit string) string { return strings.ReplaceAll(clientRules, "LIMIT", limit) }

// seen is what a client saw.
type seen struct {
	HTTP struct {
		Status     int
		RetryAfter *string
		Allowed    bool
	}
	GRPC struct {
		Code       string
		RetryAfter *string
	}
}

func TestANodeClientSeesTheLimitAndTheReload(t *testing.T) {
	t.Parallel()
	require.NotEmpty(t, os.Getenv("NODE_PATH"), "NODE_PATH must name the packages of testdata/node: make test gets them")
	file := written(t, limited("1"))
	d := start(t, nil, "-rules", file)
	descriptors := filepath.Join(t.TempDir(), "descriptors")
	require.NoError(t, os.WriteFile(descriptors, protocol(t), 0o600))
	ask := func() (s seen) {
		out := run(t, "node", "testdata/node/client.js", "http://"+d.address("http"), d.address("grpc"), descriptors)
		require.NoError(t, json.Unmarshal([]byte(out), &s), out)
		return s
	}
	first := ask()
	require.Equal(t, 200, first.HTTP.Status)
	require.True(t, first.HTTP.Allowed)
	require.Nil(t, first.HTTP.RetryAfter)
	require.Equal(t, "OK", first.GRPC.Code)
	require.Nil(t, first.GRPC.RetryAfter)
	second := ask()
	require.Equal(t, 429, second.HTTP.Status)
	require.Equal(t, "OVER_LIMIT", second.GRPC.Code)
	for _, wait := range []*string{second.HTTP.RetryAfter, second.GRPC.RetryAfter} {
		require.NotNil(t, wait)
		require.Regexp(t, `^3[56]\d\d$`, *wait)
	}
	overwrite(t, file, limited("2"))
	eventually(t, func() bool { return d.engine.Rules().Rules()[0].Limits[0].Capacity() == 2 }, "the file counts")
	third := ask()
	require.Equal(t, 200, third.HTTP.Status)
	require.Equal(t, "OK", third.GRPC.Code)
	require.Equal(t, 429, ask().HTTP.Status)
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

// run is what a program prints.
func run(t *testing.T, program string, args ...string) string {
	t.Helper()
	var stderr strings.Builder
	c := exec.CommandContext(t.Context(), program, args...)
	c.Stderr = &stderr
	out, err := c.Output()
	require.NoError(t, err, "%s", stderr.String())
	return string(out)
}

// protocol is the protocol of Envoy as a descriptor set, with all that it imports before it.
func protocol(t *testing.T) []byte {
	t.Helper()
	set, have := &descriptorpb.FileDescriptorSet{}, map[string]bool{}
	var add func(f protoreflect.FileDescriptor)
	add = func(f protoreflect.FileDescriptor) {
		if have[f.Path()] {
			return
		}
		have[f.Path()] = true
		for i := range f.Imports().Len() {
			add(f.Imports().Get(i).FileDescriptor)
		}
		set.File = append(set.File, protodesc.ToFileDescriptorProto(f))
	}
	add(ratelimitv3.File_envoy_service_ratelimit_v3_rls_proto)
	data, err := proto.Marshal(set)
	require.NoError(t, err)
	return data
}
