// Package postgres keeps files of rules in a table, which any number of processes share.
//
//	pool, err := pgxpool.New(ctx, "postgres://localhost/app")
//	table, err := pgrules.New(ctx, pool, nil)
//	engine, err := rules.NewEngine(t, table, nil)
//	err = table.Put(ctx, rules.File{Name: "api.yaml", Data: data}, "")
//
// Import it as pgrules. Each engine listens for changes (LISTEN, for which a connection besides the pool's stays open), and
// compares the table with what it has whenever it looks: so changes made by hand count as well, and notifications may be
// lost, as behind a PgBouncer that pools transactions.
package postgres

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgxpool"

	"github.com/go-throttler/throttler/rules"
)

// Defaults of Options.
const (
	DefaultTable   = "throttler_rules"
	DefaultTimeout = 2 * time.Second
)

// Options of a Table. The zero value and nil are the defaults.
type Options struct {
	// Schema is where the table is, by default the first of the search_path of the role. It is not created.
	Schema string

	// Table is its name, and that of the channel of notifications; by default DefaultTable.
	Table string

	// Timeout is the longest that a call takes, whatever its context allows; by default DefaultTimeout.
	Timeout time.Duration

	// NoSchema says that somebody else has executed Schema: New then creates nothing.
	NoSchema bool
}

// Table is a rules.Store and a rules.Watcher. It is made by New, and safe for concurrent use.
type Table struct {
	pool    *pgxpool.Pool
	options Options

	mu    sync.Mutex // guards what was read last, by one call at a time
	hash  string
	files []rules.File
}

// Schema returns the SQL that New executes: one table, for people who do that by migrations of their own. It may be
// executed any number of times.
func Schema(o *Options) string {
	return "CREATE TABLE IF NOT EXISTS " + o.withDefaults().table() + " (\n  name text PRIMARY KEY,\n  data text NOT NULL -- YAML or JSON\n)"
}

func (o *Options) withDefaults() Options {
	var out Options
	if o != nil {
		out = *o
	}
	out.Table, out.Timeout = cmp.Or(out.Table, DefaultTable), cmp.Or(out.Timeout, DefaultTimeout)
	return out
}

// table is its name, quoted.
func (o Options) table() string {
	if o.Schema == "" {
		return pgx.Identifier{o.Table}.Sanitize()
	}
	return pgx.Identifier{o.Schema, o.Table}.Sanitize()
}

// New makes the table, unless it is there or Options.NoSchema is set. The pool belongs to the caller, who closes it after
// the engines.
func New(ctx context.Context, pool *pgxpool.Pool, o *Options) (*Table, error) {
	t := &Table{pool: pool, options: o.withDefaults()}
	if pool == nil || t.options.Timeout < 0 {
		return nil, errors.New("rules: postgres: the pool must not be nil, and Options.Timeout not below 0")
	}
	if t.options.NoSchema {
		return t, nil
	}
	err := t.change(ctx, func(ctx context.Context, tx pgx.Tx) error {
		var there bool
		if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", t.options.table()).Scan(&there); there || err != nil {
			return err // a role that may not create tables need not
		}
		_, err := tx.Exec(ctx, Schema(&t.options))
		return err
	})
	return t, err
}

// change does something in a transaction, one at a time for all processes.
func (t *Table) change(ctx context.Context, do func(context.Context, pgx.Tx) error) error {
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	err := pgx.BeginFunc(ctx, t.pool, func(tx pgx.Tx) error {
		if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtext($1))", t.options.Table); err != nil {
			return err
		}
		return do(ctx, tx)
	})
	return wrap(err)
}

func wrap(err error) error {
	if err == nil || errors.Is(err, rules.ErrConflict) || errors.Is(err, rules.ErrNotFound) {
		return err
	}
	return fmt.Errorf("rules: postgres: %w", err)
}

// Files returns the files, sorted by name. What has not changed since the last call is not sent again.
func (t *Table) Files(ctx context.Context) ([]rules.File, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	rows, err := t.pool.Query(ctx, `
		SELECT f.hash, t.name, t.data
		FROM (SELECT md5(coalesce(string_agg(md5(name) || md5(data), '' ORDER BY name COLLATE "C"), '')) AS hash FROM `+t.options.table()+`) f
		LEFT JOIN `+t.options.table()+` t ON true
		WHERE f.hash <> $1
		ORDER BY t.name COLLATE "C"`, t.hash)
	if err != nil {
		return nil, wrap(err)
	}
	hash, files := t.hash, []rules.File{}
	var name, data *string
	_, err = pgx.ForEachRow(rows, []any{&hash, &name, &data}, func() error {
		if name != nil { // else the table is empty
			files = append(files, rules.File{Name: *name, Data: []byte(*data)})
		}
		return nil
	})
	if err != nil {
		return nil, wrap(err)
	}
	if hash != t.hash {
		t.hash, t.files = hash, files
	}
	return slices.Clone(t.files), nil
}

// Put is that of rules.Store. The data has to be UTF-8 without NUL.
func (t *Table) Put(ctx context.Context, f rules.File, ifMatch string) error {
	return t.change(ctx, func(ctx context.Context, tx pgx.Tx) error {
		had, err := t.find(ctx, tx, f.Name)
		if err != nil {
			return err
		}
		if err := had.Matches(ifMatch); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "INSERT INTO "+t.options.table()+" (name, data) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET data = excluded.data", f.Name, string(f.Data))
		return t.notified(ctx, tx, err)
	})
}

// Delete is that of rules.Store.
func (t *Table) Delete(ctx context.Context, name, ifMatch string) error {
	return t.change(ctx, func(ctx context.Context, tx pgx.Tx) error {
		had, err := t.find(ctx, tx, name)
		if err != nil {
			return err
		}
		if had == nil {
			return fmt.Errorf("%w: %q", rules.ErrNotFound, name)
		}
		if err := had.Matches(ifMatch); err != nil {
			return err
		}
		_, err = tx.Exec(ctx, "DELETE FROM "+t.options.table()+" WHERE name = $1", name)
		return t.notified(ctx, tx, err)
	})
}

// find is the file of this name, or nil.
func (t *Table) find(ctx context.Context, tx pgx.Tx, name string) (*rules.File, error) {
	var data string
	err := tx.QueryRow(ctx, "SELECT data FROM "+t.options.table()+" WHERE name = $1", name).Scan(&data)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil //nolint:nilnil // no file is no fault
	}
	return &rules.File{Name: name, Data: []byte(data)}, err
}

// notified tells who listens, if err is nil.
func (t *Table) notified(ctx context.Context, tx pgx.Tx, err error) error {
	if err == nil {
		_, err = tx.Exec(ctx, "SELECT pg_notify($1, '')", t.options.Table)
	}
	return err
}

const reconnect = 250 * time.Millisecond

// Watch is that of rules.Watcher. It connects again after each failure.
func (t *Table) Watch(ctx context.Context, changed func()) {
	for ctx.Err() == nil {
		_ = t.listen(ctx, changed) // whoever looks at the table is told what is wrong with it
		select {
		case <-time.After(reconnect):
		case <-ctx.Done():
		}
	}
}

// listen returns when the connection fails.
func (t *Table) listen(ctx context.Context, changed func()) error {
	connecting, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	conn, err := pgx.ConnectConfig(connecting, t.pool.Config().ConnConfig)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.WithoutCancel(ctx), t.options.Timeout)
		defer cancel()
		_ = conn.Close(closing)
	}()
	if _, err := conn.Exec(connecting, "LISTEN "+pgx.Identifier{t.options.Table}.Sanitize()); err != nil {
		return err
	}
	changed() // perhaps, before it listened
	for {
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return err
		}
		changed()
	}
}
