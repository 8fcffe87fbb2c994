package main

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html/template"
	"net/http"
	"strings"

	"github.com/go-throttler/throttler"
)

//go:embed docs.html
var docsHTML string

// docs returns the page that lists the routes, calls them and shows what is left of their limits. The page is a single
// file. Its Content-Security-Policy lets it load nothing else, and connect to this service only.
func docs(table []router) (http.Handler, error) {
	page, err := template.New("docs.html").Parse(docsHTML)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	if err := page.Execute(&out, table); err != nil {
		return nil, err
	}
	policy := fmt.Sprintf("default-src 'none'; style-src %s; script-src %s; connect-src 'self'; img-src data:; "+
		"base-uri 'none'; form-action 'none'; frame-ancestors 'none'", hash(out.String(), "style"), hash(out.String(), "script"))
	return http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/html; charset=utf-8")
		w.Header().Set("Content-Security-Policy", policy)
		w.Header().Set("Cache-Control", "no-cache")
		_, _ = w.Write(out.Bytes()) // fails if the client has left, and then nobody can be told
	}), nil
}

// hash returns the source expression by which a Content-Security-Policy allows the page's only element of this kind.
func hash(page, kind string) string {
	_, rest, _ := strings.Cut(page, "<"+kind+">")
	text, _, _ := strings.Cut(rest, "</"+kind+">")
	sum := sha256.Sum256([]byte(text))
	return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
}

// shown is a limit on the page. Bucket is its name in the RateLimit fields, and Label is what the page shows.
type shown struct {
	Bucket, Label string
	Capacity      int64
}

// Shown returns the limits of a route.
func (g router) Shown(r route) (out []shown) {
	add := func(prefix string, buckets []throttler.Bucket) {
		for _, b := range buckets {
			out = append(out, shown{prefix + b.Name(), b.Name(), b.Capacity()})
		}
	}
	if !r.Free && (r.Adds || len(r.Limits) == 0) {
		add("", g.Limits)
	}
	add(r.Path+" ", r.Limits)
	return out
}
