// Package redis keeps consumption in Redis or Valkey, where any number of processes share it.
//
// A decision is one call of a Lua script: one round trip, atomic, by the clock of the server unless one
// is injected. Concurrent decisions of one process share round trips, and none waits for company.
// Each identifier is one key with one value, which expires soon after its buckets are full.
//
//	client := goredis.NewClient(&goredis.Options{Addr: "localhost:6379"})
//	store, err := redisstore.New(client, nil)
//	t, err := throttler.New(throttler.Config{Storage: store})
//
// Import it as redisstore: the plain name is that of go-redis.
package redis

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	goredis "github.com/redis/go-redis/v9"

	"github.com/go-throttler/throttler/internal/replica"
	"github.com/go-throttler/throttler/storage"
)

// Source is what Verdict.Source says of this storage's answers.
const Source = "redis"

// Defaults of Options. A packet that was lost is sent again after 200 ms, the shortest retransmission
// timeout of Linux: the timeout outlasts one loss, and not much more.
const (
	DefaultPrefix  = "throttler:"
	DefaultTimeout = 250 * time.Millisecond
)

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// Prefix is what all keys begin with, by default DefaultPrefix. After it come the throttler's
	// Config.Name, a colon and the identifier. If that has a brace, {} is put before it, so that users
	// cannot choose the slots of their keys. If it has a NUL, such as those of the routes of throttlerhttp, a tag is,
	// which puts it into the slot of what stands before the NUL. A Prefix with a tag in braces decides the slot of
	// all; one whose braces are empty or not closed has no such tag, and ConsumeAll finds it in two slots. Of two
	// prefixes in one Redis neither may begin with the other.
	Prefix string

	// Timeout is the longest that a call takes, whatever its context allows; by default DefaultTimeout.
	Timeout time.Duration

	// HashTag returns the part of an identifier that decides its slot in a cluster, for example its
	// tenant. ConsumeAll needs it there: it takes identifiers of one slot only. Of one with a NUL it is given what
	// stands before that. The tag
	// stands in braces after the prefix, so all processes must use the same function, and one that
	// changes makes other keys. It must be safe for concurrent use.
	HashTag func(identifier string) string
}

// OptionError is a fault in what New, Open or Watch was given.
type OptionError struct {
	Field  string // Client, URL, Timeout or Watch
	Reason string // what was given and what is allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: redis: %s %s", e.Field, e.Reason)
}

// What the functions of go-redis for errors (IsOOMError, IsReadOnlyError, IsLoadingError, IsAuthError,
// IsClusterDownError and others) do not recognise.
var (
	// ErrWrongType comes with ErrCorruptState: at the key is something that is not a string.
	ErrWrongType = errors.New("WRONGTYPE: the key holds no string")

	// ErrCrossSlot is for a call whose identifiers are in different slots of a cluster. Nothing was executed.
	ErrCrossSlot = errors.New("throttler: redis: CROSSSLOT")

	// ErrStale is for a DecideFresh whose server may have forgotten what was spent. Nothing was executed.
	ErrStale = errors.New("throttler: redis: stale state")

	// ErrRestarted is an ErrStale, as the server does not know the script.
	ErrRestarted = fmt.Errorf("%w: the server has lost its scripts", ErrStale)
)

// Storage is safe for concurrent use. It is made by New or Open.
//
// A call sends its script once, and again only after an answer which says that nothing ran
// (NOSCRIPT, MOVED, ASK, TRYAGAIN). When the answer is lost it may have been executed, once.
//
// A timeout wraps ErrUnavailable. An error reply wraps ErrUnavailable and the reply, except CROSSSLOT, which becomes
// ErrCrossSlot.
type Storage struct {
	client  goredis.UniversalClient
	cluster *goredis.ClusterClient // client, if it is one
	owned   bool                   // Close closes client
	options Options
	decider *script         // for decisions
	report  func(err error) // what Watch was given, or nil

	// prompt is client for the goroutine of a call: whatever it waits for ends with the context of the command. Nil if
	// there is none. A connection that takes longer would never be made by it, so a batch that failed is followed by
	// one that has a goroutine of its own, and as much time as the client's timeouts allow.
	prompt *goredis.Client
	well   atomic.Bool // the last batch did not fail

	known atomic.Bool // the cluster's nodes have been asked for
	byKey atomic.Bool // a single server has refused keys of different slots

	refused atomic.Pointer[refusal] // what a probe has found

	mu       sync.RWMutex // guards what follows
	learning *learning
	queues   map[string]*queue // by the address of the server, "" when there is no cluster
	begun    bool              // there was a call
	closed   bool
}

var _ replica.Storage = (*Storage)(nil)

// New returns a storage on a *Client, also one of NewFailoverClient, or on a *ClusterClient. The caller
// closes the client, after the storage.
//
// The client's DialerRetries should be 1, so that a refused connection is an error at once, and its
// timeouts at most Options.Timeout: calls return in time whatever they are, but a connection that is
// stuck is of no use until they have passed. Its ConnMaxIdleTime should be a few minutes, as what is between
// may forget an idle connection. Open sets them. MaxRetries does not matter: the scripts are never retried.
//
// New sends nothing, and Redis need not be there. All faults of its arguments are joined, each an *OptionError.
func New(client goredis.UniversalClient, o *Options) (*Storage, error) {
	s := &Storage{client: client, decider: decideScript, queues: make(map[string]*queue)}
	if o != nil {
		s.options = *o
	}
	s.options.Prefix = cmp.Or(s.options.Prefix, DefaultPrefix)
	s.options.Timeout = cmp.Or(s.options.Timeout, DefaultTimeout)
	s.cluster, _ = client.(*goredis.ClusterClient)
	var faults []error
	single, _ := client.(*goredis.Client)
	if single == nil && s.cluster == nil {
		faults = append(faults, &OptionError{"Client", fmt.Sprintf("is %T, must be a *Client or a *ClusterClient that is not nil", client)})
	}
	if s.options.Timeout < 0 {
		faults = append(faults, &OptionError{"Timeout", fmt.Sprintf("is %v, must be above 0, or 0 for %v", s.options.Timeout, DefaultTimeout)})
	}
	if len(faults) > 0 {
		return nil, errors.Join(faults...)
	}
	if single != nil && single.Options().ContextTimeoutEnabled && !sentinels(single) && !s.redials() {
		s.prompt = single
	}
	return s, nil
}

// Open returns a storage on a client of its own, which Close closes. The url is one of those that go-redis
// parses:
//
//	redis://user:password@localhost:6379/0?protocol=3             a server; rediss with TLS, unix for a socket
//	redis://host1:6379?addr=host2:6379&addr=host3:6379            a cluster
//	redis://sentinel1:26379?addr=sentinel2:26379&master_name=main a server that sentinels watch
//
// The last has the login of the sentinels, and that of the server in the parameters username and password.
// Timeouts that it does not give are Options.Timeout, and conn_max_idle_time is 3 minutes. Unless it has
// min_idle_conns, nothing is sent before the first call. The error of a wrong url tells nothing of a password.
func Open(url string, o *Options) (*Storage, error) {
	timeout := DefaultTimeout
	if o != nil && o.Timeout != 0 {
		timeout = o.Timeout
	}
	client, err := dial(url, timeout)
	if err != nil {
		return nil, &OptionError{"URL", "is wrong: " + err.Error()}
	}
	s, err := New(client, o)
	if err != nil {
		return nil, errors.Join(err, client.Close())
	}
	s.owned = true
	if c, ok := client.(*goredis.Client); ok && !sentinels(c) {
		s.prompt = c.WithTimeout(timeout) // a copy on the same connections
		o := s.prompt.Options()
		o.ContextTimeoutEnabled, o.ReadTimeout, o.WriteTimeout = true, c.Options().ReadTimeout, c.Options().WriteTimeout
	}
	return s, nil
}

// Close answers further calls with ErrClosed, waits for those that were sent, and closes the client if Open made
// it. It waits until the context ends, and at most Options.Timeout: then the calls have their errors. Its error is the
// context's if that ended while calls were in flight, joined with that of closing the client.
func (s *Storage) Close(ctx context.Context) error {
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	left := make(chan error, len(s.queues))
	for _, q := range s.queues { // closed: nobody changes it
		go func() { left <- q.Close(ctx) }()
	}
	var err error
	for range s.queues {
		err = cmp.Or(err, <-left)
	}
	if !again && s.owned {
		err = errors.Join(err, s.client.Close())
	}
	return err
}

// Decide implements storage.Storage.
func (s *Storage) Decide(ctx context.Context, r *storage.Request, a *storage.Answer) error {
	return s.decide(ctx, r, a, false, 0)
}

// DecideFresh is Decide for a caller that doubts what Redis has. Where Decide would admit, and a bucket that is
// asked for more than 0 tokens has no state, or one that was changed last at the time since or before, it changes
// nothing and returns ErrStale; and so for any bucket where all are asked for 0, to be told what remains. Since is a time
// by the monotonic clock of this process, in microseconds; 0 doubts no state. By an injected clock, which may
// stand still, every state is too old.
//
// In any case it returns ErrRestarted when the server does not know the script: it was
// started again, is a replica that was promoted, or has never decided. The next Decide sends the script.
func (s *Storage) DecideFresh(ctx context.Context, r *storage.Request, a *storage.Answer, since int64) error {
	return s.decide(ctx, r, a, true, since)
}

func (s *Storage) decide(ctx context.Context, r *storage.Request, a *storage.Answer, fresh bool, since int64) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	key := s.key(r.Name, r.Parts[0].Identifier)
	more, err := s.moreKeys(r, key)
	if err != nil {
		return err
	}
	q, c, err := s.ask(ctx, query{key: key, more: more, request: *r, fresh: fresh, since: since})
	if c != nil {
		defer q.Put(c)
	}
	if err != nil {
		return err
	}
	if err := c.Answer.fill(a, r); err != nil {
		return s.unavailable(err)
	}
	a.Source, a.Degraded, a.At = Source, false, c.Answer.at
	if r.Clocked {
		a.At = r.Now
	}
	return nil
}

// Charge implements storage.Storage.
func (s *Storage) Charge(ctx context.Context, c *storage.Charge) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.change(ctx, c.Name, c.Identifier, c.Rules, appendCharge(nil, c))
}

// Debt implements replica.Storage.
func (s *Storage) Debt(ctx context.Context, d replica.Debt) (replica.Debt, error) {
	if err := ctx.Err(); err != nil {
		return replica.Debt{}, err
	}
	q, c, err := s.ask(ctx, query{key: s.key(d.Name, d.Identifier), change: appendQuestion(nil, &d), rules: d.Rules})
	if c != nil {
		defer q.Put(c)
	}
	if err != nil {
		return replica.Debt{}, err
	}
	d.Amounts = c.Answer.amounts(len(d.Rules.Rules))
	return d, nil
}

// Raise implements replica.Storage.
func (s *Storage) Raise(ctx context.Context, d replica.Debt) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.change(ctx, d.Name, d.Identifier, d.Rules, appendDebt(nil, &d))
}

// Reset implements storage.Storage. A value that this package has not written stays, and is ErrCorruptState.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.change(ctx, name, identifier, nil, []byte{opReset, 0})
}

func (s *Storage) change(ctx context.Context, name, identifier string, rules *storage.RuleSet, args []byte) error {
	q, c, err := s.ask(ctx, query{key: s.key(name, identifier), change: args, rules: rules})
	if c != nil {
		q.Put(c)
	}
	return err
}

// key is where an identifier is kept. One with a NUL is in the slot of what stands before it, so that the
// identifiers of a key on its routes can be consumed together.
func (s *Storage) key(name, id string) string {
	before, _, cut := strings.Cut(id, "\x00")
	prefix, tag, mark := s.options.Prefix, "", ":"
	if s.options.HashTag != nil {
		tag = s.options.HashTag(before)
		prefix += "{" + strings.ReplaceAll(tag, "}", ")") + "}"
	}
	if cut && tag == "" {
		return s.options.Prefix + name + ":{" + tagOf(slot(s.key(name, before))) + "}" + id
	}
	if strings.Contains(id, "{") {
		mark = ":{}" // an empty tag: the whole key decides the slot
	}
	return prefix + name + mark + id
}

// moreKeys are the keys of a request's further parts, all of which must be in the first one's slot.
func (s *Storage) moreKeys(r *storage.Request, first string) ([]string, error) {
	var keys []string
	var here uint16
	if s.cluster != nil && len(r.Parts) > 1 {
		here = slot(first)
	}
	for _, p := range r.Parts[1:] {
		key := s.key(r.Name, p.Identifier)
		if s.cluster != nil && slot(key) != here {
			return nil, fmt.Errorf("%w: %.64q is in slot %d, %.64q in slot %d: see Options.HashTag", ErrCrossSlot, r.Parts[0].Identifier, here, p.Identifier, slot(key))
		}
		keys = append(keys, key)
	}
	return keys, nil
}
