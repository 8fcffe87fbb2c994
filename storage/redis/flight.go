package redis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

// The calls of one server wait for each other in a queue, and fly together.
type (
	queue = combine.Queue[query, answer]
	call  = combine.Call[query, answer]
)

// query is a decision, or a change of one identifier.
type query struct {
	key     string
	more    []string        // the keys of further parts
	request storage.Request // of a decision
	change  []byte          // what the script for changes is sent; nil for a decision
	rules   []storage.Rule  // of a change
}

// answer is what the script said to a query.
type answer struct {
	counts string // of a decision; its first byte is whether it was admitted
	at     int64  // when it arrived
}

// queue returns the queue for a key. It asks for the nodes of a cluster once, and the caller waits for that
// no longer than for a decision.
func (s *Storage) queue(ctx context.Context, key string) (*queue, error) {
	address := ""
	if s.cluster != nil {
		if err := s.know(ctx, key); err != nil {
			return nil, err
		}
		master, err := s.cluster.MasterForKey(ctx, key)
		if err != nil {
			return nil, s.unavailable(err)
		}
		address = master.Options().Addr
	}
	s.mu.RLock()
	q, closed := s.queues[address], s.closed
	s.mu.RUnlock()
	if q != nil || closed {
		return q, closedError(closed)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.queues[address] == nil && !s.closed {
		s.queues[address] = combine.New(combine.Options{Timeout: s.options.Timeout}, s.fly)
	}
	return s.queues[address], closedError(s.closed)
}

func closedError(closed bool) error {
	if closed {
		return storage.ErrClosed
	}
	return nil
}

// know makes the client learn the nodes of the cluster, which it does by itself from then on.
func (s *Storage) know(ctx context.Context, key string) error {
	if s.known.Load() {
		return nil
	}
	done := make(chan error, 1)
	go func() {
		limited, cancel := context.WithTimeout(context.Background(), s.options.Timeout)
		defer cancel()
		_, err := s.cluster.MasterForKey(limited, key)
		s.known.CompareAndSwap(false, err == nil)
		done <- err
	}()
	late := time.NewTimer(s.options.Timeout)
	defer late.Stop()
	select {
	case err := <-done:
		if err != nil {
			return s.unavailable(err)
		}
		return nil
	case <-ctx.Done():
		return ctx.Err()
	case <-late.C:
		return s.unavailable(combine.ErrTimeout)
	}
}

// tryAgainPause is how long the keys of a call get to arrive at one node.
const tryAgainPause = 2 * time.Millisecond

// ask sends a call and waits for its answer. TRYAGAIN says that the keys of one call are on their way
// from a node of the cluster to another, so that neither could run it.
func (s *Storage) ask(ctx context.Context, q *queue, c *call) error {
	begun := time.Now()
	err := q.Do(ctx, c)
	for goredis.IsTryAgainError(err) {
		if time.Since(begun)+tryAgainPause > s.options.Timeout {
			return err
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(tryAgainPause):
		}
		again := q.Get()
		again.Query = c.Query
		if err = q.Do(ctx, again); err == nil {
			c.Answer = again.Answer
		}
		q.Put(again)
	}
	if errors.Is(err, combine.ErrTimeout) {
		return s.unavailable(err)
	}
	return err
}

// fly executes a flight: all decisions in one script call and all changes in another. In a cluster each key
// has its own, and a pipeline them all: one call of several keys could be told to TRYAGAIN.
func (s *Storage) fly(ctx context.Context, flight []*call) {
	apart := func(a, b *call) int {
		if d := cmp.Compare(len(a.Query.change), 0) - cmp.Compare(len(b.Query.change), 0); d != 0 || s.cluster == nil {
			return d
		}
		return cmp.Compare(a.Query.key, b.Query.key)
	}
	slices.SortStableFunc(flight, apart)
	var groups []*group
	for begin := 0; begin < len(flight); begin += len(groups[len(groups)-1].calls) {
		end := begin + 1
		for end < len(flight) && apart(flight[begin], flight[end]) == 0 {
			end++
		}
		groups = append(groups, &group{calls: flight[begin:end]})
	}
	s.run(ctx, groups)
	at := storage.Monotonic()
	for _, g := range groups {
		if err := g.land(at); err != nil {
			err = s.unavailable(err)
			for _, c := range g.calls {
				c.Err = err
			}
		}
	}
}

// run sends each group's script call by its hash, and those of which the server does not have the script
// once more by its text.
func (s *Storage) run(ctx context.Context, groups []*group) {
	for _, g := range groups {
		g.command = g.script(ctx, false)
	}
	s.send(ctx, groups)
	unknown := slices.DeleteFunc(slices.Clone(groups), func(g *group) bool {
		return !goredis.HasErrorPrefix(g.command.Err(), "NOSCRIPT")
	})
	if len(unknown) > 0 {
		for _, g := range unknown {
			g.command = g.script(ctx, true)
		}
		s.send(ctx, unknown)
	}
}

// send leaves the answers and errors in the commands.
func (s *Storage) send(ctx context.Context, groups []*group) {
	if len(groups) == 1 {
		_ = s.client.Process(ctx, groups[0].command)
		return
	}
	pipe := s.client.Pipeline()
	for _, g := range groups {
		_ = pipe.Process(ctx, g.command)
	}
	_, _ = pipe.Exec(ctx)
}

// unavailable wraps the error of a round trip. The context of a flight is not the caller's, and must not
// look like it.
func (s *Storage) unavailable(err error) error {
	switch {
	case goredis.HasErrorPrefix(err, "CROSSSLOT"):
		return fmt.Errorf("%w: %w", ErrCrossSlot, err)
	case errors.Is(err, context.DeadlineExceeded), errors.Is(err, context.Canceled), errors.Is(err, combine.ErrTimeout):
		return fmt.Errorf("%w: no answer from Redis within %v", storage.ErrUnavailable, s.options.Timeout)
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}

// group is the calls that one script call answers.
type group struct {
	calls   []*call
	command command
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
	var all shapes
	for _, c := range g.calls {
		for i := range c.Query.request.Parts() {
			all.add(&c.Query.request, i)
		}
	}
	return decideScript.call(ctx, byText, keys, all.args()...)
}

// land gives each call its answer.
func (g *group) land(at int64) error {
	text, err := g.command.Text()
	if err != nil {
		return err
	}
	for _, c := range g.calls {
		n := 1
		if c.Query.change == nil && text != "" && text[0] <= admitted {
			n += countBytes[text[0]] * c.Query.buckets()
		}
		if text != "" && text[0] == tooMany {
			n = 2
		}
		if len(text) < n {
			return fmt.Errorf("the script's answer is %d bytes short", n-len(text))
		}
		c.Answer, c.Err = answer{text[:n], at}, c.Query.err(text[:n])
		text = text[n:]
	}
	return nil
}

// buckets is how many buckets the request has.
func (q *query) buckets() (n int) {
	for i := range q.request.Parts() {
		n += len(q.request.At(i).Rules)
	}
	return n
}

// err is the error that the answer to q means.
func (q *query) err(answer string) error {
	rules := q.rules
	if q.change == nil {
		rules = q.request.Part.Rules
	}
	switch answer[0] {
	case foreign:
		return fmt.Errorf("%w: the value is none of this package's, at the key %.99q%s", storage.ErrCorruptState, q.key, q.others())
	case wrongType:
		return fmt.Errorf("%w: %w, at the key %.99q%s", storage.ErrCorruptState, ErrWrongType, q.key, q.others())
	case tooMany:
		return storage.TooManyBuckets(rules, int(answer[1]))
	}
	return nil
}

func (q *query) others() string {
	if len(q.more) == 0 {
		return ""
	}
	return " or another of the call's"
}
