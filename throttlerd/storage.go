// Where the counts are kept.

package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"strings"

	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/storage"
	"github.com/go-throttler/throttler/storage/failover"
	"github.com/go-throttler/throttler/storage/lease"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
	redisstore "github.com/go-throttler/throttler/storage/redis"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// closing are the functions that close what has been opened. They run in reverse order.
type closing []func(context.Context) error

func (c *closing) then(f func(context.Context) error) { *c = append(*c, f) }

func (c *closing) close(ctx context.Context) error {
	var faults []error
	for i := len(*c) - 1; i >= 0; i-- {
		faults = append(faults, (*c)[i](ctx))
	}
	*c = nil
	return errors.Join(faults...)
}

// stores are the storages of a daemon.
type stores struct {
	shared storage.Storage // the one that -storage names
	leases *lease.Storage  // in front of it; nil without -lease
}

// openStores opens the storages that the flags name. Leases are opened last and therefore closed first: they give their
// tokens back to the shared storage.
func openStores(ctx context.Context, c *config, log *slog.Logger, closing *closing) (s stores, err error) {
	if s.shared, err = openStorage(ctx, c, log, closing); err != nil || !c.lease {
		return s, err
	}
	if s.leases, err = lease.New(s.shared, nil); err != nil {
		return s, err
	}
	closing.then(s.leases.Close)
	return s, nil
}

// decides returns the storage that decides requests.
func (s *stores) decides() storage.Storage {
	if s.leases != nil {
		return s.leases
	}
	return s.shared
}

// state returns the function that describes the storages on the live page, or nil if they have no such state. Figures of
// leases are named as in the metrics.
func (s *stores) state() func() any {
	f, _ := s.shared.(*failover.Storage)
	switch {
	case s.leases == nil && f == nil:
		return nil
	case s.leases == nil:
		return func() any { return f.State() }
	}
	return func() any {
		all := map[string]any{}
		if f != nil {
			text, _ := json.Marshal(f.State()) // has an encoding for whatever is in it
			_ = json.Unmarshal(text, &all)
		}
		for name, value := range s.leases.Stats() {
			all[name] = value
		}
		return all
	}
}

// openStorage opens the storage that -storage names. Redis may be down at the start. Postgres must be up, because its
// table is created here.
func openStorage(ctx context.Context, c *config, log *slog.Logger, closing *closing) (storage.Storage, error) {
	switch c.storage {
	case "redis":
		return opened(openRedis(c, closing))
	case "postgres":
		return opened(openPostgres(ctx, c, closing))
	case "failover":
		primary, err := openRedis(c, closing)
		if err != nil {
			return nil, err
		}
		ledger, err := openPostgres(ctx, c, closing)
		if err != nil {
			return nil, err
		}
		s, err := failover.New(primary, ledger, &failover.Options{PrimaryTimeout: c.redisTimeout, LedgerTimeout: c.postgresTimeout, Observe: changes(log)})
		if err != nil {
			return nil, err
		}
		closing.then(s.Close)
		return s, nil
	}
	return memstore.New(nil), nil
}

// opened returns a nil interface together with an error. Converting s itself would make a storage that is not nil, but
// holds a nil pointer.
func opened[S storage.Storage](s S, err error) (storage.Storage, error) {
	if err != nil {
		return nil, err
	}
	return s, nil
}

func openRedis(c *config, closing *closing) (*redisstore.Storage, error) {
	o := &redisstore.Options{Timeout: c.redisTimeout}
	if c.redisTag {
		o.HashTag = rules.HashTag
	}
	s, err := redisstore.Open(c.redisURL, o)
	if err != nil {
		return nil, fmt.Errorf("-redis-url: %w", err)
	}
	closing.then(s.Close)
	return s, nil
}

func openPostgres(ctx context.Context, c *config, closing *closing) (*pgstore.Storage, error) {
	pool, err := newPool(ctx, c.postgresURL, closing)
	if err != nil {
		return nil, err
	}
	s, err := pgstore.New(ctx, pool, &pgstore.Options{Timeout: c.postgresTimeout})
	if err != nil {
		return nil, fmt.Errorf("-storage postgres: %w", err)
	}
	closing.then(s.Close)
	return s, nil
}

// newPool never quotes a URL that cannot be parsed. The errors of pgx quote it and hide only what certainly is the
// password. If the password has an unencoded @, the part after it would be parsed as the host or the database name and
// shown.
func newPool(ctx context.Context, url string, closing *closing) (*pgxpool.Pool, error) {
	_, rest, _ := strings.Cut(url, "://")
	_, path, _ := strings.Cut(rest, "/")
	if strings.Count(rest, "@") > 1 || strings.Contains(path, "@") {
		return nil, errors.New("-postgres-url has an @ that must be written as %40, or a / before it as %2F")
	}
	pool, err := pgxpool.New(ctx, url)
	if err != nil {
		return nil, errors.New("-postgres-url cannot be read, must be like postgres://user:password@localhost:5432/database, or like host=localhost user=user password='password'")
	}
	closing.then(func(context.Context) error {
		pool.Close()
		return nil
	})
	return pool, nil
}

// changes returns an observer that logs changes of the failover's state, and not each event while a state lasts.
func changes(log *slog.Logger) func(failover.Event) {
	failing := false // the last flush to Postgres failed
	return func(e failover.Event) {
		switch e.Kind {
		case failover.PrimaryLost:
			log.Warn("Redis is lost, Postgres decides", "error", e.Err.Error())
		case failover.PrimaryBack:
			log.Info("Redis is back and decides")
		case failover.FlushFailed:
			if !failing {
				log.Warn("Postgres cannot be charged", "error", e.Err.Error(), "pending", e.Pending)
			}
			failing = true
		case failover.Flushed:
			if failing {
				log.Info("Postgres is charged again", "lag", e.Lag.String())
			}
			failing = false
		}
	}
}
