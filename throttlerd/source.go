// Where the rules come from.

package main

import (
	"context"
	"path/filepath"

	"github.com/go-throttler/throttler/rules"
	pgrules "github.com/go-throttler/throttler/rules/postgres"
)

// openSource opens the source that the flags name. A source that is also a rules.Store can be changed by the admin API.
// If it is empty at the start, the files of -rules are stored in it.
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

// seedOf returns the files of -rules, nil if there are none. Their names lose the folders, so two files of one name are
// an error.
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

// plant stores the files if the store has none: all of them or none. Half of the rules would limit half of what they
// should. If several processes do this at once, the files are those of one of them.
func plant(ctx context.Context, s rules.Store, seed []rules.File) error {
	had, err := s.Files(ctx)
	if err != nil || len(had) > 0 {
		return err
	}
	return s.Change(ctx, func(had []rules.File) ([]rules.File, error) {
		if len(had) > 0 {
			return had, nil
		}
		return seed, nil
	})
}
