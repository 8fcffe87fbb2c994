// The admin API: its own listener, its own token.

package main

import (
	"log/slog"
	"net/http"

	"github.com/go-throttler/throttler/rules"
)

type admin struct{}

func newAdmin(*rules.Engine, rules.Source, string, *slog.Logger) *admin { return &admin{} }

func (a *admin) handler() http.Handler { return http.NotFoundHandler() }
