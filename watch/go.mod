module github.com/go-throttler/throttler/watch

go 1.26.0

require (
	github.com/apache/datasketches-go v0.2.0
	github.com/go-throttler/throttler v0.0.0
	github.com/stretchr/testify v1.12.1
	go.uber.org/goleak v1.3.0
)

require (
	github.com/twmb/murmur3 v1.1.8 // indirect
	go.yaml.in/yaml/v3 v3.0.5 // indirect
)

replace github.com/go-throttler/throttler => ../
