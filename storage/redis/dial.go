package redis

import (
	"cmp"
	"errors"
	"fmt"
	neturl "net/url"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// maxPool is the largest pool_size, as go-redis allocates so much for each node when it first needs it.
const maxPool = 1 << 16

// dial makes the client of a url, with the timeouts that it does not give. Some urls go-redis parses, and
// then panics.
func dial(url string, timeout time.Duration) (client goredis.UniversalClient, err error) {
	defer func() {
		if fault := recover(); fault != nil {
			err = fmt.Errorf("%v", fault)
		}
	}()
	u, err := neturl.Parse(url)
	if e := (*neturl.Error)(nil); errors.As(err, &e) {
		return nil, e.Err // without the url, in which a password may be
	} else if err != nil {
		return nil, err
	}
	complete := func(retries, dials *int, pool int, timeouts ...*time.Duration) {
		if pool > maxPool {
			panic(fmt.Sprintf("pool_size is %d, must be at most %d", pool, maxPool))
		}
		*retries, *dials = cmp.Or(*retries, -1), cmp.Or(*dials, 1)
		for _, t := range timeouts {
			*t = cmp.Or(*t, timeout)
		}
	}
	switch {
	case u.Query().Has("master_name"):
		o, err := goredis.ParseFailoverURL(url)
		if err != nil {
			return nil, err
		}
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewFailoverClient(o), nil
	case u.Query().Has("addr"):
		o, err := goredis.ParseClusterURL(url)
		if err != nil {
			return nil, err
		}
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		o.DisableRoutingPolicies = true // which need the right to COMMAND, and matter to other commands
		return goredis.NewClusterClient(o), nil
	default:
		o, err := goredis.ParseURL(url)
		if err != nil {
			return nil, err
		}
		complete(&o.MaxRetries, &o.DialerRetries, o.PoolSize, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewClient(o), nil
	}
}
