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

// maxPool is the largest pool_size, as go-redis allocates so much for each node when it first needs it.
const maxPool = 1 << 16

// maxIdle is how long a connection may be idle before it is replaced: less than the shortest time, of the usual
// clouds, after which a balancer or an address translator forgets it without a word. That is Azure's 4 minutes;
// go-redis's default is half an hour.
const maxIdle = 3 * time.Minute

// dial makes the client of a url, with the times that it does not give. Some urls go-redis parses, and then
// panics.
func dial(url string, timeout time.Duration) (client goredis.UniversalClient, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	if err := check(url); err != nil {
		return nil, err
	}
	complete := func(retries, dials *int, pool int, idle *time.Duration, timeouts ...*time.Duration) {
		if pool > maxPool {
			panic(fmt.Sprintf("pool_size is %d, must be at most %d", pool, maxPool))
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
		o.DisableRoutingPolicies = true // which need the right to COMMAND, and matter to other commands
		return goredis.NewClusterClient(o), nil
	case *goredis.Options:
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.ConnMaxIdleTime, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewClient(o), nil
	}
	return nil, errors.New("go-redis does not take these parameters together")
}

// options are those of the client for a url, or nil if go-redis does not take it.
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

// encode is what helps where a password breaks the url.
const encode = "in user, password and parameters each of @ / ? # & ; % and spaces must be percent-encoded, as @ is %40"

// check says what is wrong with a url, in words of its own: those of net/url and go-redis quote what they cannot
// read, which is a piece of the password if a character of that is not encoded.
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

type example struct{ value, what string }

// examples are values of each kind that a parameter may have. A number is also a duration, and 1 is also true.
var examples = []example{
	{"true", "true or false"}, {"1s", "a duration, such as 250ms"}, {"1", "a number"}, {"localhost:1", "host:port"},
}

// nameable is what an unknown parameter must look like to be told.
var nameable = regexp.MustCompile(`^[A-Za-z_]{1,40}$`)

// checkParameters asks go-redis about each parameter alone.
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
	secret := false // a password was before, of which this may be the rest
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

// sentinels says that a client asks sentinels for its server. It may wait for what they answer to another command.
func sentinels(c *goredis.Client) bool { return c.Options().Addr == "FailoverClient" }
