package main

import (
	"log/slog"
	"testing"

	"github.com/stretchr/testify/require"
)

// wrongURLs are URLs that cannot be used, with a password that contains "secret".
var wrongURLs = map[string][]string{
	"redis": {"redis://:p/secret#x@127.0.0.1", "redis://:secret@127.0.0.1:port", "redis://:%zzsecret@127.0.0.1", "redis://127.0.0.1?passwrod=secret", "redis:secret@127.0.0.1"},
	"postgres": {
		"postgres://user:p/secret@127.0.0.1/db", "postgres://user:12/secret@127.0.0.1/db", "postgres://user:p@secret@127.0.0.1:1/db", "postgres://user:secret@127.0.0.1:port/db", "postgres://user:%zzsecret@127.0.0.1/db",
		"postgres://user:12?secret@127.0.0.1/db?connect_timeout=x", "postgres://127.0.0.1:port/db?password=secret", "postgres://127.0.0.1:1/db?password=p@secret", "postgres://127.0.0.1:1/db?passwrod=secret&sslmode=x",
		"postgres://user:secret@127.0.0.1/db?pool_max_conns=x", "user:secret@127.0.0.1/db", "http://user:secret@127.0.0.1/db", "postgres:secret@127.0.0.1/db",
		"host=127.0.0.1 port=1 password=secret", "host=127.0.0.1 port=x password=secret", "host=127.0.0.1 port=1 password=p secret", "host=127.0.0.1 port=1 password='p secret", "host=127.0.0.1 port=1 password = secret sslmode=x",
		"host=127.0.0.1 port=1 password='it\\'s secret' sslmode=x", "host=127.0.0.1 passwrod=secret sslmode=x", "postgres://user:secret@127.0.0.1:1/db?connect_timeout=1",
	},
}

func TestAWrongURLIsSaidWithoutThePassword(t *testing.T) {
	t.Parallel()
	for kind, urls := range wrongURLs {
		for _, url := range urls {
			_, _, err := open(t.Context(), kind, url, url, slog.New(slog.DiscardHandler))
			require.Error(t, err, url)
			require.NotContains(t, err.Error(), "secret", url)
		}
	}
}
