// The admin API and its page. They have their own listener and their own token; without a token they do not exist.

package main

import (
	"cmp"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"maps"
	"net/http"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"
	"unicode/utf8"

	"github.com/go-throttler/throttler/rules"
	"github.com/go-throttler/throttler/watch"
)

const maxRules = 8 << 20 // bytes of one file

// changeLasts bounds a change, with the wait for others. The largest files take some seconds to compile.
const changeLasts = time.Minute

// admin is the admin API. newAdmin makes one; it serves requests only after serves was called.
type admin struct {
	engine   *rules.Engine
	source   rules.Source
	store    rules.Store // nil if the rules cannot be changed through the API
	token    [sha256.Size]byte
	sessions sessions
	log      *slog.Logger
	activity *activity

	live  *watch.Watch
	ended context.Context //nolint:containedctx // of all who look at the live page
	leave func()          // cancels ended

	changing sync.Mutex // so that of all changes that wait for the store only one takes a connection
}

func newAdmin(token string, log *slog.Logger, activity *activity, live *watch.Watch) *admin {
	a := &admin{token: sha256.Sum256([]byte(token)), log: log, activity: activity, live: live}
	a.ended, a.leave = context.WithCancel(context.Background())
	return a
}

// serves sets the rules that the API shows and changes.
func (a *admin) serves(e *rules.Engine, s rules.Source) {
	a.engine, a.source = e, s
	a.store, _ = s.(rules.Store)
}

func (a *admin) handler() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/rules", taking(a.list))
	mux.HandleFunc("GET /v1/rules/{name}", taking(a.read))
	mux.HandleFunc("PUT /v1/rules/{name}", taking(a.put, "dry-run"))
	mux.HandleFunc("PATCH /v1/rules/{name}", taking(a.patch, "dry-run"))
	mux.HandleFunc("DELETE /v1/rules/{name}", taking(a.remove, "dry-run"))
	mux.HandleFunc("GET /v1/match", taking(a.match, "domain", "entry"))
	mux.HandleFunc("GET /v1/levels", taking(a.levels, "domain", "entry"))
	mux.HandleFunc("DELETE /v1/levels", taking(a.reset, "domain", "entry"))
	mux.HandleFunc("GET /{$}", a.page)
	mux.HandleFunc("GET /page/rules", a.pageRules)
	mux.HandleFunc("GET /page/match", a.pageMatch)
	mux.HandleFunc("/debug/throttler/", a.watch)
	mux.HandleFunc("POST /logout", a.logout)
	anybody := http.NewServeMux()
	anybody.HandleFunc("GET /login", func(w http.ResponseWriter, _ *http.Request) { writePage(w, "login", http.StatusOK, "") })
	anybody.HandleFunc("POST /login", a.login)
	anybody.Handle("/", a.guarded(mux))
	return a.sameOrigin(anybody)
}

// taking refuses requests with any other parameter than those. Without it a change with ?dryrun would be made, and a
// reset with ?entries= would be of other entries than those that were meant.
func taking(h http.HandlerFunc, parameters ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if _, err := once(r.URL.RawQuery, parameters...); err != nil {
			problem(w, http.StatusBadRequest, err.Error())
			return
		}
		h(w, r)
	}
}

// once parses a query that has no other parameters than those, and each at most once but for "entry".
func once(raw string, parameters ...string) (url.Values, error) {
	query, err := url.ParseQuery(raw)
	if err != nil {
		return nil, malformed("the query cannot be read: in a value & is written %%26, ; is %%3B and %% is %%25")
	}
	for _, name := range slices.Sorted(maps.Keys(query)) {
		if !slices.Contains(parameters, name) {
			return nil, malformed("the parameter %.64q is unknown here, must be %s", name, cmp.Or(strings.Join(parameters, " or "), "left out"))
		}
		if n := len(query[name]); n > 1 && name != "entry" {
			return nil, malformed("the parameter %q is given %d times", name, n)
		}
	}
	return query, nil
}

// sameOrigin rejects requests that a page of another origin makes a browser send. Another port of this host is another
// origin.
func (a *admin) sameOrigin(h http.Handler) http.Handler {
	p := http.NewCrossOriginProtection()
	p.SetDenyHandler(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		a.audit(r, "refused", slog.String("path", r.URL.EscapedPath()), slog.String("origin", r.Header.Get("Origin")))
		problem(w, http.StatusForbidden, "a page of another origin may not send this")
	}))
	return p.Handler(h)
}

// guarded checks the token before it looks at anything else, in a time that does not depend on the token. A browser that
// asks for a page without a token is redirected to /login.
func (a *admin) guarded(h http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Cache-Control", "no-store")
		switch {
		case a.knows(r):
			h.ServeHTTP(w, r)
		case r.Method == http.MethodGet && r.Header.Get("Authorization") == "" && strings.Contains(r.Header.Get("Accept"), "text/html"):
			http.Redirect(w, r, "/login", http.StatusSeeOther)
		default:
			a.audit(r, "refused", slog.String("path", r.URL.EscapedPath()))
			w.Header().Set("WWW-Authenticate", `Bearer realm="throttlerd"`)
			problem(w, http.StatusUnauthorized, "the admin API needs its token: Authorization: Bearer …")
		}
	})
}

// watch serves the live page. Its stream never ends by itself, so it is cancelled at shutdown, which it would delay
// otherwise.
func (a *admin) watch(w http.ResponseWriter, r *http.Request) {
	ctx, cancel := context.WithCancel(r.Context())
	defer cancel()
	defer context.AfterFunc(a.ended, cancel)()
	a.live.ServeHTTP(w, r.WithContext(ctx))
}

// audit logs a change, a login, or an attempt that was rejected.
func (a *admin) audit(r *http.Request, did string, more ...slog.Attr) {
	all := append([]slog.Attr{slog.String("did", did), slog.String("method", r.Method), slog.String("from", r.RemoteAddr)}, more...)
	a.log.LogAttrs(r.Context(), slog.LevelInfo, "audit", all...)
}

// named describes a file.
type named struct {
	Name string `json:"name"`
	ETag string `json:"etag"`
	Data string `json:"data,omitempty"`
}

// list is GET /v1/rules: all files of the source, and whether these are the rules in force.
func (a *admin) list(w http.ResponseWriter, r *http.Request) {
	files, err := a.source.Files(r.Context())
	if err != nil {
		a.failed(w, err)
		return
	}
	out := struct {
		Files    []named `json:"files"`
		Writable bool    `json:"writable"`
		Counts   string  `json:"counts"`          // the ETag of the rules in force
		Error    string  `json:"error,omitempty"` // why newer ones are not in force
	}{Files: []named{}, Writable: a.store != nil, Counts: a.engine.Rules().ETag()}
	for _, f := range files {
		out.Files = append(out.Files, named{Name: f.Name, ETag: f.ETag()})
	}
	if err := a.engine.Err(); err != nil {
		out.Error = err.Error()
	}
	respond(w, http.StatusOK, out)
}

func respond(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	w.WriteHeader(status)
	writeJSON(w, v)
}

// read is GET /v1/rules/{name}: the file, unchanged.
func (a *admin) read(w http.ResponseWriter, r *http.Request) {
	files, err := a.source.Files(r.Context())
	if err != nil {
		a.failed(w, err)
		return
	}
	i := find(files, r.PathValue("name"))
	if i < 0 {
		problem(w, http.StatusNotFound, rules.ErrNotFound.Error())
		return
	}
	w.Header().Set("ETag", quote(files[i].ETag()))
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.Header().Set("X-Content-Type-Options", "nosniff")
	_, _ = w.Write(files[i].Data)
}

func find(files []rules.File, name string) int {
	for i := range files {
		if files[i].Name == name {
			return i
		}
	}
	return -1
}

func quote(tag string) string { return `"` + tag + `"` }

// precondition is the version of a file that a change is of.
type precondition struct {
	tag    string // its ETag, "" for any
	absent bool   // there must be no such file
}

var errThere = errors.New("there is a file of this name already")

func (p precondition) check(before *rules.File) error {
	switch {
	case p.absent && before != nil:
		return errThere
	case p.tag != "" && (before == nil || before.ETag() != p.tag):
		return rules.ErrConflict
	}
	return nil
}

// condition reads the precondition. It is required: a change without one could undo somebody else's change. If the header
// fields are missing or wrong, condition answers the request and returns false.
func condition(w http.ResponseWriter, r *http.Request) (p precondition, ok bool) {
	match, none := r.Header.Get("If-Match"), r.Header.Get("If-None-Match")
	tag := strings.Trim(match, `"`)
	switch {
	case len(r.Header.Values("If-Match")) > 1 || len(r.Header.Values("If-None-Match")) > 1:
		problem(w, http.StatusBadRequest, "If-Match or If-None-Match stands there twice")
	case match == "*" && none == "":
		return precondition{}, true
	case match == "" && none == "*":
		return precondition{absent: true}, true
	case none == "" && tag != "" && match == quote(tag) && !strings.Contains(tag, `"`):
		return precondition{tag: tag}, true
	case match == "" && none == "":
		problem(w, http.StatusPreconditionRequired, `say If-Match: "the ETag that you have read", If-None-Match: * for a new file, or If-Match: * to change it whatever it is`)
	default:
		problem(w, http.StatusBadRequest, `If-Match must be * or one ETag in quotes, and If-None-Match *; not both`)
	}
	return precondition{}, false
}

// bodyOf reads the body of a change. If that fails, it answers the request and returns false.
func bodyOf(w http.ResponseWriter, r *http.Request) ([]byte, bool) {
	data, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxRules))
	if tooLarge := (*http.MaxBytesError)(nil); errors.As(err, &tooLarge) {
		problem(w, http.StatusRequestEntityTooLarge, fmt.Sprintf("the body is too large, must have at most %d bytes", maxRules))
	} else if err != nil {
		problem(w, http.StatusBadRequest, "the body did not arrive as a whole")
	}
	return data, err == nil
}

// put is PUT /v1/rules/{name}. With ?dry-run it checks the file and changes nothing.
func (a *admin) put(w http.ResponseWriter, r *http.Request) {
	data, ok := bodyOf(w, r)
	if !ok {
		return
	}
	name := r.PathValue("name")
	if len(name) > 255 || !utf8.ValidString(name) || strings.ContainsFunc(name, func(c rune) bool { return c < ' ' || c == '\x7f' }) {
		problem(w, http.StatusBadRequest, "the name must be UTF-8 of at most 255 bytes, without control characters")
		return
	}
	a.change(w, r, func(*rules.File) (*rules.File, error) { return &rules.File{Name: name, Data: data}, nil })
}

// patch is PATCH /v1/rules/{name}: some rules of the file change. With ?dry-run it checks the file and changes nothing.
func (a *admin) patch(w http.ResponseWriter, r *http.Request) {
	patch, ok := bodyOf(w, r)
	if !ok {
		return
	}
	a.change(w, r, func(before *rules.File) (*rules.File, error) {
		if before == nil {
			return nil, rules.ErrNotFound
		}
		f, err := rules.Patch(*before, patch)
		return &f, err
	})
}

// remove is DELETE /v1/rules/{name}. With ?dry-run it checks the remaining files and changes nothing.
func (a *admin) remove(w http.ResponseWriter, r *http.Request) {
	a.change(w, r, func(before *rules.File) (*rules.File, error) {
		if before == nil {
			return nil, rules.ErrNotFound
		}
		return nil, nil //nolint:nilnil // no file is what is left
	})
}

// change stores what edit makes of the file that the path names, or deletes that file if this is nil. It does so only if
// all files together compile afterwards. The store lets no other process change a file meanwhile: two changes, each
// valid, could be faulty together.
func (a *admin) change(w http.ResponseWriter, r *http.Request, edit func(before *rules.File) (after *rules.File, err error)) {
	c := &change{name: r.PathValue("name"), edit: edit}
	dry, ok := dryRun(w, r)
	if !ok {
		return
	}
	if a.store == nil && !dry {
		problem(w, http.StatusConflict, "the rules are files: change those, or start with -source postgres or memory")
		return
	}
	of, ok := condition(w, r)
	if !ok {
		return
	}
	c.of = of
	ctx, cancel := begun(w, r)
	defer cancel()
	err := a.changed(ctx, c, dry)
	if !dry && c.set != nil {
		did := "changed"
		if err != nil {
			did = "perhaps changed" // the store failed, perhaps after it had stored the change
		}
		a.audit(r, did, slog.String("file", c.name), slog.String("before", tagOf(c.before)), slog.String("after", tagOf(c.after)))
	}
	if err != nil {
		a.failed(w, err)
		return
	}
	if !dry {
		_ = a.engine.Reload(ctx) // so that the change is in force before the answer; OnLoad logs errors
	}
	if c.after != nil {
		w.Header().Set("ETag", quote(c.after.ETag()))
	}
	respond(w, http.StatusOK, map[string]any{"changed": !dry, "rules": len(c.set.Rules()), "domains": c.set.Domains()})
}

// dryRun reports whether the change is only to be checked: ?dry-run, or ?dry-run=true. A value that is neither true nor false
// is refused, because a change that was meant as a check must not be made.
func dryRun(w http.ResponseWriter, r *http.Request) (dry, ok bool) {
	value := r.URL.Query().Get("dry-run")
	if value == "" {
		return r.URL.Query().Has("dry-run"), true
	}
	dry, err := strconv.ParseBool(value)
	if err != nil {
		problem(w, http.StatusBadRequest, fmt.Sprintf("dry-run is %.64q, must be true or false", value))
	}
	return dry, err == nil
}

// begun returns the context of a change. It does not end when the client leaves: what is stored then would not be in the
// audit, and might not be in force. The answer may come later than others, which have the WriteTimeout of the server.
func begun(w http.ResponseWriter, r *http.Request) (context.Context, context.CancelFunc) {
	const answers = 10 * time.Second
	_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(changeLasts + answers)) // fails only in tests without a connection
	return context.WithTimeout(context.WithoutCancel(r.Context()), changeLasts)
}

func tagOf(f *rules.File) string {
	if f == nil {
		return rules.Absent
	}
	return f.ETag()
}

// changed makes the change, or only checks it.
func (a *admin) changed(ctx context.Context, c *change, dry bool) error {
	if dry {
		files, err := a.source.Files(ctx)
		if err == nil {
			_, err = c.apply(files)
		}
		return err
	}
	a.changing.Lock()
	defer a.changing.Unlock()
	return a.store.Change(ctx, c.apply)
}

// change is a change of one file.
type change struct {
	name string
	of   precondition
	edit func(before *rules.File) (after *rules.File, err error)

	before, after *rules.File // nil: there is none
	set           *rules.Set  // of all files after the change; nil if apply has found a fault
}

// apply returns the files after the change. It looks at the precondition first: of another version than the client has
// read, the faults would tell it nothing.
func (c *change) apply(files []rules.File) (all []rules.File, err error) {
	for i := range files {
		if files[i].Name == c.name {
			c.before = &files[i]
		} else {
			all = append(all, files[i])
		}
	}
	if err = c.of.check(c.before); err != nil {
		return nil, err
	}
	if c.after, err = c.edit(c.before); err != nil {
		return nil, err
	}
	if c.after != nil {
		all = append(all, *c.after)
	}
	c.set, err = rules.Compile(all...)
	return all, err
}

// failed answers an error. Faulty rules are answered with all of their faults.
func (a *admin) failed(w http.ResponseWriter, err error) {
	var wrong rules.Faults
	switch {
	case errors.As(err, &wrong):
		respond(w, http.StatusUnprocessableEntity, map[string]any{"title": "the rules are wrong", "status": http.StatusUnprocessableEntity, "faults": wrong})
	case errors.Is(err, errThere):
		problem(w, http.StatusPreconditionFailed, errThere.Error())
	case errors.Is(err, rules.ErrConflict):
		problem(w, http.StatusPreconditionFailed, rules.ErrConflict.Error())
	case errors.Is(err, rules.ErrNotFound):
		problem(w, http.StatusNotFound, rules.ErrNotFound.Error())
	default:
		a.log.Error("the admin API failed", "error", err.Error())
		problem(w, http.StatusServiceUnavailable, "the source of the rules, or the storage, failed: the log says why")
	}
}

// asked reads ?domain= and any number of ?entry=key=value. If one is wrong, or the domain has no rules, it answers the
// request and returns false.
func (a *admin) asked(w http.ResponseWriter, r *http.Request) (domain string, entries []rules.Entry, ok bool) {
	query := r.URL.Query()
	entries, err := entriesOf(query["entry"])
	if err != nil {
		problem(w, http.StatusBadRequest, err.Error())
		return "", nil, false
	}
	if err := hasRules(a.engine.Rules(), query.Get("domain")); err != nil {
		problem(w, http.StatusNotFound, err.Error())
		return "", nil, false
	}
	return query.Get("domain"), entries, true
}

// match is GET /v1/match: which rules apply to entries, and why the others do not.
func (a *admin) match(w http.ResponseWriter, r *http.Request) {
	domain, entries, ok := a.asked(w, r)
	if !ok {
		return
	}
	type explained struct {
		Rule    string `json:"rule"`
		File    string `json:"file"`
		Line    int    `json:"line"`
		Applies bool   `json:"applies"`
		Why     string `json:"why,omitempty"`
	}
	out := []explained{}
	for _, x := range a.engine.Rules().Explain(domain, entries) {
		out = append(out, explained{x.Rule.ID, x.Rule.File, x.Rule.Line, x.Applies, x.Why})
	}
	respond(w, http.StatusOK, map[string]any{"rules": out})
}

// levels is GET /v1/levels: what the rules that apply to entries have left for them.
func (a *admin) levels(w http.ResponseWriter, r *http.Request) {
	domain, entries, ok := a.asked(w, r)
	if !ok {
		return
	}
	d := &decision{}
	d.v, d.applied, d.err = a.engine.Decide(r.Context(), rules.Request{Domain: domain, Mode: rules.Peek, Entries: entries, Cost: new(int64(0))})
	if d.err != nil {
		a.undecided(w, d.err)
		return
	}
	respond(w, http.StatusOK, map[string]any{"rules": d.body().Rules})
}

// reset is DELETE /v1/levels: it clears what the rules that apply to entries have counted for them.
func (a *admin) reset(w http.ResponseWriter, r *http.Request) {
	domain, entries, ok := a.asked(w, r)
	if !ok {
		return
	}
	if len(a.engine.Rules().Match(domain, entries)) == 0 {
		problem(w, http.StatusNotFound, "no rule applies to these entries: GET /v1/match says why")
		return
	}
	ctx, cancel := begun(w, r)
	defer cancel()
	err := a.engine.Reset(ctx, rules.Request{Domain: domain, Entries: entries})
	if err != nil {
		a.undecided(w, err)
		return
	}
	a.audit(r, "reset", slog.String("domain", domain), slog.Any("entries", entries))
	w.WriteHeader(http.StatusNoContent)
}

// undecided answers an error of a decision.
func (a *admin) undecided(w http.ResponseWriter, err error) {
	status := statusOf(err, http.StatusBadRequest)
	if status >= http.StatusInternalServerError {
		a.log.Error("the admin API failed", "error", err.Error())
	}
	problem(w, status, title(err))
}
