module github.com/go-throttler/throttler

go 1.26
