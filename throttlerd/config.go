// The flags of serve.

package main

import (
	"cmp"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"flag"
	"fmt"
	"io"
	"net/http"
	"net/netip"
	"os"
	"slices"
	"strings"
	"time"
)

// config holds the flags of serve. A value that may hold a secret is never the default of a flag, because -help prints
// those.
type config struct {
	rules  []string
	source string

	grpc, http, admin string // listen addresses; "" opens no listener
	tlsCert, tlsKey   string
	tlsClientCA       string
	reflection        bool

	storage, redisURL, postgresURL string
	lease                          bool
	redisTag                       bool
	redisTimeout, postgresTimeout  time.Duration // 0: the default of the storage

	onStorageError, onUnknownDomain string

	domain  string        // of forward-auth requests
	headers []headerEntry // of forward-auth requests
	trusted []netip.Prefix

	adminToken string
	drain      time.Duration
}

// headerEntry makes an entry with this key from a header of a forward-auth request.
type headerEntry struct{ key, header string }

// parse reads the flags. Secrets may come from the environment instead: a URL given by flag wins over the environment,
// and -admin-token-file wins over THROTTLERD_ADMIN_TOKEN.
func parse(args []string, env func(string) string, stderr io.Writer) (*config, error) {
	c := &config{}
	flags := flag.NewFlagSet("throttlerd", flag.ContinueOnError)
	flags.SetOutput(stderr)
	tokenFile := c.define(flags)
	if err := flags.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil, err
		}
		return nil, &usageError{err}
	}
	if flags.NArg() > 0 {
		return nil, usage("%q is more than flags: rules are named by -rules", flags.Arg(0))
	}
	c.redisURL = cmp.Or(c.redisURL, env("THROTTLERD_REDIS_URL"), "redis://localhost:6379")
	c.postgresURL = cmp.Or(c.postgresURL, env("THROTTLERD_POSTGRES_URL"), "postgres://localhost:5432/postgres")
	if err := c.token(*tokenFile, env); err != nil {
		return nil, err
	}
	faults := []error{c.check()}
	flags.Visit(func(f *flag.Flag) {
		if f.Value.String() != f.DefValue {
			faults = append(faults, c.useless(f.Name))
		}
	})
	return c, errors.Join(faults...)
}

// useless returns the fault of a flag that was given for a storage that is not used. Whoever gives -redis-url means to
// count in Redis, and would find out much later that each process counts alone.
func (c *config) useless(flag string) error {
	var storages []string
	switch flag {
	case "redis-url", "redis-timeout", "redis-slot-by-domain":
		storages = []string{"redis", "failover"}
	case "postgres-url", "postgres-timeout":
		storages = []string{"postgres", "failover"}
	case "lease":
		storages = []string{"redis", "postgres", "failover"}
	}
	known := slices.Contains([]string{"runtime", "redis", "postgres", "failover"}, c.storage) // check tells of others
	if storages == nil || !known || slices.Contains(storages, c.storage) || flag == "postgres-url" && c.source == "postgres" {
		return nil
	}
	return usage("-%s is given with -storage %s, which does not use it: must be with -storage %s", flag, c.storage, strings.Join(storages, " or "))
}

func (c *config) define(flags *flag.FlagSet) (tokenFile *string) {
	flags.Func("rules", "a `file or folder` of rules; may be given several times", func(s string) error {
		c.rules = append(c.rules, s)
		return nil
	})
	flags.StringVar(&c.source, "source", "files", "where rules are: `files` of -rules, postgres (a table) or memory; the last two begin with -rules and are changed by the admin API")
	flags.StringVar(&c.grpc, "grpc", "localhost:8081", "the `address` for Envoy; empty for none")
	flags.StringVar(&c.http, "http", "localhost:8080", "the `address` for HTTP and forward-auth; empty for none")
	flags.StringVar(&c.admin, "admin", "localhost:8082", "the `address` of the admin API, which needs a token")
	tokenFile = flags.String("admin-token-file", "", "a `file` with the token of the admin API, of at least 16 bytes; or put it in THROTTLERD_ADMIN_TOKEN")
	flags.StringVar(&c.tlsCert, "tls-cert", "", "a `file` with the certificate for -grpc and -http")
	flags.StringVar(&c.tlsKey, "tls-key", "", "a `file` with its key")
	flags.StringVar(&c.tlsClientCA, "tls-client-ca", "", "a `file` with the authorities of clients, which then need a certificate")
	flags.BoolVar(&c.reflection, "reflection", false, "let gRPC clients such as grpcurl ask which methods there are")
	flags.StringVar(&c.storage, "storage", "runtime", "where the counts are: `runtime` (the memory of this process), redis, postgres or failover (redis, and postgres while it fails)")
	flags.BoolVar(&c.lease, "lease", false, "decide busy identifiers in this process, with tokens that it takes ahead from -storage redis, postgres or failover")
	flags.StringVar(&c.redisURL, "redis-url", "", "the `URL` of a server, a cluster or sentinels; or put it in THROTTLERD_REDIS_URL; without both redis://localhost:6379")
	flags.StringVar(&c.postgresURL, "postgres-url", "", "the `URL` of a database; or put it in THROTTLERD_POSTGRES_URL; without both postgres://localhost:5432/postgres")
	flags.DurationVar(&c.redisTimeout, "redis-timeout", 0, "how long Redis may take; 0 is 250ms, or 50ms of a failover")
	flags.DurationVar(&c.postgresTimeout, "postgres-timeout", 0, "how long Postgres may take; 0 is 500ms, or 200ms of a failover")
	flags.BoolVar(&c.redisTag, "redis-slot-by-domain", false, "keep all counts of a domain in one slot of a Redis cluster, so that several rules may limit one request")
	flags.StringVar(&c.onStorageError, "on-storage-error", "deny", "`deny` (Envoy: OVER_LIMIT, HTTP: 503), error (Envoy: UNAVAILABLE, so that its failure_mode_deny decides; HTTP: 503), or allow")
	flags.StringVar(&c.onUnknownDomain, "on-unknown-domain", "deny", "`deny` or allow requests of a domain that has no rules")
	flags.StringVar(&c.domain, "domain", "", "the `domain` of forward-auth requests that name none")
	flags.Func("entry", "a `key=Header` of forward-auth requests that is an entry for rules, such as user=X-User; may be given several times", c.entry)
	flags.Func("trust", "a `network` of proxies before the gateway, whose word about the address of the client is believed; may be given several times", c.trust)
	flags.DurationVar(&c.drain, "drain", 10*time.Second, "at the end, how long requests that have begun may take")
	return tokenFile
}

func (c *config) entry(s string) error {
	key, header, found := strings.Cut(s, "=")
	if !found || key == "" || header == "" {
		return errors.New("must be key=Header")
	}
	if http.CanonicalHeaderKey(header) == "Host" {
		return errors.New(`the header Host is that of throttlerd: the entry "host" is X-Forwarded-Host`)
	}
	if slices.Contains(known, key) {
		return fmt.Errorf("the entry %q is there already", key)
	}
	c.headers = append(c.headers, headerEntry{key, http.CanonicalHeaderKey(header)})
	return nil
}

func (c *config) trust(s string) error {
	p, err := netip.ParsePrefix(s)
	if err != nil {
		return errors.New("must be like 192.0.2.0/24")
	}
	c.trusted = append(c.trusted, p.Masked())
	return nil
}

const leastToken = 16 // bytes

func (c *config) token(file string, env func(string) string) error {
	text := env("THROTTLERD_ADMIN_TOKEN")
	if file != "" {
		data, err := os.ReadFile(file)
		if err != nil {
			return fmt.Errorf("-admin-token-file: %w", err)
		}
		text = string(data)
	}
	c.adminToken = strings.TrimSpace(text) // a Secret made by echo ends with a newline
	if (c.adminToken != "" || file != "") && len(c.adminToken) < leastToken {
		return usage("the token of the admin API has %d bytes, must have at least %d", len(c.adminToken), leastToken)
	}
	return nil
}

// check returns all faults of the flags, joined.
func (c *config) check() error {
	var faults []error
	fault := func(format string, args ...any) { faults = append(faults, usage(format, args...)) }
	one := func(flag, given string, allowed ...string) {
		if !slices.Contains(allowed, given) {
			fault("-%s is %q, must be %s", flag, given, strings.Join(allowed, ", "))
		}
	}
	one("source", c.source, "files", "postgres", "memory")
	one("storage", c.storage, "runtime", "redis", "postgres", "failover")
	one("on-storage-error", c.onStorageError, "deny", "error", "allow")
	one("on-unknown-domain", c.onUnknownDomain, "deny", "allow")
	if c.source == "files" && len(c.rules) == 0 {
		fault("name the rules by -rules, such as -rules ../examples/rules")
	}
	if c.grpc == "" && c.http == "" {
		fault("-grpc and -http are both empty: nobody could ask")
	}
	if (c.tlsCert == "") != (c.tlsKey == "") || c.tlsClientCA != "" && c.tlsCert == "" {
		fault("-tls-cert and -tls-key go together, and -tls-client-ca needs them")
	}
	for flag, d := range map[string]time.Duration{"drain": c.drain, "redis-timeout": c.redisTimeout, "postgres-timeout": c.postgresTimeout} {
		if d < 0 {
			fault("-%s is %v, must be 0 or more", flag, d)
		}
	}
	return errors.Join(faults...)
}

// tls returns nil if no certificate is configured.
func (c *config) tls() (*tls.Config, error) {
	if c.tlsCert == "" {
		return nil, nil //nolint:nilnil // no TLS is no fault
	}
	pair, err := tls.LoadX509KeyPair(c.tlsCert, c.tlsKey)
	if err != nil {
		return nil, fmt.Errorf("-tls-cert and -tls-key: %w", err)
	}
	t := &tls.Config{Certificates: []tls.Certificate{pair}, MinVersion: tls.VersionTLS12}
	if c.tlsClientCA == "" {
		return t, nil
	}
	data, err := os.ReadFile(c.tlsClientCA)
	if err != nil {
		return nil, fmt.Errorf("-tls-client-ca: %w", err)
	}
	t.ClientAuth, t.ClientCAs = tls.RequireAndVerifyClientCert, x509.NewCertPool()
	if !t.ClientCAs.AppendCertsFromPEM(data) {
		return nil, fmt.Errorf("-tls-client-ca: %s has no certificate", c.tlsClientCA)
	}
	return t, nil
}
