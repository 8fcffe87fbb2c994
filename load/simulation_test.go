package load_test

import (
	"cmp"
	"container/heap"
	"math/rand/v2"
	"strconv"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/load"
)

// The simulated server has 10 workers and a queue of requests before them. A request takes a worker 20 ms, but 40 ms from
// 60 s to 180 s, which halves the capacity from 500 to 250 requests a second. 95 users ask 2 times a second each, and try
// up to twice again after a second without an answer. 5 users ask 200 times a second each. The limit of each user is 50
// requests a second. An answer within a second is good.
const (
	many, few = 95, 5
	workers   = 10
	patience  = time.Second
	calm      = 60 * time.Second
	overload  = 120 * time.Second
	after     = 120 * time.Second
)

// event is something that happens at a given time.
type event struct {
	at time.Duration
	do func()
}

type events []event

func (e events) Len() int           { return len(e) }
func (e events) Less(i, j int) bool { return cmp.Less(e[i].at, e[j].at) }
func (e events) Swap(i, j int)      { e[i], e[j] = e[j], e[i] }
func (e *events) Push(x any)        { *e = append(*e, x.(event)) }
func (e *events) Pop() any {
	last := len(*e) - 1
	x := (*e)[last]
	*e = (*e)[:last]
	return x
}

// request is a request, which its user may try again.
type request struct {
	user, tries int
	born        time.Duration
	answered    bool
}

// server is the simulation. It runs in the virtual time of a bubble.
type server struct {
	t       *testing.T
	limiter *throttler.Throttler
	latency *load.Latency
	rnd     *rand.Rand
	began   time.Time
	now     time.Duration
	due     events
	line    []*request
	busy    int
	most    int      // requests inside at once, 0 if any number
	good    [2][]int // good answers in each second: to the 95 users, and to the 5
}

func (s *server) at(t time.Duration, do func()) { heap.Push(&s.due, event{t, do}) }

func (s *server) exponential(mean time.Duration) time.Duration {
	return time.Duration(s.rnd.ExpFloat64() * float64(mean))
}

// run plays everything until the end.
func (s *server) run(end time.Duration) {
	s.good = [2][]int{make([]int, int(end/time.Second)), make([]int, int(end/time.Second))}
	for user := range many + few {
		pause := time.Second / 2
		if user >= many {
			pause = time.Second / 200
		}
		var next func()
		next = func() {
			s.arrive(&request{user: user, born: s.now})
			s.at(s.now+s.exponential(pause), next)
		}
		s.at(s.exponential(pause), next)
	}
	for {
		x := heap.Pop(&s.due).(event)
		if x.at >= end {
			return
		}
		<-time.After(time.Until(s.began.Add(x.at))) // virtual: the run is in a bubble
		s.now = x.at
		x.do()
	}
}

// arrive lets a request arrive, for the first time or again.
func (s *server) arrive(r *request) {
	v, err := s.limiter.Consume("user:" + strconv.Itoa(r.user))
	require.NoError(s.t, err)
	if !v.Allowed {
		return
	}
	if s.most == 0 || s.busy+len(s.line) < s.most {
		s.line = append(s.line, r)
		s.serve()
	}
	if r.user < many && r.tries < 2 {
		s.at(s.now+patience, func() {
			if !r.answered {
				s.arrive(&request{user: r.user, born: s.now, tries: r.tries + 1})
			}
		})
	}
}

// serve lets idle workers begin requests from the queue.
func (s *server) serve() {
	for s.busy < workers && len(s.line) > 0 {
		r := s.line[0]
		s.line = s.line[1:]
		s.busy++
		mean := 20 * time.Millisecond
		if s.now >= calm && s.now < calm+overload {
			mean *= 2
		}
		s.at(s.now+s.exponential(mean), func() { s.answer(r) })
	}
}

func (s *server) answer(r *request) {
	s.busy--
	took := s.now - r.born
	s.latency.Took(took)
	if r.answered = took <= patience; r.answered {
		class := 0
		if r.user >= many {
			class = 1
		}
		s.good[class][int(s.now/time.Second)]++
	}
	s.serve()
}

// rate returns the good answers per second to a class of users within a period of time.
func (s *server) rate(class int, from, to time.Duration) float64 {
	sum := 0
	for _, n := range s.good[class][int(from/time.Second):int(to/time.Second)] {
		sum += n
	}
	return float64(sum) / (to - from).Seconds()
}

// simulated runs the server with limits that follow its latency, or with the same limits unchanged, and with at most so
// many requests inside.
func simulated(t *testing.T, elastic bool, most int) (s *server) {
	t.Helper()
	synctest.Test(t, func(t *testing.T) {
		s = &server{t: t, most: most, latency: &load.Latency{}, rnd: rand.New(rand.NewPCG(1, 1)), began: time.Now()}
		c, err := load.New(s.latency.Signal(250*time.Millisecond), nil)
		require.NoError(t, err)
		defer c.Close()
		config := throttler.Config{Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 50).Continuous().Elastic(1)}}
		if elastic {
			config.Load = c.Share
		}
		s.limiter, err = throttler.New(config)
		require.NoError(t, err)
		s.run(calm + overload + after)
	})
	for class, name := range []string{"many", "few"} {
		t.Logf("%s: %.0f good answers a second before, %.0f during, %.0f after", name,
			s.rate(class, 10*time.Second, calm), s.rate(class, calm, calm+overload), s.rate(class, calm+overload, calm+overload+after))
	}
	return s
}

func TestElasticLimitsKeepTheManyWholeInAnOverload(t *testing.T) {
	t.Parallel()
	s := simulated(t, true, 0)
	before, end := s.rate(0, 10*time.Second, calm), calm+overload+after
	assert.GreaterOrEqual(t, s.rate(0, calm, calm+overload), 0.95*before)
	assert.GreaterOrEqual(t, s.rate(0, calm+overload, end), 0.95*before)
	beforeFew := s.rate(1, 10*time.Second, calm)
	assert.GreaterOrEqual(t, s.rate(1, calm+overload+time.Minute, end), 0.95*beforeFew, "within a minute the few have all")
	assert.Greater(t, s.rate(1, calm, calm+overload), 10.0, "and something meanwhile")
}

func TestWithoutALoadAnOverloadEndsInACollapse(t *testing.T) {
	t.Parallel()
	s := simulated(t, false, 0)
	before := s.rate(0, 10*time.Second, calm)
	require.Greater(t, before, 180.0)
	assert.Less(t, s.rate(0, calm+10*time.Second, calm+overload), 0.1*before)
	assert.Less(t, s.rate(0, calm+overload+time.Minute, calm+overload+after), 0.1*before, "which retries keep up for ever")
}

func TestALimitOfConcurrencyTakesFromTheManyToo(t *testing.T) {
	t.Parallel()
	s := simulated(t, false, 20)
	before, during := s.rate(0, 10*time.Second, calm), s.rate(0, calm, calm+overload)
	assert.Less(t, during, 0.85*before)
	assert.Greater(t, during, 0.6*before)
}
