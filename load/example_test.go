package load_test

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/load"
	"github.com/go-throttler/throttler/throttlerhttp"
)

func Example() {
	if err := example(); err != nil {
		fmt.Println(err)
	}
	// Output: true
}

func example() error {
	follows, err := load.New(load.Scheduler(20*time.Millisecond), nil)
	if err != nil {
		return err // all faults of the options
	}
	defer follows.Close()
	t, err := throttler.New(throttler.Config{
		Load: follows.Share,
		Buckets: []throttler.Bucket{
			throttler.NewBucket(time.Second, 50).Continuous().Elastic(2), // 50 a second, under load fewer, but at least 2
			throttler.NewBucket(24*time.Hour, 10_000).Named("quota"),     // a quota that was sold does not shrink
		},
	})
	if err != nil {
		return err
	}
	v, err := t.Consume("user:42")
	if err != nil {
		return err
	}
	fmt.Println(v.Allowed)
	return nil
}

// The latency of the handler is a signal too. It notices requests that wait for a database.
func ExampleLatency() {
	if err := exampleLatency(http.NewServeMux()); err != nil {
		fmt.Println(err)
	}
	// Output: 404
}

func exampleLatency(mux http.Handler) error {
	var latency load.Latency
	follows, err := load.New(load.Most(
		load.Scheduler(20*time.Millisecond),
		latency.Signal(200*time.Millisecond),
	), nil)
	if err != nil {
		return err
	}
	defer follows.Close()
	t, err := throttler.New(throttler.Config{Load: follows.Share})
	if err != nil {
		return err
	}
	limit, err := throttlerhttp.New(t, &throttlerhttp.Options{
		Buckets: []throttler.Bucket{throttler.NewBucket(time.Second, 50).Continuous().Elastic(2)},
		Took:    latency.Took,
	})
	if err != nil {
		return err
	}
	w := httptest.NewRecorder()
	limit(mux).ServeHTTP(w, httptest.NewRequest(http.MethodGet, "/", nil))
	fmt.Println(w.Code)
	return nil
}

// Anything that a program knows about its load may be a signal, such as the length of a queue divided by the length that it
// should have.
func ExampleSignal() {
	jobs := make(chan func(), 1000)
	queue := load.Signal(func() float64 { return float64(len(jobs)) / 100 })
	for range 150 {
		jobs <- func() {}
	}
	fmt.Println(queue())
	// Output: 1.5
}

func TestTheCodeInTheDocsIsThatOfTests(t *testing.T) {
	t.Parallel()
	page, err := os.ReadFile("../docs/load.md")
	require.NoError(t, err)
	indentation := regexp.MustCompile(`(?m)^\t+`)
	tests := ""
	for _, file := range []string{"example_test.go", "../internal/adapters/load_test.go"} {
		text, err := os.ReadFile(file)
		require.NoError(t, err)
		tests += indentation.ReplaceAllString(string(text), "")
	}
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(string(page), -1)
	require.Len(t, blocks, strings.Count(string(page), "```go"))
	require.NotEmpty(t, blocks)
	for _, block := range blocks {
		assert.Contains(t, tests, indentation.ReplaceAllString(block[1], ""))
	}
	for _, link := range regexp.MustCompile(`\]\(([^):#]+)\)`).FindAllStringSubmatch(string(page), -1) {
		_, err := os.Stat("../docs/" + link[1])
		assert.NoError(t, err)
	}
}
