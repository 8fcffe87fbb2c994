// Package postgres keeps files of rules in a table that any number of processes share.
//
//	pool, err := pgxpool.New(ctx, "postgres://localhost/app")
//	table, err := pgrules.New(ctx, pool, nil)
//	engine, err := rules.NewEngine(t, table, nil)
//	err = table.Put(ctx, rules.File{Name: "api.yaml", Data: data}, "")
//
// Import it as pgrules. Each engine listens for changes with LISTEN, which keeps one connection open besides those of the
// pool. Whenever an engine looks, it compares the table with the files it has. Changes made by hand are therefore found
// as well, and notifications may be lost, as behind a PgBouncer that pools transactions.
package postgres

import (
	"bytes"
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

// maxTable is the most bytes that Postgres takes as the name of a channel.
const maxTable = 63

// unnamed has each statement sent without a name, whatever the mode of the pool. A PgBouncer that pools transactions may
// give the next one a connection to the server on which a name does not exist.
const unnamed = pgx.QueryExecModeExec

// Options are the options of a Table. The zero value and nil mean the defaults.
type Options struct {
	// Schema is the schema of the table, by default the first in the search_path of the role. It is not created.
	Schema string

	// Table is the name of the table and of the notification channel, by default DefaultTable. It has at most 63 bytes.
	Table string

	// Timeout bounds each call, whatever its context allows; by default it is DefaultTimeout. It must not be below 0. Of
	// Change it bounds what Postgres does, but neither edit nor the wait for other changes.
	Timeout time.Duration

	// NoSchema says that the SQL of Schema is executed elsewhere: New then creates nothing.
	NoSchema bool
}

// Table is a rules.Store and a rules.Watcher. New makes one. It is safe for concurrent use.
type Table struct {
	pool    *pgxpool.Pool
	options Options

	mu    sync.Mutex // guards the files that were read last, and their hash
	hash  string
	files []rules.File
}

// Schema returns the SQL that New executes, for people who run their own migrations. It creates one table and may be
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

// table returns the quoted name of the table.
func (o Options) table() string {
	if o.Schema == "" {
		return pgx.Identifier{o.Table}.Sanitize()
	}
	return pgx.Identifier{o.Schema, o.Table}.Sanitize()
}

// New creates the table, unless it exists or Options.NoSchema is set. The pool belongs to the caller, who closes it after
// the engines.
func New(ctx context.Context, pool *pgxpool.Pool, o *Options) (*Table, error) {
	t := &Table{pool: pool, options: o.withDefaults()}
	if pool == nil || t.options.Timeout < 0 {
		return nil, errors.New("rules: postgres: the pool must not be nil, and Options.Timeout not below 0")
	}
	if n := len(t.options.Table); n > maxTable {
		return nil, fmt.Errorf("rules: postgres: Options.Table has %d bytes, must have at most %d", n, maxTable)
	}
	if t.options.NoSchema {
		return t, nil
	}
	err := t.change(ctx, func(ctx context.Context, tx pgx.Tx) error {
		var there bool
		if err := tx.QueryRow(ctx, "SELECT to_regclass($1) IS NOT NULL", unnamed, t.options.table()).Scan(&there); there || err != nil {
			return err // if the table exists, the role needs no right to create it
		}
		_, err := tx.Exec(ctx, Schema(&t.options))
		return err
	})
	return t, err
}

// change runs do in a transaction. An advisory lock lets only one change run at a time, over all processes. Without it,
// two processes could both pass the check of ifMatch before either writes.
func (t *Table) change(ctx context.Context, do func(context.Context, pgx.Tx) error) error {
	return wrap(t.inTime(ctx, func(ctx context.Context) error {
		return t.locked(ctx, func(tx pgx.Tx) error { return do(ctx, tx) })
	}))
}

// locked runs do in a transaction that holds the lock. The statements after the lock see what the change before has
// written, which they would not if the default of the role were a stricter isolation.
func (t *Table) locked(ctx context.Context, do func(pgx.Tx) error) error {
	var tx pgx.Tx
	if err := t.inTime(ctx, func(ctx context.Context) (err error) {
		tx, err = t.pool.BeginTx(ctx, pgx.TxOptions{IsoLevel: pgx.ReadCommitted})
		return err
	}); err != nil {
		return err
	}
	defer func() { _ = t.inTime(ctx, tx.Rollback) }() // does nothing after the Commit
	if _, err := tx.Exec(ctx, "SELECT pg_advisory_xact_lock(hashtext($1))", unnamed, t.options.Table); err != nil {
		return err
	}
	if err := do(tx); err != nil {
		return err
	}
	return t.inTime(ctx, tx.Commit)
}

// inTime calls do with a context that ends after Options.Timeout.
func (t *Table) inTime(ctx context.Context, do func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	return do(ctx)
}

func wrap(err error) error {
	if err == nil || errors.Is(err, rules.ErrConflict) || errors.Is(err, rules.ErrNotFound) {
		return err
	}
	return fmt.Errorf("rules: postgres: %w", err)
}

// Files returns the files, sorted by name. Postgres sends them only if they have changed since the last call: the query
// compares a hash of the table with that of the last result. It is SHA-256, as servers in FIPS mode have no md5.
func (t *Table) Files(ctx context.Context) ([]rules.File, error) {
	t.mu.Lock()
	hash, files := t.hash, t.files
	t.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	rows, err := t.pool.Query(ctx, `
		SELECT f.hash, t.name, t.data
		FROM (
			SELECT encode(sha256(coalesce(string_agg(sha256(convert_to(name, 'UTF8')) || sha256(convert_to(data, 'UTF8')), '' ORDER BY name COLLATE "C"), '')), 'hex') AS hash
			FROM `+t.options.table()+`
		) f
		LEFT JOIN `+t.options.table()+` t ON true
		WHERE f.hash <> $1
		ORDER BY t.name COLLATE "C"`, unnamed, hash)
	if err != nil {
		return nil, wrap(err)
	}
	var name, data *string
	changed := false
	_, err = pgx.ForEachRow(rows, []any{&hash, &name, &data}, func() error {
		if !changed {
			changed, files = true, []rules.File{}
		}
		if name != nil { // otherwise the table is empty
			files = append(files, rules.File{Name: *name, Data: []byte(*data)})
		}
		return nil
	})
	if err != nil {
		return nil, wrap(err)
	}
	if changed { // another call may have read newer ones; then the next call reads them again
		t.mu.Lock()
		t.hash, t.files = hash, files
		t.mu.Unlock()
	}
	return slices.Clone(files), nil
}

// Put implements rules.Store. The data must be UTF-8 without NUL.
func (t *Table) Put(ctx context.Context, f rules.File, ifMatch string) error {
	return t.change(ctx, func(ctx context.Context, tx pgx.Tx) error {
		had, err := t.find(ctx, tx, f.Name)
		if err != nil {
			return err
		}
		if err := had.Matches(ifMatch); err != nil {
			return err
		}
		return t.notified(ctx, tx, t.put(ctx, tx, f))
	})
}

// Delete implements rules.Store.
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
		return t.notified(ctx, tx, t.remove(ctx, tx, name))
	})
}

// Change implements rules.Store, over all processes.
func (t *Table) Change(ctx context.Context, edit func([]rules.File) ([]rules.File, error)) error {
	var refused error // by edit
	err := t.locked(ctx, func(tx pgx.Tx) error {
		before, err := t.all(ctx, tx)
		if err != nil {
			return err
		}
		after, err := edit(slices.Clone(before))
		if err != nil {
			refused = err
			return err
		}
		return t.write(ctx, tx, before, after)
	})
	if refused != nil {
		return refused
	}
	return wrap(err)
}

// all reads the files.
func (t *Table) all(ctx context.Context, tx pgx.Tx) (files []rules.File, err error) {
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	rows, err := tx.Query(ctx, "SELECT name, data FROM "+t.options.table()+` ORDER BY name COLLATE "C"`, unnamed)
	if err != nil {
		return nil, err
	}
	var name, data string
	_, err = pgx.ForEachRow(rows, []any{&name, &data}, func() error {
		files = append(files, rules.File{Name: name, Data: []byte(data)})
		return nil
	})
	return files, err
}

// write stores how the files differ from before.
func (t *Table) write(ctx context.Context, tx pgx.Tx, before, after []rules.File) (err error) {
	ctx, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	had, changes := map[string]*rules.File{}, 0
	for i := range before {
		had[before[i].Name] = &before[i]
	}
	for _, f := range after {
		if old := had[f.Name]; err == nil && (old == nil || !bytes.Equal(old.Data, f.Data)) {
			err = t.put(ctx, tx, f)
			changes++
		}
		delete(had, f.Name)
	}
	for name := range had {
		if err == nil {
			err = t.remove(ctx, tx, name)
			changes++
		}
	}
	if err != nil || changes == 0 {
		return err
	}
	return t.notified(ctx, tx, nil)
}

func (t *Table) put(ctx context.Context, tx pgx.Tx, f rules.File) error {
	_, err := tx.Exec(ctx, "INSERT INTO "+t.options.table()+" (name, data) VALUES ($1, $2) ON CONFLICT (name) DO UPDATE SET data = excluded.data", unnamed, f.Name, string(f.Data))
	return err
}

func (t *Table) remove(ctx context.Context, tx pgx.Tx, name string) error {
	_, err := tx.Exec(ctx, "DELETE FROM "+t.options.table()+" WHERE name = $1", unnamed, name)
	return err
}

// find returns the file of this name, or nil.
func (t *Table) find(ctx context.Context, tx pgx.Tx, name string) (*rules.File, error) {
	var data string
	err := tx.QueryRow(ctx, "SELECT data FROM "+t.options.table()+" WHERE name = $1", unnamed, name).Scan(&data)
	if errors.Is(err, pgx.ErrNoRows) {
		return nil, nil //nolint:nilnil // no file is no fault
	}
	return &rules.File{Name: name, Data: []byte(data)}, err
}

// notified notifies the listeners when the transaction commits, unless err is set.
func (t *Table) notified(ctx context.Context, tx pgx.Tx, err error) error {
	if err == nil {
		_, err = tx.Exec(ctx, "SELECT pg_notify($1, '')", unnamed, t.options.Table)
	}
	return err
}

// The pause before Watch connects again doubles with each failure. Some servers, such as a standby, refuse LISTEN for
// ever.
const (
	firstPause   = 250 * time.Millisecond
	longestPause = 8 * time.Second
)

// Watch implements rules.Watcher. It connects again after each failure.
func (t *Table) Watch(ctx context.Context, changed func()) {
	for pause := firstPause; ctx.Err() == nil; pause = min(2*pause, longestPause) {
		// The next call of Files reports what is wrong.
		_ = t.listen(ctx, func() {
			pause = firstPause
			changed()
		})
		select {
		case <-time.After(pause):
		case <-ctx.Done():
		}
	}
}

// listen calls changed when it has begun, and after each notification. It returns when the connection fails.
func (t *Table) listen(ctx context.Context, changed func()) error {
	connecting, cancel := context.WithTimeout(ctx, t.options.Timeout)
	defer cancel()
	config := t.pool.Config()
	if config.BeforeConnect != nil { // it may set a password that changes
		if err := config.BeforeConnect(connecting, config.ConnConfig); err != nil {
			return err
		}
	}
	conn, err := pgx.ConnectConfig(connecting, config.ConnConfig)
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
	changed() // there may have been changes before LISTEN
	for {
		if _, err := conn.WaitForNotification(ctx); err != nil {
			return err
		}
		changed()
	}
}
