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

// The calls of one server wait for each other in a queue, and share batches.
type (
	queue = batch.Queue[query, answer]
	call  = batch.Call[query, answer]
)

// query is a decision, or a change of one identifier.
type query struct {
	key     string
	more    []string         // the keys of further parts
	request storage.Request  // of a decision; its identifiers are the caller's memory, and the keys are not
	fresh   bool             // a server that does not know the script is doubted
	since   int64            // states that were changed last before then (Monotonic) are doubted; 0: none is
	change  []byte           // what the script for changes is sent; nil for a decision
	rules   *storage.RuleSet // of a change
}

// answer is what the script said to a query.
type answer struct {
	text string // its first byte is what became of it
	real int64  // the server's time of a decision
	at   int64  // when it arrived
}

// ask sends a query to the server that has its key, and waits for the answer. The caller puts the call back
// into the queue, if there is one.
func (s *Storage) ask(ctx context.Context, asked query) (q *queue, c *call, err error) {
	if s.cluster == nil {
		if q, err = s.queue(""); err == nil {
			c = q.Get()
			c.Query = asked
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
		switch {
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

// tryAgainPause is how long the keys of a call get to arrive at one node.
const tryAgainPause = 2 * time.Millisecond

// askCluster asks again as long as it is told to TRYAGAIN: the keys of the call are on their way from one
// node to another, so that neither could run it.
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

// unsent is the error of a call for which the client has no node.
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

// know makes the client learn the nodes of the cluster, which it goes on to do by itself.
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

// learning is one try to learn the nodes, which takes as long as the client takes to ask one after the other.
type learning struct {
	done chan struct{}
	err  error
}

func (s *Storage) learn(l *learning, key string) {
	inTime := func() bool { return false }
	if s.report != nil {
		ctx, cancel := context.WithTimeout(context.Background(), s.options.Timeout)
		defer cancel()
		inTime = s.watch(ctx)
	}
	defer func() {
		if fault := recover(); fault != nil { // in what the client calls, such as its Dialer
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
	defer s.probeLater(time.Minute, s.cluster.Options().Addrs...)() // for all calls that wait for this
	if _, err := s.cluster.MasterForKey(context.Background(), key); err != nil {
		l.err = s.unavailable(err)
	} else {
		s.refused.Store(nil)
	}
}

func (s *Storage) closedError() error {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return storage.ErrClosed
	}
	return nil
}

// queue returns the queue of the server with an address, which is empty when there is only one.
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

// sendBatch executes a batch, and tells who watches how it went.
func (s *Storage) sendBatch(ctx context.Context, calls []*call) { s.sendBy(ctx, s.client, calls) }

// sendInline is sendBatch in the goroutine of a caller.
func (s *Storage) sendInline(ctx context.Context, calls []*call) { s.sendBy(ctx, s.prompt, calls) }

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

// errPanicked is reported of a batch in which something did that the client calls, such as a hook.
var errPanicked = fmt.Errorf("%w: panic", storage.ErrUnavailable)

// execute makes all decisions of a batch in one script call and all changes in another. In a cluster every key is its
// own script call and all are pipelined, because a call of several keys can fail with TRYAGAIN. The error is one of the
// server, not of single keys.
func (s *Storage) execute(ctx context.Context, by goredis.UniversalClient, calls []*call) (failed error) {
	groups := s.groups(calls)
	s.run(ctx, by, groups)
	if s.cluster == nil && slices.ContainsFunc(groups, crossed) {
		s.byKey.Store(true) // a node of a cluster, or a proxy before one, that looks like a single server
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

// overdue is the end of the batch's context in place of the error of a socket that it has ended.
func overdue(ctx context.Context, err error) error {
	if end, ok := ctx.Deadline(); ok && errors.Is(err, os.ErrDeadlineExceeded) && !time.Now().Before(end) {
		return context.DeadlineExceeded
	}
	return err
}

// crossed says that the server refused a group because its calls are of different slots.
func crossed(g *group) bool {
	return len(g.calls) > 1 && goredis.HasErrorPrefix(g.command.Err(), "CROSSSLOT")
}

// groups sorts the calls and divides them into script calls.
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

// run sends each group's script call by its hash, and those of which the server does not have the script
// once more by its text, but for the calls that doubt such a server.
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

// send leaves the answers and errors in the commands.
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

// unavailable wraps the error of a round trip. The context of a batch is not the caller's, and must not
// look like it. A server that does not know AUTH repeats what it was sent, with the password.
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

// group is the calls that one script call answers.
type group struct {
	calls   []*call
	decider *script
	command command
}

// dropDoubtful answers the calls that doubt a server without the script, and returns how many others are left.
func (g *group) dropDoubtful() int {
	var left []*call // and not in place: the batch has the calls in the same array
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

// answer gives each call its answer.
func (g *group) answer(at int64) error {
	if len(g.calls) == 0 { // it answered all by itself
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

// answerBytes is the length of the answer to q with which text begins, and more than text has if that is none.
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

// valuesBytes is answerBytes of a decision whose answer is the values that were there.
func (q *query) valuesBytes(text string) int {
	n := 1
	for _, p := range q.request.Parts {
		n += plainBytes(text[min(n, len(text)):], p.Rules)
	}
	return n
}

// changeBytes is answerBytes of a change.
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

// err is the error that the answer to q means.
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

func (q *query) others() string {
	if len(q.more) == 0 {
		return ""
	}
	return " or another of the call's"
}
