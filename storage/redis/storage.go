// Package redis keeps consumption in Redis or Valkey, where any number of processes share it.
//
// A decision is one call of a Lua script: one round trip, atomic, by the server's clock unless the throttler has one of
// its own. Concurrent decisions of one process share round trips, and no decision is held back to fill a batch. Each
// identifier is one key with one value, and the key expires about a second after its buckets are full.
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

// Source is the value of Verdict.Source for answers of this storage.
const Source = "redis"

// Defaults of Options. Linux retransmits a lost packet after 200 ms at the earliest, so the default timeout outlasts
// one lost packet, and not much more.
const (
	DefaultPrefix  = "throttler:"
	DefaultTimeout = 250 * time.Millisecond
)

// Options of a Storage. The zero value and nil are the defaults.
type Options struct {
	// Prefix is the beginning of all keys, by default DefaultPrefix. The throttler's Config.Name, a colon and the
	// identifier follow it.
	//
	// An identifier with an opening brace gets {} before it, so that users cannot choose the slot of their key. An
	// identifier with a NUL, such as a route of throttlerhttp, gets a hash tag instead. The tag puts it into the
	// slot of the identifier before the NUL.
	//
	// A Prefix with a tag in braces puts all keys into one slot. If its braces are empty or not closed it has no tag,
	// and hides the tags of the keys: then ConsumeAll finds an identifier and its routes in different slots. Of two
	// prefixes on one Redis, neither may begin with the other.
	Prefix string

	// Timeout is the longest time that a call takes, even if its context allows more. It must not be negative; zero
	// means DefaultTimeout.
	Timeout time.Duration

	// HashTag returns the part of an identifier that decides its slot in a cluster, for example its tenant. In a
	// cluster ConsumeAll accepts only identifiers of one slot, so it needs a HashTag. If an identifier has a NUL,
	// HashTag gets the part before it.
	//
	// The tag is part of the key, in braces after the prefix. All processes must therefore use the same function. A
	// changed function makes other keys, whose buckets begin full. HashTag must be safe for concurrent use.
	HashTag func(identifier string) string
}

// OptionError is a fault in an argument of New, Open or Watch.
type OptionError struct {
	Field  string // Client, URL, Timeout or Watch
	Reason string // what was given and what is allowed
}

func (e *OptionError) Error() string {
	return fmt.Sprintf("throttler: redis: %s %s", e.Field, e.Reason)
}

// Errors for which go-redis has no test function of its own, such as IsOOMError, IsReadOnlyError, IsLoadingError,
// IsAuthError or IsClusterDownError. Test for these with errors.Is.
var (
	// ErrWrongType accompanies ErrCorruptState if the key holds something other than a string.
	ErrWrongType = errors.New("WRONGTYPE: the key holds no string")

	// ErrCrossSlot means that the identifiers of a call are in different slots of a cluster. Nothing was executed.
	ErrCrossSlot = errors.New("throttler: redis: CROSSSLOT")

	// ErrStale means that the server of a DecideFresh may have forgotten consumption. Nothing was changed.
	ErrStale = errors.New("throttler: redis: stale state")

	// ErrRestarted wraps ErrStale and means that the server does not have the script. Nothing was executed.
	ErrRestarted = fmt.Errorf("%w: the server has lost its scripts", ErrStale)
)

// Storage keeps consumption in Redis. New or Open makes one, and all methods are safe for concurrent use.
//
// A call sends its script once. It sends it again only if the server answers that nothing ran: NOSCRIPT, MOVED, ASK,
// TRYAGAIN, or a CROSSSLOT of the batch. If the answer is lost, the script may have been executed, but at most once.
//
// A timeout wraps ErrUnavailable. An error reply wraps ErrUnavailable and the reply, except CROSSSLOT, which becomes
// ErrCrossSlot.
type Storage struct {
	client  goredis.UniversalClient
	cluster *goredis.ClusterClient // client, if it is a cluster's; else nil
	owned   bool                   // Close closes client
	options Options
	decider *script         // for decisions
	report  func(err error) // the argument of Watch, or nil

	// prompt is for batches that a caller sends in its own goroutine: everything it waits for ends with the context of
	// the command. It is nil if the client cannot promise that.
	//
	// If dialing takes longer than such a context lasts, prompt would never get a connection. So after a batch failed,
	// the next one is sent through client by a goroutine of its own, where dialing may take the client's DialTimeout.
	prompt *goredis.Client
	well   atomic.Bool // the last batch succeeded, so prompt may be used

	known atomic.Bool // the client has learned the nodes of the cluster
	byKey atomic.Bool // the single server has answered CROSSSLOT: each key gets a script call of its own

	refused atomic.Pointer[refusal] // the result of the last probe, or nil

	mu       sync.RWMutex      // guards the fields below; never held during I/O
	learning *learning         // the attempt that is under way, or nil
	queues   map[string]*queue // by the address of the server, "" without a cluster; unchanged once closed
	begun    bool              // a call has been made: Watch comes too late
	closed   bool
}

var _ replica.Storage = (*Storage)(nil)

// New returns a storage that uses a *Client (one of NewFailoverClient too) or a *ClusterClient. The caller closes the
// client after the storage. A nil o means the defaults.
//
// Open makes a client with these settings; a client of your own should have them too:
//
//   - DialerRetries 1, so that a refused connection is an error at once.
//   - DialTimeout, ReadTimeout and WriteTimeout of at most Options.Timeout. Calls return in time with any value, but a
//     connection that is stuck cannot be used until they have passed.
//   - ConnMaxIdleTime of a few minutes, because balancers and address translators forget idle connections.
//
// MaxRetries does not matter: the scripts are never retried.
//
// New sends nothing, and Redis need not be running. The error joins all faults of the arguments, each an *OptionError.
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

// Open returns a storage with a client of its own; Close closes both. A nil o means the defaults. The url is in one of
// the forms that go-redis parses:
//
//	redis://user:password@localhost:6379/0?protocol=3             a server; rediss with TLS, unix for a socket
//	redis://host1:6379?addr=host2:6379&addr=host3:6379            a cluster
//	redis://sentinel1:26379?addr=sentinel2:26379&master_name=main a server that sentinels watch
//
// In the last form credentials before @ belong to the sentinels; the server's are the parameters username and password.
// Timeouts that the url leaves out are Options.Timeout, and conn_max_idle_time is 3 minutes by default. Nothing is sent
// before the first call unless the url has min_idle_conns. All errors are *OptionErrors; the one of a wrong url reveals
// no part of a password.
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
		s.prompt = c.WithTimeout(timeout) // a copy that shares the connections
		o := s.prompt.Options()
		o.ContextTimeoutEnabled, o.ReadTimeout, o.WriteTimeout = true, c.Options().ReadTimeout, c.Options().WriteTimeout
	}
	return s, nil
}

// Close makes further calls return ErrClosed, waits for the calls that were sent, and closes the client if Open made
// it. It waits until ctx ends, and at most Options.Timeout: by then every call has returned. The error is that of ctx
// if it ended while calls were in flight, joined with the error of closing the client. Closing twice is harmless.
func (s *Storage) Close(ctx context.Context) error {
	s.mu.Lock()
	again := s.closed
	s.closed = true
	s.mu.Unlock()
	left := make(chan error, len(s.queues))
	for _, q := range s.queues { // without the lock: queues does not change once closed is set
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

// DecideFresh is Decide for a caller that suspects Redis of having forgotten consumption. It returns ErrStale and
// changes nothing if Decide would admit although the state of a bucket is in doubt: the bucket has no state, or its
// last change was at since or before. Only buckets with a cost above 0 count. If all costs are 0 the call asks what
// remains, and then every bucket counts.
//
// Since is a time of law.Monotonic, in microseconds; with 0 no state is in doubt. With a caller's clock every state is
// too old, because that clock may stand still.
//
// DecideFresh returns ErrRestarted, whatever since is, if the server does not have the script: it has restarted, is a
// promoted replica, or has never decided. It does not send the script; the next Decide does.
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

// Reset implements storage.Storage. A value that this package did not write is left alone and is ErrCorruptState.
func (s *Storage) Reset(ctx context.Context, name, identifier string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	return s.change(ctx, name, identifier, nil, []byte{opReset, 0})
}

// change sends one change of an identifier. The rules are needed to name a bucket in an error.
func (s *Storage) change(ctx context.Context, name, identifier string, rules *storage.RuleSet, args []byte) error {
	q, c, err := s.ask(ctx, query{key: s.key(name, identifier), change: args, rules: rules})
	if c != nil {
		q.Put(c)
	}
	return err
}

// key returns the key of an identifier; no two names and identifiers share one. An identifier with a NUL is in the slot
// of the part before the NUL, so that ConsumeAll can take from a key and its routes together.
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
		mark = ":{}" // the first tag is empty, so the whole key decides the slot
	}
	return prefix + name + mark + id
}

// moreKeys returns the keys of the parts after the first. In a cluster a key outside the slot of the first is
// ErrCrossSlot, found before anything is sent.
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
