package redis

import (
	"cmp"
	"errors"
	"fmt"
	neturl "net/url"
	"regexp"
	"slices"
	"strings"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// maxPool is the largest pool_size that is accepted: go-redis allocates a pool of that size for each node at its first
// use.
const maxPool = 1 << 16

// maxIdle is how long a connection may be idle before it is replaced. Balancers and address translators forget an idle
// connection and tell neither end. Of the usual clouds Azure does so first, after 4 minutes; go-redis's default is half
// an hour.
const maxIdle = 3 * time.Minute

// dial makes the client of a url and sets the times that the url leaves out. A panic is an error of the url: go-redis
// parses some urls for which it then cannot make a client.
func dial(url string, timeout time.Duration) (client goredis.UniversalClient, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	if err := check(url); err != nil {
		return nil, err
	}
	complete := func(retries, dials *int, pool int, idle, dial *time.Duration, timeouts ...*time.Duration) {
		if pool < 0 || pool > maxPool {
			panic(fmt.Sprintf("pool_size is %d, must be from 0 to %d", pool, maxPool))
		}
		if *dial <= 0 { // below 0 it was switched off, and then a dial of go-redis fails at once
			*dial = timeout
		}
		*retries, *dials, *idle = cmp.Or(*retries, -1), cmp.Or(*dials, 1), cmp.Or(*idle, maxIdle)
		for _, t := range timeouts {
			*t = cmp.Or(*t, timeout)
		}
	}
	switch o := options(url).(type) {
	case *goredis.FailoverOptions:
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.ConnMaxIdleTime, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewFailoverClient(o), nil
	case *goredis.ClusterOptions:
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.ConnMaxIdleTime, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		o.DisableRoutingPolicies = true // they need the right to COMMAND, and matter only to other commands
		return goredis.NewClusterClient(o), nil
	case *goredis.Options:
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.ConnMaxIdleTime, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewClient(o), nil
	}
	return nil, errors.New("go-redis does not take these parameters together")
}

// options returns the options that go-redis parses from a url, or nil if it rejects the url.
func options(url string) any {
	u, err := neturl.Parse(url)
	if err != nil {
		return nil
	}
	switch q := u.Query(); {
	case q.Has("master_name"):
		if o, err := goredis.ParseFailoverURL(url); err == nil {
			return o
		}
	case q.Has("addr"):
		if o, err := goredis.ParseClusterURL(url); err == nil {
			return o
		}
	default:
		if o, err := goredis.ParseURL(url); err == nil {
			return o
		}
	}
	return nil
}

// encode is the advice for a url that may be broken by an unencoded password.
const encode = "in user, password and parameters each of @ / ? # & ; % and spaces must be percent-encoded, as @ is %40"

// check returns an error that says what is wrong with a url, or nil. It never passes on an error of net/url or
// go-redis: they quote what they cannot read, and that is a piece of the password if the password is not encoded.
func check(url string) error {
	scheme, rest, found := strings.Cut(url, "://")
	scheme = strings.ToLower(scheme)
	if !found || scheme != "redis" && scheme != "rediss" && scheme != "unix" {
		return errors.New("it must begin with redis://, rediss:// or unix://")
	}
	path, query, _ := strings.Cut(rest, "?")
	authority, _, _ := strings.Cut(path, "/")
	user, host := "", authority
	if at := strings.LastIndex(authority, "@"); at >= 0 {
		user, host = authority[:at], authority[at+1:]
	}
	path = path[len(authority):]
	parses := func(url string) bool {
		_, err := neturl.Parse(url)
		return err == nil
	}
	switch {
	case strings.Contains(url, "#"):
		return errors.New("it has a #: " + encode)
	case strings.Contains(path, "@") && (scheme != "unix" || host != ""):
		return errors.New("it has an @ after the host: " + encode)
	case !parses("redis://" + user + "@localhost"):
		return errors.New("the user or the password is not encoded: " + encode)
	case !parses("redis://" + host):
		return errors.New("the host or the port is wrong: the port must be a number; " + encode)
	case !parses(url):
		return errors.New("it cannot be parsed: " + encode)
	case scheme == "unix" && options("unix://"+path) == nil:
		return errors.New("there must be the path of a socket after unix://")
	case scheme != "unix" && options("redis://localhost"+path) == nil:
		return errors.New("the path must be the number of a database")
	}
	err := checkParameters(scheme, query)
	if err != nil && strings.Contains(query, "@") {
		return errors.New("it has an @ after the ?, and a fault: " + encode)
	}
	return err
}

// example is a value of a parameter, and the name of its type for an error.
type example struct{ value, what string }

// examples has a value of each type of parameter, the narrowest type first: a duration may also be a number, and a
// boolean may also be 1.
var examples = []example{
	{"true", "true or false"}, {"1s", "a duration, such as 250ms"}, {"1", "a number"}, {"localhost:1", "host:port"},
}

// nameable matches the unknown parameters that an error may name. Anything else could be a piece of a password.
var nameable = regexp.MustCompile(`^[A-Za-z_]{1,40}$`)

// checkParameters lets go-redis parse each parameter alone, and says which one it rejects. A name is known if go-redis
// accepts it with one of the examples.
func checkParameters(scheme, query string) error {
	alone := scheme + "://localhost/0?"
	switch {
	case strings.Contains("&"+query, "&master_name="):
		alone += "master_name=main&"
	case strings.Contains("&"+query, "&addr="):
		alone += "addr=localhost:1&"
	}
	if options(alone) == nil {
		return errors.New("a socket has neither addr nor master_name")
	}
	secret := false // a password came before, and an unencoded & in it may have made this parameter
	for pair := range strings.SplitSeq(query, "&") {
		if pair == "" {
			continue
		}
		rawKey, rawValue, _ := strings.Cut(pair, "=")
		key, fault := neturl.QueryUnescape(rawKey)
		takes := func(value string) bool { return options(alone+rawKey+"="+value) != nil }
		known := -1
		if fault == nil && !strings.Contains(rawKey, ";") {
			known = slices.IndexFunc(examples, func(e example) bool { return takes(e.value) })
		}
		value, err := neturl.QueryUnescape(rawValue)
		switch {
		case known < 0 && secret:
			return errors.New("a parameter after the password is unknown: " + encode)
		case known < 0 && !nameable.MatchString(key):
			return errors.New("the name of a parameter is unknown: " + encode)
		case known < 0:
			return fmt.Errorf("the parameter %s is unknown", key)
		case err != nil || strings.Contains(pair, ";"):
			return fmt.Errorf("the value of the parameter %s is not encoded: %s", key, encode)
		case !takes(rawValue), key == "addr" && strings.Contains(value, "@"):
			return fmt.Errorf("the value of the parameter %s must be %s", key, examples[known].what)
		}
		secret = secret || key == "password"
	}
	return nil
}

// sentinels reports whether a client asks sentinels for its server. A command of such a client may have to wait until
// the sentinels have answered for another command, and its own context does not end that.
func sentinels(c *goredis.Client) bool { return c.Options().Addr == "FailoverClient" }
