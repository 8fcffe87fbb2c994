module github.com/go-throttler/throttler/examples/observed

go 1.26.0

require (
	github.com/go-throttler/throttler v0.0.0
	github.com/go-throttler/throttler/watch v0.0.0
	github.com/stretchr/testify v1.12.1
)

require (
	github.com/apache/datasketches-go v0.2.0 // indirect
	github.com/dunglas/httpsfv v1.1.2 // indirect
	github.com/twmb/murmur3 v1.1.8 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
)

replace (
	github.com/go-throttler/throttler => ../..
	github.com/go-throttler/throttler/watch => ../../watch
)
