module github.com/go-throttler/throttler/examples/observed

go 1.26.0

require (
	github.com/go-throttler/throttler v0.0.0
	github.com/go-throttler/throttler/throttlerprom v0.0.0
	github.com/go-throttler/throttler/watch v0.0.0
	github.com/prometheus/client_golang v1.25.0
	github.com/stretchr/testify v1.12.1
)

require (
	github.com/apache/datasketches-go v0.2.0 // indirect
	github.com/beorn7/perks v1.0.1 // indirect
	github.com/cespare/xxhash/v2 v2.3.0 // indirect
	github.com/dunglas/httpsfv v1.1.2 // indirect
	github.com/munnerz/goautoneg v0.0.0-20191010083416-a7dc8b61c822 // indirect
	github.com/prometheus/client_model v0.6.3 // indirect
	github.com/prometheus/common v0.72.0 // indirect
	github.com/prometheus/procfs v0.22.0 // indirect
	github.com/twmb/murmur3 v1.1.8 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
	golang.org/x/sys v0.48.0 // indirect
	google.golang.org/protobuf v1.36.12 // indirect
)

replace (
	github.com/go-throttler/throttler => ../..
	github.com/go-throttler/throttler/throttlerprom => ../../throttlerprom
	github.com/go-throttler/throttler/watch => ../../watch
)
