package throttler_test

import (
	"fmt"
	"testing"
	"testing/synctest"
	"time"
	"unsafe"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// memory is a buffer that a server reuses for one request after the other, as servers on fasthttp do. A string in it is
// valid only as long as the call takes.
type memory []byte

// use lends the string to a call and then overwrites it by something else of the same length.
func (m memory) use(s string, call func(string)) {
	copy(m, s)
	call(unsafe.String(&m[0], len(s)))
	for i := range s {
		m[i] = 'x'
	}
}

func TestBucketsOfAnIdentifierOutlastItsMemory(t *testing.T) {
	t.Parallel()
	th, err := throttler.New(throttler.Config{})
	require.NoError(t, err)
	m := make(memory, 64)
	one, two := throttler.NewBucket(time.Hour, 1), throttler.NewBucket(time.Hour, 2)
	for i := range 10 {
		m.use(fmt.Sprint("user", i), func(id string) { require.NoError(t, th.AddBucket(id, one)) })
		m.use(fmt.Sprint("user", i), func(id string) { require.NoError(t, th.AddBucket(id, two)) })
	}
	m.use("user3", func(id string) { assert.True(t, th.RemoveBucket(id, one.Name())) })
	m.use("user4", th.RemoveBuckets)
	for i := range 10 {
		want := []throttler.Bucket{one, two}
		switch i {
		case 3:
			want = []throttler.Bucket{two}
		case 4:
			want = nil
		}
		assert.Equal(t, want, th.Buckets(fmt.Sprint("user", i)), i)
	}
	assert.Empty(t, th.Buckets("xxxxx"))
}

func TestNamesOutlastTheirMemory(t *testing.T) {
	t.Parallel()
	m, store := make(memory, 64), memstore.New(nil)
	var th *throttler.Throttler
	m.use("api", func(name string) {
		var err error
		th, err = throttler.New(throttler.Config{Name: name, Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 5)}})
		require.NoError(t, err)
	})
	require.True(t, allowed(t, th, "a"))
	var bucket throttler.Bucket
	m.use("plan", func(name string) { bucket = throttler.NewBucket(time.Hour, 5).Named(name) })
	require.True(t, allowed(t, th, "b", throttler.Using(bucket), throttler.CostOf("plan", 2)))

	same, err := throttler.New(throttler.Config{Name: "api", Storage: store, Buckets: []throttler.Bucket{throttler.NewBucket(time.Hour, 5)}})
	require.NoError(t, err)
	assert.Equal(t, []int64{4}, left(t, same, "a"))
	v, err := same.Peek(t.Context(), "b", throttler.Cost(0), throttler.Using(throttler.NewBucket(time.Hour, 5).Named("plan")))
	require.NoError(t, err)
	assert.EqualValues(t, 3, v.Levels()[0].Remaining)
}

func TestAllPartsAreChargedThoughTheirMemoryIsUsedAgain(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Hour, 100))
	user, org := make(memory, 64), make(memory, 64)
	for i := range 20 {
		user.use(fmt.Sprint("user", i), func(id string) {
			org.use(fmt.Sprint("org", i%3), func(other string) {
				v, err := th.ConsumeAll(t.Context(), throttler.For(id, throttler.Cost(int64(i))), throttler.For(other))
				require.NoError(t, err)
				require.True(t, v.Allowed)
			})
		})
	}
	for i := range 20 {
		assert.Equal(t, []int64{int64(100 - i)}, left(t, th, fmt.Sprint("user", i)))
	}
	assert.Equal(t, []int64{93}, left(t, th, "org0"))
	assert.Equal(t, []int64{94}, left(t, th, "org2"))
}

func TestWaitersStayInLineThoughMemoryIsUsedAgain(t *testing.T) {
	t.Parallel()
	synctest.Test(t, func(t *testing.T) {
		th, start := leaky(t), time.Now()
		require.True(t, allowed(t, th, "printer"))
		order := make(chan string, 10)
		for i := range 5 { // each in a buffer of its own, which is reused once the call was admitted
			go func() {
				make(memory, 64).use("printer", func(id string) {
					_, err := th.Wait(t.Context(), id)
					assert.NoError(t, err)
				})
				order <- fmt.Sprint(i, " after ", time.Since(start))
			}()
			synctest.Wait()
		}
		<-time.After(250 * time.Millisecond) // two have left
		for i := 5; i < 7; i++ {
			go func() {
				make(memory, 64).use("printer", func(id string) {
					_, err := th.Wait(t.Context(), id)
					assert.NoError(t, err)
				})
				order <- fmt.Sprint(i, " after ", time.Since(start))
			}()
			synctest.Wait()
		}
		for i := range 7 {
			assert.Equal(t, fmt.Sprint(i, " after ", time.Duration(i+1)*100*time.Millisecond), <-order)
		}
	})
}

func TestAVerdictNamesItsIdentifierThoughMemoryIsUsedAgain(t *testing.T) {
	t.Parallel()
	th, _ := throttled(t, throttler.NewBucket(time.Hour, 2))
	m := make(memory, 64)
	for _, buckets := range [][]throttler.Option{nil, {throttler.Using(throttler.NewBucket(time.Hour, 5).SlidingLog().Named("log"))}} {
		for i := range 2 {
			m.use("user:42", func(id string) {
				v, err := th.Consume(id, buckets...)
				require.NoError(t, err)
				m.use("another", func(string) {})
				assert.Equal(t, "user:42", v.Levels()[0].Identifier, i)
				require.NoError(t, th.Refund(t.Context(), v))
			})
		}
		v, err := th.Peek(t.Context(), "user:42", append(buckets, throttler.Cost(0))...)
		require.NoError(t, err)
		assert.Equal(t, v.Levels()[0].Limit, v.Levels()[0].Remaining, "it was given back to whom it was taken from")
	}
	m.use("c", func(id string) {
		v, err := th.Peek(t.Context(), id)
		require.NoError(t, err)
		m.use("d", func(string) {})
		assert.Equal(t, "c", v.Levels()[0].Identifier, "also of one that is not there")
	})
	m.use("a", func(id string) {
		v, err := th.ConsumeAll(t.Context(), throttler.For(id), throttler.For("org:7"))
		require.NoError(t, err)
		m.use("b", func(string) {})
		assert.Equal(t, "a", v.Levels()[0].Identifier)
		assert.Equal(t, "org:7", v.Levels()[1].Identifier)
	})
}
