package main

import (
	"context"
	"strings"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage/lease"
	pgstore "github.com/go-throttler/throttler/storage/postgres"
)

// leased compares leases with the shared storage alone: for hot, warm and cold identifiers whose calls are admitted, and for a
// hot one whose calls are denied. Its turns are longer than others, because an identifier is leased only after several calls
// in a tenth of a second.
func (b *bench) leased(ctx context.Context) error {
	if err := b.leasedFrom(ctx, "Redis", startRedis, throttlerOnRedis); err != nil {
		return err
	}
	return b.leasedFrom(ctx, "Postgres", startPostgres, func(url string) func() (throttler.Config, func(), error) {
		return throttlerOnPostgres(url, pgstore.Options{TablePrefix: "logged"})
	})
}

// leasedFrom does this on one kind of server.
func (b *bench) leasedFrom(ctx context.Context, kind string, start func(context.Context) (*server, error),
	plain func(url string) func() (throttler.Config, func(), error)) error {
	name := "lease-" + strings.ToLower(kind)
	admitted := b.wanted(name, []crowd{{1, 1}, {1, 64}, {1000, 1}, {1000, 64}, {100_000, 1}, {100_000, 64}})
	denied := b.wanted(name+"-refused", []crowd{{1, 1}, {1, 64}})
	if len(admitted)+len(denied) == 0 {
		return nil
	}
	s, err := start(ctx)
	if err != nil {
		return err
	}
	defer s.close()
	all := []contender{us("throttler, leases", withLeases(plain(s.url))), us("throttler, "+kind+" alone", named("alone", plain(s.url)))}
	if len(admitted) > 0 {
		results, err := b.onServer(ctx, name, all, admitted, plenty(2, 1e8), 3*b.d, s.used, nothing)
		if err != nil {
			return err
		}
		checks, err := checkAll(ctx, all, 10)
		if err != nil {
			return err
		}
		b.report.server("Leases on "+kind, s.version, results, checks)
	}
	if len(denied) > 0 {
		for i := range all {
			all[i] = refusing(all[i])
		}
		results, err := b.onServer(ctx, name+"-refused", all, denied, tight(2), 3*b.d, s.used, nothing)
		if err != nil {
			return err
		}
		b.report.printf("### One hot identifier on %s, refused\n\n", kind)
		for _, one := range results {
			b.report.crowd(one, nil)
		}
	}
	return nil
}

// withLeases puts a lease storage in front of a storage. It uses another Name than the storage alone.
func withLeases(plain func() (throttler.Config, func(), error)) func() (throttler.Config, func(), error) {
	return func() (throttler.Config, func(), error) {
		config, done, err := plain()
		if err != nil {
			return config, done, err
		}
		store, err := lease.New(config.Storage, nil)
		if err != nil {
			done()
			return config, nil, err
		}
		config.Name, config.Storage = "ahead", store
		return config, func() { _ = store.Close(context.Background()); done() }, nil
	}
}

// named sets a Name, so that the contender's tokens are counted separately. It is as long as that of the leases, so that the
// keys have the same length.
func named(name string, plain func() (throttler.Config, func(), error)) func() (throttler.Config, func(), error) {
	return func() (throttler.Config, func(), error) {
		config, done, err := plain()
		config.Name = name
		return config, done, err
	}
}

// refusing returns a contender whose calls have to be denied.
func refusing(c contender) contender {
	return contender{name: c.name, module: c.module, open: func(l []limit) (allow, func(), error) {
		a, done, err := c.open(l)
		return func(id string) (bool, error) {
			ok, err := a(id)
			return !ok, err
		}, done, err
	}}
}
