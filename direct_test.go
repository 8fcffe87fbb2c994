package throttler_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/storage"
	memstore "github.com/go-throttler/throttler/storage/runtime"
)

// A Throttler calls the runtime storage by short cuts, without a Request where it can. If the storage is hidden behind
// another type, the Throttler calls it as it does any storage. Both ways have to give the same answers.
func TestTheShortWaysInProcessAnswerAsTheStorageDoes(t *testing.T) {
	t.Parallel()
	const seeds, calls, identifiers = 60, 150, 3
	for seed := range uint64(seeds) {
		synctest.Test(t, func(t *testing.T) {
			rnd := rand.New(rand.NewPCG(seed, 1))
			buckets := someBuckets(rnd)
			direct, behind := throttlerOver(t, memstore.New(nil), buckets), throttlerOver(t, struct{ storage.Storage }{memstore.New(nil)}, buckets)
			for i := range calls {
				<-time.After(time.Duration(rnd.IntN(3)*rnd.IntN(2_000_000)) * time.Microsecond)
				call := someCall(rnd, buckets, identifiers)
				want, wantErr := call(behind)
				got, gotErr := call(direct)
				require.Equal(t, fmt.Sprint(wantErr), fmt.Sprint(gotErr), "seed %d, call %d", seed, i)
				require.Equal(t, whole(want), whole(got), "seed %d, call %d", seed, i)
			}
		})
	}
}

func throttlerOver(t *testing.T, s storage.Storage, buckets []throttler.Bucket) *throttler.Throttler {
	t.Helper()
	th, err := throttler.New(throttler.Config{Storage: s, Buckets: buckets, Cost: 2})
	require.NoError(t, err)
	return th
}

// someBuckets returns one to six buckets, of all kinds.
func someBuckets(rnd *rand.Rand) (all []throttler.Bucket) {
	for i := range 1 + rnd.IntN(6) {
		b := throttler.NewBucket(time.Duration(1+rnd.IntN(8))*time.Second, 3+rnd.Int64N(20)).Named(fmt.Sprint("b", i))
		all = append(all, [...]func() throttler.Bucket{
			func() throttler.Bucket { return b }, b.Continuous, b.FixedWindow, b.SlidingWindow, b.SlidingLog,
		}[rnd.IntN(5)]())
	}
	return all
}

// someCall returns one of the calls that decide, at random. It does the same on every Throttler.
func someCall(rnd *rand.Rand, buckets []throttler.Bucket, identifiers int) func(*throttler.Throttler) (throttler.Verdict, error) {
	var o []throttler.Option
	for range rnd.IntN(3) {
		o = append(o, [...]throttler.Option{
			throttler.Cost(rnd.Int64N(26) - 1), throttler.Using(buckets[rnd.IntN(len(buckets)):]...),
			throttler.AtMost(rnd.Int64N(6)), throttler.CostOf("b0", rnd.Int64N(4)),
		}[rnd.IntN(4)])
	}
	first := rnd.IntN(identifiers + 1)
	id, most := fmt.Sprint("user", first)[:4+min(first, 1)], time.Duration(rnd.IntN(5))*time.Second
	other := throttler.For(fmt.Sprint("org", rnd.IntN(2)), o...)
	kind := rnd.IntN(8)
	return func(t *throttler.Throttler) (v throttler.Verdict, err error) {
		ctx := context.Background()
		switch kind {
		case 0:
			return t.Peek(ctx, id, o...)
		case 1:
			return t.Reserve(ctx, id, most, o...)
		case 2:
			return t.ConsumeAll(ctx, throttler.For(id), other)
		case 3:
			return v, t.Charge(ctx, id, o...)
		case 4:
			if v, err = t.Consume(id, o...); err == nil && v.Taken() {
				err = t.Refund(ctx, v)
			}
			return v, err
		}
		return t.Consume(id, o...)
	}
}

// whole returns everything that a Verdict says.
func whole(v throttler.Verdict) string {
	return fmt.Sprintf("%v %v %v %v %v %v %+v", v.Allowed, v.RetryAfter, v.Delay, v.Tokens(), v.Source(), v.Taken(), v.Levels())
}
