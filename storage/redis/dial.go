package redis

import (
	"cmp"
	neturl "net/url"
	"time"

	goredis "github.com/redis/go-redis/v9"
)

// dial makes the client of a url, with the timeouts that it does not give.
func dial(url string, timeout time.Duration) (goredis.UniversalClient, error) {
	u, err := neturl.Parse(url)
	if err != nil {
		return nil, err
	}
	complete := func(retries *int, timeouts ...*time.Duration) {
		*retries = cmp.Or(*retries, 1)
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
		complete(&o.DialerRetries, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewFailoverClient(o), nil
	case u.Query().Has("addr"):
		o, err := goredis.ParseClusterURL(url)
		if err != nil {
			return nil, err
		}
		complete(&o.DialerRetries, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewClusterClient(o), nil
	default:
		o, err := goredis.ParseURL(url)
		if err != nil {
			return nil, err
		}
		complete(&o.DialerRetries, &o.DialTimeout, &o.ReadTimeout, &o.WriteTimeout)
		return goredis.NewClient(o), nil
	}
}
