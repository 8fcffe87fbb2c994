package throttlerprom_test

import (
	"fmt"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler"
	memstore "github.com/go-throttler/throttler/storage/runtime"
	"github.com/go-throttler/throttler/throttlerprom"
	"github.com/go-throttler/throttler/throttlerslog"
)

func Example() {
	err := func() error {
		m, err := throttlerprom.New(prometheus.DefaultRegisterer, nil)
		if err != nil {
			return err // another collector has one of the names
		}
		store := memstore.New(nil)
		m.Storage("main", store)
		t, err := throttler.New(throttler.Config{
			Name:    "api", // is a label
			Storage: store,
			Buckets: []throttler.Bucket{throttler.NewBucket(time.Minute, 60)},
			Observe: throttler.Observers(m.Observe, throttlerslog.Observe(slog.Default())),
		})
		if err != nil {
			return err
		}
		v, err := t.Consume("user:42")
		fmt.Println(v.Allowed)
		return err
	}()
	if err != nil {
		fmt.Println(err)
	}
	// Output: true
}

func Example_readiness() {
	err := func() error {
		t, err := throttler.New(throttler.Config{}) // the buckets come with AddBucket or Using, or with a middleware
		if err != nil {
			return err
		}
		mux := http.NewServeMux()
		probe := throttler.Using(throttler.NewBucket(time.Minute, 1)) // of any size; without a bucket no storage is asked
		mux.HandleFunc("GET /ready", func(w http.ResponseWriter, r *http.Request) {
			if _, err := t.Peek(r.Context(), "ready", probe, throttler.Cost(0)); err != nil { // takes nothing
				http.Error(w, err.Error(), http.StatusServiceUnavailable)
			}
		})
		answer := httptest.NewRecorder()
		mux.ServeHTTP(answer, httptest.NewRequest(http.MethodGet, "/ready", nil))
		fmt.Println(answer.Code)
		return nil
	}()
	if err != nil {
		fmt.Println(err)
	}
	// Output: 200
}

// operations is the text of docs/operations.md.
func operations(t *testing.T) string {
	t.Helper()
	text, err := os.ReadFile("../docs/operations.md")
	require.NoError(t, err)
	return string(text)
}

func TestTheCodeInTheDocsIsThatOfTheExample(t *testing.T) {
	t.Parallel()
	example, err := os.ReadFile("example_test.go")
	require.NoError(t, err)
	blocks := regexp.MustCompile("(?s)```go\n(.*?)```").FindAllStringSubmatch(operations(t), -1)
	require.NotEmpty(t, blocks)
	for _, block := range blocks {
		assert.Contains(t, string(example), regexp.MustCompile(`(?m)^(.)`).ReplaceAllString(block[1], "\t\t$1"))
	}
}

func TestTheDocsSayWhatToDoAtEachAlertAndHaveEachMetric(t *testing.T) {
	t.Parallel()
	alerts, err := os.ReadFile("alerts.yaml")
	require.NoError(t, err)
	rules, text := regexp.MustCompile(`- alert: (\w+)`).FindAllStringSubmatch(string(alerts), -1), operations(t)
	assert.Len(t, rules, strings.Count(text, "\n### "))
	for _, rule := range rules {
		assert.Contains(t, text, "\n### "+rule[1]+"\n")
	}
	source, err := os.ReadFile("throttlerprom.go")
	require.NoError(t, err)
	for _, metric := range regexp.MustCompile(`(?:counter|gauge|histogram)\("(\w+)"|\{"(\w+)", "`).FindAllStringSubmatch(string(source), -1) {
		assert.Contains(t, text, "`"+metric[1]+metric[2]+"`")
	}
}
