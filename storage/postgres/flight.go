package postgres

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/jackc/pgx/v5"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/go-throttler/throttler/internal/combine"
	"github.com/go-throttler/throttler/storage"
)

type call = combine.Call[query, answer]

// query is a decision, or a change of one identifier.
type query struct {
	id      []byte
	request storage.Request // of a decision
	change  *change         // nil for a decision
}

// change is what happens to one identifier. The numbers are those of throttler_change_1.
type change struct {
	what    int32
	sent    int64
	rules   []storage.Rule
	amounts [][]storage.Amount // of each rule
}

const (
	whatCharge = iota
	whatRaise
	whatReset
)

// answer is what the function said to a query.
type answer struct {
	code   int64
	counts []int64 // three for each bucket
	at     int64   // when it arrived
}

// The codes of throttler_judge_1.
const (
	admitted = 1
	corrupt  = 2
	tooMany  = 256 // and the number of buckets
)

func (a *answer) fill(v *storage.Verdict) {
	v.Allowed = a.code == admitted
	for i := 0; 3*i < len(a.counts); i++ {
		v.Set(i, storage.Count{Remaining: a.counts[3*i], ResetAfter: a.counts[3*i+1], RetryAfter: a.counts[3*i+2]})
	}
}

func (q *query) err(code int64) error {
	part := int(code / 65536)
	code %= 65536
	switch {
	case code >= tooMany && q.change != nil:
		return storage.TooManyBuckets(q.change.rules, int(code-tooMany))
	case code >= tooMany:
		return storage.TooManyBuckets(q.request.At(part).Rules, int(code-tooMany))
	case code == corrupt:
		return fmt.Errorf("%w: the row is none of this package's, or one of a later version, id %.99q", storage.ErrCorruptState, q.id)
	}
	return nil
}

// rules are the buckets of shapes, as the functions take them.
type rules struct {
	starts     []int32
	names      []string
	laws       []int64
	capacities []int64
	costs      []int64
}

func (r *rules) begin() { r.starts = append(r.starts, int32(len(r.names))) }

func (r *rules) add(rule *storage.Rule, cost int64) {
	r.names = append(r.names, rule.Name)
	r.laws = append(r.laws, int64(rule.Kind), rule.Period, rule.Refill, rule.Tick, rule.Grain)
	r.capacities = append(r.capacities, rule.Capacity)
	r.costs = append(r.costs, min(cost, 4*rule.Capacity))
}

func (r *rules) addPart(p *storage.Part) {
	r.begin()
	for i := range p.Rules {
		r.add(&p.Rules[i], p.Cost(i))
	}
}

// decide executes a flight of requests of one identifier each.
func (s *Storage) decide(ctx context.Context, flight []*call) {
	slices.SortStableFunc(flight, func(a, b *call) int { return bytes.Compare(a.Query.id, b.Query.id) })
	var all combine.Shapes
	var ids [][]byte
	var firsts, lasts, index []int32
	for i, c := range flight {
		if i == 0 || !bytes.Equal(c.Query.id, ids[len(ids)-1]) {
			ids, firsts, lasts = append(ids, c.Query.id), append(firsts, int32(i+1)), append(lasts, 0)
		}
		lasts[len(lasts)-1] = int32(i + 1)
		all.Add(&c.Query.request, 0)
		index = append(index, int32(all.Index[i]+1))
	}
	var r rules
	var modes []int32
	var times []int64
	for i := range all.All {
		w := &all.All[i]
		modes, times = append(modes, int32(w.Mode)), append(times, sent(w.Clocked, w.Now))
		r.addPart(w.Part)
	}
	r.begin()
	defer s.swept(len(ids), &flight[len(flight)-1].Query)
	s.fly(ctx, flight, s.names.decide, ids, firsts, lasts, index, r.starts, modes, times, r.names, r.laws, r.capacities, r.costs)
}

// decideAll executes a flight of one request.
func (s *Storage) decideAll(ctx context.Context, flight []*call) {
	request := &flight[0].Query.request
	var ids [][]byte
	var r rules
	for i := range request.Parts() {
		ids = append(ids, rowID(request.Name, request.At(i).Identifier))
		r.addPart(request.At(i))
	}
	r.begin()
	s.fly(ctx, flight, s.names.decideAll, ids, r.starts, int32(request.Mode), sent(request.Clocked, request.Now), r.names, r.laws, r.capacities, r.costs)
}

// change executes a flight of changes.
func (s *Storage) change(ctx context.Context, flight []*call) {
	slices.SortStableFunc(flight, func(a, b *call) int { return bytes.Compare(a.Query.id, b.Query.id) })
	var ids [][]byte
	var whats, starts []int32
	var times, ns, ins []int64
	var r rules
	for _, c := range flight {
		d := c.Query.change
		ids, whats, times = append(ids, c.Query.id), append(whats, d.what), append(times, d.sent)
		r.begin()
		for i := range d.rules {
			r.add(&d.rules[i], 0)
			starts = append(starts, int32(len(ns)))
			for _, a := range d.amounts[i] {
				a = a.Clamp()
				ns, ins = append(ns, a.N), append(ins, a.In)
			}
		}
	}
	r.begin()
	starts = append(starts, int32(len(ns)))
	s.fly(ctx, flight, s.names.change, ids, whats, times, r.starts, r.names, r.laws, r.capacities, starts, ns, ins)
}

// fly calls a function and gives the calls of a flight their answers.
func (s *Storage) fly(ctx context.Context, flight []*call, function string, args ...any) {
	numbers, err := s.send(ctx, function, args)
	for again := 0; again < 2 && rolledBack(err); again++ {
		numbers, err = s.send(ctx, function, args)
	}
	at := storage.Monotonic()
	for _, c := range flight {
		if err != nil {
			c.Err = s.unavailable(err)
			continue
		}
		n := 1
		if c.Query.change == nil {
			n += 3 * c.Query.buckets()
		}
		if len(numbers) < n {
			c.Err = s.unavailable(fmt.Errorf("the answer is %d numbers short", n-len(numbers)))
			continue
		}
		c.Answer, c.Err = answer{numbers[0], numbers[1:n], at}, c.Query.err(numbers[0])
		numbers = numbers[n:]
	}
}

func (q *query) buckets() (n int) {
	for i := range q.request.Parts() {
		n += len(q.request.At(i).Rules)
	}
	return n
}

// rolledBack tells of a deadlock or a serialization failure, after which nothing has happened.
func rolledBack(err error) bool {
	var e *pgconn.PgError
	return errors.As(err, &e) && (e.Code == "40P01" || e.Code == "40001")
}

// send calls the function in a transaction of its own, which a pipeline without BEGIN is until its end. The
// server gives up before the context does, as pgx closes the connection when that ends.
func (s *Storage) send(ctx context.Context, function string, args []any) (numbers []int64, err error) {
	deadline, _ := ctx.Deadline()
	left := time.Until(deadline) - 5*time.Millisecond
	if left < time.Millisecond {
		return nil, context.DeadlineExceeded
	}
	ms := fmt.Sprint(left.Milliseconds(), "ms")
	b := &pgx.Batch{}
	b.Queue("SET TRANSACTION ISOLATION LEVEL READ COMMITTED")
	b.Queue("SELECT set_config('statement_timeout', $1, true), set_config('lock_timeout', $1, true), CASE WHEN $2 <> '' THEN set_config('synchronous_commit', $2, true) END", ms, s.options.SynchronousCommit)
	b.Queue(function, args...).QueryRow(func(row pgx.Row) error { return row.Scan(&numbers) })
	err = s.pool.SendBatch(ctx, b).Close()
	return numbers, err
}

// unavailable wraps the error of a round trip. The context of a flight is not the caller's, and must not
// look like it.
func (s *Storage) unavailable(err error) error {
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.Is(err, combine.ErrTimeout) {
		return fmt.Errorf("%w: no answer from Postgres within %v", storage.ErrUnavailable, s.options.Timeout)
	}
	return fmt.Errorf("%w: %w", storage.ErrUnavailable, err)
}
