// Where the rules are.

package main

import (
	"context"
	"errors"
	"path/filepath"

	"github.com/go-throttler/throttler/rules"
	pgrules "github.com/go-throttler/throttler/rules/postgres"
)

// openSource opens the source of the flags. One that is a rules.Store can be changed by the admin API; while it is empty
// it gets the files of -rules.
func openSource(ctx context.Context, c *config, closing *closing) (rules.Source, error) {
	files := rules.Files(c.rules...)
	if c.source == "files" {
		return files, nil
	}
	seed, err := seedOf(ctx, c, files)
	if err != nil {
		return nil, err
	}
	if c.source == "memory" {
		return rules.NewMemory(seed...), nil
	}
	pool, err := newPool(ctx, c.postgresURL, closing)
	if err != nil {
		return nil, err
	}
	table, err := pgrules.New(ctx, pool, nil)
	if err != nil {
		return nil, err
	}
	return table, plant(ctx, table, seed)
}

// seedOf is the files of -rules, if there are any, without their folders.
func seedOf(ctx context.Context, c *config, files rules.Source) ([]rules.File, error) {
	if len(c.rules) == 0 {
		return nil, nil
	}
	seed, err := files.Files(ctx)
	if err != nil {
		return nil, err
	}
	if _, err := rules.Compile(seed...); err != nil {
		return nil, err
	}
	names := map[string]string{}
	for i := range seed {
		name := filepath.Base(seed[i].Name)
		if other := names[name]; other != "" {
			return nil, usage("-rules has two files %s, %s and %s: a store knows them by that name", name, other, seed[i].Name)
		}
		names[name], seed[i].Name = seed[i].Name, name
	}
	return seed, nil
}

// plant puts files into a store that has none. Of several processes that do so at once each file is that of one.
func plant(ctx context.Context, s rules.Store, seed []rules.File) error {
	had, err := s.Files(ctx)
	if err != nil || len(had) > 0 {
		return err
	}
	for _, f := range seed {
		if err := s.Put(ctx, f, rules.Absent); err != nil && !errors.Is(err, rules.ErrConflict) {
			return err
		}
	}
	return nil
}
