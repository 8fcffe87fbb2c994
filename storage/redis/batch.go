package redis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/batch"
	"github.com/go-throttler/throttler/internal/law"
	"github.com/go-throttler/throttler/storage"
)

// The calls to one server go through one queue and share its batches.
type (
	queue = batch.Queue[query, answer]
	call  = batch.Call[query, answer]
)

// query is a decision, or a change of one identifier.
//
// A batch may read a query after the caller has left. The caller may then reuse the memory of its identifiers, so the
// keys are copies and the identifiers in request are never read.
type query struct {
	key     string
	more    []string         // the keys of the parts after the first
	request storage.Request  // of a decision
	fresh   bool             // a DecideFresh: never send it the text of the script
	since   int64            // states last changed then or before (law.Monotonic) are in doubt; 0 doubts none
	change  []byte           // the argument for the script of changes; nil for a decision
	rules   *storage.RuleSet // of a change
}

// answer is the script's answer to a query.
type answer struct {
	text string // its first byte is the outcome, such as admitted
	real int64  // the server's time in µs, of a decision; 0 if the script did not need it
	at   int64  // when the batch was answered (law.Monotonic)
}

// ask sends a query to the server of its key and waits for the answer. If c is not nil the caller must Put it into q,
// even after an error.
func (s *Storage) ask(ctx context.Context, asked query) (q *queue, c *call, err error) {
	if s.cluster == nil {
		if q, err = s.queue(""); err == nil {
			c = q.Get()
			c.Query = asked
			// The context cannot end before the answer comes, so the caller may wait for the socket itself.
			if ctx.Done() == nil && s.prompt != nil && s.well.Load() {
				err = q.DoInline(ctx, c, s.sendInline)
			} else {
				err = q.Do(ctx, c)
			}
		}
	} else {
		limited, cancel := context.WithTimeout(ctx, s.options.Timeout)
		defer cancel()
		q, c, err = s.askCluster(limited, asked)
		switch { // the end of limited is the caller's only if the caller's own context ended
		case err == nil || limited.Err() == nil:
		case ctx.Err() != nil:
			err = ctx.Err()
		case errors.Is(err, limited.Err()):
			err = batch.ErrTimeout
		}
	}
	if errors.Is(err, batch.ErrTimeout) {
		err = s.unavailable(err)
	}
	return q, c, err
}

// tryAgainPause is the pause before a call that failed with TRYAGAIN is sent again.
const tryAgainPause = 2 * time.Millisecond

// askCluster asks the node of the query's key. While the answer is TRYAGAIN it asks again: the keys of the call are
// moving between two nodes, and neither node has them all. When ctx ends, the error is the last TRYAGAIN.
func (s *Storage) askCluster(ctx context.Context, asked query) (*queue, *call, error) {
	if err := s.know(ctx, asked.key); err != nil {
		return nil, nil, err
	}
	var again error
	for {
		master, err := s.cluster.MasterForKey(ctx, asked.key)
		if err != nil {
			return nil, nil, s.unsent(err)
		}
		q, err := s.queue(master.Options().Addr)
		if err != nil {
			return nil, nil, err
		}
		c := q.Get()
		c.Query = asked
		err = q.Do(ctx, c)
		switch {
		case goredis.IsTryAgainError(err):
			again = err
		case err != nil && again != nil && ctx.Err() != nil:
			return q, c, again
		default:
			return q, c, err
		}
		select {
		case <-ctx.Done():
			return q, c, again
		case <-time.After(tryAgainPause):
			q.Put(c)
		}
	}
}

// unsent returns and reports the error of a call for which the client knows no node. No batch will report it.
func (s *Storage) unsent(err error) error {
	if err := s.closedError(); err != nil {
		return err
	}
	err = s.unavailable(err)
	if s.report != nil {
		s.report(err)
	}
	return err
}

// know waits until the client has learned the nodes of the cluster for the first time; later it keeps them up to date
// itself. Concurrent calls wait for one attempt, which goes on when they leave: it may take longer than their time.
func (s *Storage) know(ctx context.Context, key string) error {
	if s.known.Load() {
		return nil
	}
	if err := s.closedError(); err != nil {
		return err
	}
	s.mu.Lock()
	l := s.learning
	if l == nil {
		l = &learning{done: make(chan struct{})}
		s.learning, s.begun = l, true
		go s.learn(l, key)
	}
	s.mu.Unlock()
	select {
	case <-l.done:
		return l.err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// learning is one attempt to learn the nodes. It takes as long as the client takes to ask them one after the other.
type learning struct {
	done chan struct{} // closed when err is set
	err  error
}

// learn makes the attempt l. It has no context, because its callers may leave one by one. A watched storage reports the
// attempt as overdue when the timeout has passed, or else its error; a success is not reported.
func (s *Storage) learn(l *learning, key string) {
	inTime := func() bool { return false }
	if s.report != nil {
		ctx, cancel := context.WithTimeout(context.Background(), s.options.Timeout)
		defer cancel()
		inTime = s.watch(ctx)
	}
	defer func() {
		if fault := recover(); fault != nil { // of a function that the client calls, such as its Dialer
			l.err = s.unavailable(fmt.Errorf("panic: %v", fault))
		}
		if inTime() && l.err != nil && s.closedError() == nil {
			s.report(l.err)
		}
		s.known.Store(l.err == nil)
		s.mu.Lock()
		s.learning = nil
		s.mu.Unlock()
		close(l.done)
	}()
	s.refused.Store(nil)
	// One probe serves all calls that wait for this attempt, however long it takes: hence the minute.
	defer s.probeLater(time.Minute, s.cluster.Options().Addrs...)()
	if _, err := s.cluster.MasterForKey(context.Background(), key); err != nil {
		l.err = s.unavailable(err)
	} else {
		s.refused.Store(nil)
	}
}

// closedError returns ErrClosed if the storage is closed.
func (s *Storage) closedError() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return storage.ErrClosed
	}
	return nil
}

// queue returns the queue of a server and makes it if it is missing. The address is "" without a cluster.
func (s *Storage) queue(address string) (*queue, error) {
	s.mu.RLock()
	q, closed := s.queues[address], s.closed
	s.mu.RUnlock()
	if closed {
		return nil, storage.ErrClosed
	}
	if q != nil {
		return q, nil
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return nil, storage.ErrClosed
	}
	s.begun = true
	if s.queues[address] == nil {
		s.queues[address] = batch.New(batch.Options{Timeout: s.options.Timeout}, s.sendTo(address))
	}
	return s.queues[address], nil
}

// sendBatch executes a batch and reports the outcome if the storage is watched.
func (s *Storage) sendBatch(ctx context.Context, calls []*call) { s.sendBy(ctx, s.client, calls) }

// sendInline is sendBatch in the goroutine of a caller.
func (s *Storage) sendInline(ctx context.Context, calls []*call) { s.sendBy(ctx, s.prompt, calls) }

// sendBy is sendBatch through a client. The outcome is errPanicked until execute returns.
func (s *Storage) sendBy(ctx context.Context, by goredis.UniversalClient, calls []*call) {
	inTime, err := func() bool { return false }, errPanicked
	if s.report != nil {
		inTime = s.watch(ctx)
	}
	defer func() {
		s.well.Store(err == nil)
		if inTime() {
			s.report(err)
		}
	}()
	err = s.execute(ctx, by, calls)
}

// errPanicked is reported if a function that the client calls, such as a hook, panicked during a batch.
var errPanicked = fmt.Errorf("%w: panic", storage.ErrUnavailable)

// execute makes all decisions of a batch in one script call and all changes in another. In a cluster every key gets its
// own script call and all are pipelined, because a script call of several keys can fail with TRYAGAIN.
//
// It sets the Answer or Err of every call. The error returned is the first that concerns the server; CROSSSLOT and
// TRYAGAIN concern single keys.
func (s *Storage) execute(ctx context.Context, by goredis.UniversalClient, calls []*call) (failed error) {
	groups := s.groups(calls)
	s.run(ctx, by, groups)
	if s.cluster == nil && slices.ContainsFunc(groups, crossed) {
		// A plain client talks to a node of a cluster, or to a proxy in front of one. From now on each key gets a
		// script call of its own. The refused groups ran nothing, so they are divided and sent again.
		s.byKey.Store(true)
		again := slices.DeleteFunc(slices.Clone(groups), func(g *group) bool { return !crossed(g) })
		groups = slices.DeleteFunc(groups, crossed)
		for _, g := range again {
			split := s.groups(g.calls)
			s.run(ctx, by, split)
			groups = append(groups, split...)
		}
	}
	at := law.Monotonic()
	for _, g := range groups {
		if err := g.answer(at); err != nil {
			err = s.unavailable(overdue(ctx, err))
			for _, c := range g.calls {
				c.Err = err
			}
			if !errors.Is(err, ErrCrossSlot) && !goredis.IsTryAgainError(err) {
				failed = cmp.Or(failed, err)
			}
		}
	}
	return failed
}

// overdue replaces the timeout of a socket by context.DeadlineExceeded if the deadline of the batch has passed: the
// client derives the socket's deadline from that of the context.
func overdue(ctx context.Context, err error) error {
	if end, ok := ctx.Deadline(); ok && errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(end) {
		return context.DeadlineExceeded
	}
	return err
}

// crossed reports whether the server refused a group because its calls have keys in different slots. A single call
// cannot be divided, so it keeps its error.
func crossed(g *group) bool {
	return len(g.calls) > 1 && goredis.HasErrorPrefix(g.command.Err(), "CROSSSLOT")
}

// groups sorts the calls and divides them into script calls: decisions and changes, and of these one group for each key
// if keys need calls of their own. The sort is stable, so calls of one key stay in the order of their arrival.
func (s *Storage) groups(calls []*call) (groups []*group) {
	byKey := s.cluster != nil || s.byKey.Load()
	apart := func(a, b *call) int {
		if d := cmp.Compare(len(a.Query.change), 0) - cmp.Compare(len(b.Query.change), 0); d != 0 || !byKey {
			return d
		}
		return cmp.Compare(a.Query.key, b.Query.key)
	}
	slices.SortStableFunc(calls, apart)
	for begin := 0; begin < len(calls); begin += len(groups[len(groups)-1].calls) {
		end := begin + 1
		for end < len(calls) && apart(calls[begin], calls[end]) == 0 {
			end++
		}
		groups = append(groups, &group{calls: calls[begin:end], decider: s.decider})
	}
	return groups
}

// run sends each group's script call by its hash. If the server does not have a script, nothing ran, and the group is
// sent again with the text of the script. Calls of DecideFresh are not: for them a missing script is the answer.
func (s *Storage) run(ctx context.Context, by goredis.UniversalClient, groups []*group) {
	for _, g := range groups {
		g.command = g.script(ctx, false)
	}
	send(ctx, by, groups)
	unknown := slices.DeleteFunc(slices.Clone(groups), func(g *group) bool {
		return !goredis.HasErrorPrefix(g.command.Err(), "NOSCRIPT") || g.dropDoubtful() == 0
	})
	if len(unknown) > 0 {
		for _, g := range unknown {
			g.command = g.script(ctx, true)
		}
		send(ctx, by, unknown)
	}
}

// send makes one round trip for all groups. It returns nothing: each command keeps its answer or error.
func send(ctx context.Context, by goredis.UniversalClient, groups []*group) {
	if len(groups) == 1 {
		_ = by.Process(ctx, groups[0].command)
		return
	}
	pipe := by.Pipeline()
	for _, g := range groups {
		_ = pipe.Process(ctx, g.command)
	}
	_, _ = pipe.Exec(ctx)
}

// unavailable wraps the error of a round trip in ErrUnavailable, or in ErrCrossSlot.
//
// It hides the context errors of a batch, as callers would take them for the end of their own context. It also cuts off
// the arguments that a server without AUTH repeats in its error: the password is one of them.
func (s *Storage) unavailable(err error) error {
	if text, _, echoed := strings.Cut(err.Error(), ", with args beginning with"); echoed {
		err = errors.New(text)
	}
	switch {
	case goredis.HasErrorPrefix(err, "CROSSSLOT"):
		return fmt.Errorf("%w: %w", ErrCrossSlot, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, batch.ErrTimeout):
		err = fmt.Errorf("%w: no answer from Redis within %v", storage.ErrUnavailable, s.options.Timeout)
		if r := s.refused.Load(); r != nil && time.Now().Before(r.until) {
			err = fmt.Errorf("%w: %w", err, r.err)
		}
		return err
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}

// group is the calls that share one script call.
type group struct {
	calls   []*call
	decider *script
	command command
}

// dropDoubtful ends the calls of DecideFresh in a group whose script is missing with ErrRestarted. It returns how many
// calls are left.
func (g *group) dropDoubtful() int {
	var left []*call // a new array: the batch still needs all calls in the old one, to wake their callers
	for _, c := range g.calls {
		if c.Query.fresh {
			c.Err = ErrRestarted
		} else {
			left = append(left, c)
		}
	}
	g.calls = left
	return len(left)
}

// script returns the script call of the group.
func (g *group) script(ctx context.Context, byText bool) command {
	keys := make([]string, 0, len(g.calls))
	for _, c := range g.calls {
		keys = append(append(keys, c.Query.key), c.Query.more...)
	}
	if g.calls[0].Query.change != nil {
		var all []byte
		for _, c := range g.calls {
			all = append(all, c.Query.change...)
		}
		return changeScript.call(ctx, byText, keys, all)
	}
	var parts shapes
	for _, c := range g.calls {
		parts.add(&c.Query)
	}
	return g.decider.call(ctx, byText, keys, decideArgs(&parts)...)
}

// answer divides the script's answer among the calls. An answer that does not fit the calls exactly is an error, so
// that no call gets a part that belongs to another.
func (g *group) answer(at int64) error {
	if len(g.calls) == 0 { // dropDoubtful has ended them all
		return nil
	}
	text, err := g.command.Text()
	if err != nil {
		return err
	}
	real := int64(0)
	if g.calls[0].Query.change == nil {
		if len(text) < 7 {
			return fmt.Errorf("this is no answer of the script: %.99q", text)
		}
		real, text = integer(text), text[7:]
	}
	for _, c := range g.calls {
		n := c.Query.answerBytes(text)
		if n > len(text) {
			return fmt.Errorf("this is no answer of the script: %.99q", text)
		}
		c.Answer, c.Err = answer{text[:n], real, at}, c.Query.err(text[:n])
		text = text[n:]
	}
	if text != "" {
		return fmt.Errorf("the script's answer has %d bytes too many", len(text))
	}
	return nil
}

// answerBytes returns the length of the answer to q at the beginning of text. If text does not begin with a possible
// answer, the result is larger than len(text).
func (q *query) answerBytes(text string) int {
	none := len(text) + 1
	if text == "" || text[0] > admittedValues {
		return none
	}
	switch first := text[0]; {
	case q.change != nil:
		return q.changeBytes(text)
	case first <= admitted:
		return 1 + countBytes*len(q.request.Costs)
	case first >= refusedValues:
		return q.valuesBytes(text)
	case first == tooMany:
		return 3
	case first == tooManyHolds || first == stale && q.since == 0:
		return none
	}
	return 1
}

// valuesBytes is answerBytes for a decision that was answered with the stored values.
func (q *query) valuesBytes(text string) int {
	n := 1
	for _, p := range q.request.Parts {
		n += plainBytes(text[min(n, len(text)):], p.Rules)
	}
	return n
}

// changeBytes is answerBytes for a change.
func (q *query) changeBytes(text string) int {
	none := len(text) + 1
	switch first := text[0]; {
	case first == refused || first >= stale:
		return none
	case first == tooMany:
		return 2
	case first != admitted || q.change[0]%isClocked != opDebt:
		return 1
	}
	n := 1
	for range q.rules.Rules {
		if n+2 > len(text) {
			return none
		}
		n += 2 + amountBytes*amounts(text[n:])
	}
	return n
}

// err returns the error that the answer to q stands for, or nil.
func (q *query) err(answer string) error {
	switch answer[0] {
	case foreign:
		return fmt.Errorf("%w: the value is none of this package's, at the key %.99q%s", storage.ErrCorruptState, q.key, q.others())
	case wrongType:
		return fmt.Errorf("%w: %w, at the key %.99q%s", storage.ErrCorruptState, ErrWrongType, q.key, q.others())
	case tooMany:
		rules := q.rules
		if q.change == nil {
			rules = q.request.Parts[answer[2]].Rules
		}
		return storage.TooManyBuckets(rules, int(answer[1]))
	case stale:
		return ErrStale
	case tooManyHolds:
		return &storage.BucketError{Bucket: q.rules.Rules[0].Name, Field: "Buckets", Reason: "of the identifier: one would hold amounts of over 65,000 different times"}
	}
	return nil
}

// others completes an error of a call of several keys: the script does not say which of them it means.
func (q *query) others() string {
	if len(q.more) == 0 {
		return ""
	}
	return " or another of the call's"
}
