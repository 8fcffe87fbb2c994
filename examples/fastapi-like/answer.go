package main

import (
	"encoding/json"
	"log/slog"
	"net/http"
	"time"
)

type message struct {
	Message string `json:"message"`
}

func answer(w http.ResponseWriter, status int, body any) {
	text, _ := json.Marshal(body) // cannot fail
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(text) // fails if the client has left, and then nobody can be told
}

func say(text string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) { answer(w, http.StatusOK, message{text}) }
}

func noContent(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Cache-Control", "no-store")
	w.WriteHeader(http.StatusNoContent)
}

func onlyGet(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Allow", "GET, HEAD")
	answer(w, http.StatusMethodNotAllowed, message{"Method not allowed."})
}

// logged writes one line to the log for each request.
func logged(log *slog.Logger, next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		start := time.Now()
		rec := &recorder{ResponseWriter: w, status: http.StatusOK}
		next.ServeHTTP(rec, r)
		line := []any{"method", r.Method, "path", r.URL.Path, "status", rec.status, "client", client(r), "duration", time.Since(start).String()}
		if rec.err == nil {
			log.Info("request", line...)
		} else {
			log.Error("request", append(line, "error", rec.err.Error())...)
		}
	})
}

// recorder keeps the status and the error of a request for the log.
type recorder struct {
	http.ResponseWriter

	status int
	err    error
}

func (r *recorder) WriteHeader(status int) {
	r.status = status
	r.ResponseWriter.WriteHeader(status)
}

// failed adds the reason of a failure to the log. Clients must not see it.
func failed(w http.ResponseWriter, err error) {
	if rec, ok := w.(*recorder); ok {
		rec.err = err
	}
}
