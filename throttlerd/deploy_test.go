package main

import (
	"encoding/json"
	"os"
	"strings"
	"testing"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/ratelimit/v3" // registers the type of an Any
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	_ "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/stretchr/testify/require"
	"go.yaml.in/yaml/v4"
	"google.golang.org/protobuf/encoding/protojson"
)

func TestTheConfigurationOfEnvoyHasOnlyWordsThatEnvoyKnows(t *testing.T) {
	t.Parallel()
	data, err := os.ReadFile("deploy/envoy.yaml")
	require.NoError(t, err)
	var tree any
	require.NoError(t, yaml.Unmarshal(data, &tree))
	asJSON, err := json.Marshal(tree)
	require.NoError(t, err)
	var b bootstrapv3.Bootstrap
	require.NoError(t, protojson.Unmarshal(asJSON, &b))
	require.NoError(t, b.ValidateAll())
	wrong := strings.Replace(string(asJSON), "failure_mode_deny", "failure_mode_denied", 1)
	require.Error(t, protojson.Unmarshal([]byte(wrong), &b), "the test would see a wrong word")
}

func TestTheUnitStartsWithFlagsThatThereAre(t *testing.T) {
	t.Parallel()
	for file, prefix := range map[string]string{"deploy/throttlerd.service": "ExecStart=/usr/local/bin/throttlerd serve ", "deploy/Dockerfile": "CMD "} {
		data, err := os.ReadFile(file)
		require.NoError(t, err)
		_, rest, found := strings.Cut("\n"+string(data), "\n"+prefix)
		require.True(t, found, file)
		line, _, _ := strings.Cut(rest, "\n")
		args := strings.Fields(line)
		if file == "deploy/Dockerfile" {
			require.NoError(t, json.Unmarshal([]byte(line), &args))
			args = args[1:]
		}
		_, err = parse(args, func(string) string { return "" }, &text{})
		require.NoError(t, err, file)
	}
}
