package rules_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"

	"github.com/go-throttler/throttler"
	"github.com/go-throttler/throttler/rules"
)

func decide(ctx context.Context) error {
	t, err := throttler.New(throttler.Config{})
	if err != nil {
		return err
	}
	engine, err := rules.NewEngine(t, rules.Files("../examples/rules"), nil) // looks for changes until Close
	if err != nil {
		return err // all faults of the files
	}
	defer engine.Close()
	v, applied, err := engine.Decide(ctx, rules.Request{Domain: "api", Entries: []rules.Entry{
		{Key: "path", Value: "/api/x"}, {Key: "user", Value: "42"},
	}})
	if err != nil {
		return err // the storage failed, or a cost is no number
	}
	for _, a := range applied {
		fmt.Println(v.Allowed, a.Rule.Name, a.Levels[0].Bucket, a.Levels[0].Remaining)
	}
	return nil
}

func ExampleEngine_Decide() {
	if err := decide(context.Background()); err != nil {
		fmt.Println(err)
	}
	// Output: true api api/10s 4
}

func serve(engine *rules.Engine, mux http.Handler) http.Handler {
	limit := engine.Middleware(func(r *http.Request) []rules.Entry {
		entries := []rules.Entry{
			{Key: "path", Value: r.URL.Path}, {Key: "method", Value: r.Method}, {Key: "agent", Value: r.UserAgent()},
		}
		if user := r.Header.Get("X-User"); user != "" { // of a gateway that authenticates; "" would be a user too
			entries = append(entries, rules.Entry{Key: "user", Value: user})
		}
		return entries
	}, &rules.MiddlewareOptions{Domain: "api"})
	handler := limit(mux)
	return handler
}

func ExampleEngine_Middleware() {
	t, err := throttler.New(throttler.Config{})
	if err != nil {
		fmt.Println(err)
		return
	}
	engine, err := rules.NewEngine(t, rules.Files("../examples/rules"), nil)
	if err != nil {
		fmt.Println(err)
		return
	}
	defer engine.Close()
	handler := serve(engine, http.NotFoundHandler())
	for range 6 {
		w, r := httptest.NewRecorder(), httptest.NewRequest(http.MethodGet, "/api/x", nil)
		r.Header.Set("X-User", "42")
		handler.ServeHTTP(w, r)
		fmt.Print(w.Code, " ")
	}
	// Output: 404 404 404 404 404 429
}

func ExampleParse() {
	_, err := rules.Parse("rules.yaml", []byte("rules:\n- name: api\n  limits: [5/10s, 100/1h slding]\n"))
	fmt.Println(err)
	// Output: rules.yaml:3:19: kind of limit "100/1h slding" is "slding", must be replenish, continuous, fixed, sliding or log, or else burst or named has to come here: did you mean "sliding"?
}
