package batch_test

import (
	"context"
	"fmt"
	"io"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/batch"
)

// query and answer are as large as those of a storage.
type (
	query  struct{ words [25]int64 }
	answer struct{ words [31]int64 }
)

// echo answers all calls.
func echo(calls []*batch.Call[query, answer]) {
	for _, c := range calls {
		c.Answer.words[0] = c.Query.words[0]
	}
}

// ask makes a call, and checks that it gets its own answer.
func ask(ctx context.Context, q *batch.Queue[query, answer], n int64) error {
	c := q.Get()
	defer q.Put(c)
	c.Query.words[0] = n
	if err := q.Do(ctx, c); err != nil {
		return err
	}
	if got := c.Answer.words[0]; got != n {
		return fmt.Errorf("%d was answered with %d", n, got)
	}
	return nil
}

// BenchmarkGoroutine measures the least that a batch in a goroutine of its own can cost: starting it, and waiting for
// it.
func BenchmarkGoroutine(b *testing.B) {
	done := make(chan struct{}, 1)
	fly := func() { done <- struct{}{} }
	b.ReportAllocs()
	for b.Loop() {
		go fly()
		<-done
	}
}

func BenchmarkOneCaller(b *testing.B) {
	q := batch.New(batch.Options{Timeout: time.Second}, func(_ context.Context, calls []*batch.Call[query, answer]) { echo(calls) })
	defer func() { assert.NoError(b, q.Close(b.Context())) }()
	b.ReportAllocs()
	for b.Loop() {
		if err := ask(b.Context(), q, 1); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkParallel has 64 callers. A batch that waits leaves the processors to the callers, as a batch on the
// network does. Busy batches leave them none on a machine with two processors.
func BenchmarkParallel(b *testing.B) {
	for name, fly := range map[string]func(int){
		"instant": func(int) {},
		"busy": func(int) {
			for start := time.Now(); time.Since(start) < 20*time.Microsecond; {
			}
		},
		"waiting": func(int) {
			for start := time.Now(); time.Since(start) < 20*time.Microsecond; {
				runtime.Gosched()
			}
		},
		"tcp": roundTrips(b),
	} {
		b.Run(name, func(b *testing.B) { parallel(b, fly) })
	}
}

// parallel measures calls whose batches take as long as fly, and how many calls share a batch.
func parallel(b *testing.B, fly func(calls int)) {
	batches := make(chan int, 1)
	batches <- 0
	q := batch.New(batch.Options{Timeout: time.Second}, func(_ context.Context, calls []*batch.Call[query, answer]) {
		fly(len(calls))
		echo(calls)
		batches <- <-batches + 1
	})
	b.SetParallelism(64 / runtime.GOMAXPROCS(0))
	b.ReportAllocs()
	b.ResetTimer()
	b.RunParallel(func(pb *testing.PB) {
		ctx, cancel := context.WithCancel(b.Context()) // one for each goroutine, as for requests of a server
		defer cancel()
		for pb.Next() {
			if err := ask(ctx, q, 1); err != nil {
				b.Error(err)
			}
		}
	})
	b.StopTimer()
	assert.NoError(b, q.Close(b.Context()))
	b.ReportMetric(float64(b.N)/float64(<-batches), "calls/batch")
}

// roundTrips returns a function that sends the bytes of so many calls to a server on this machine, and reads as many
// bytes back.
func roundTrips(b *testing.B) func(calls int) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	require.NoError(b, err)
	b.Cleanup(func() { _ = l.Close() })
	conns := make(chan net.Conn, 2)
	for range cap(conns) {
		c, err := net.Dial("tcp", l.Addr().String())
		require.NoError(b, err)
		b.Cleanup(func() { _ = c.Close() })
		conns <- c
		server, err := l.Accept()
		require.NoError(b, err)
		go func() {
			defer func() { _ = server.Close() }()
			_, _ = io.CopyBuffer(struct{ io.Writer }{server}, struct{ io.Reader }{server}, make([]byte, 1<<16))
		}()
	}
	bytes := make([]byte, 200*128)
	return func(calls int) {
		c, in := <-conns, make([]byte, 200*calls)
		_, err := c.Write(bytes[:len(in)])
		assert.NoError(b, err)
		_, err = io.ReadFull(c, in)
		assert.NoError(b, err)
		conns <- c
	}
}
