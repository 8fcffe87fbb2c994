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
	switch {
	case u.Query().Has("master_name"):
		o, err := goredis.ParseFailoverURL(url)
		if err != nil {
			return nil, err
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout = cmp.Or(o.DialTimeout, timeout), cmp.Or(o.ReadTimeout, timeout), cmp.Or(o.WriteTimeout, timeout)
		o.DialerRetries = cmp.Or(o.DialerRetries, 1)
		return goredis.NewFailoverClient(o), nil
	case u.Query().Has("addr"):
		o, err := goredis.ParseClusterURL(url)
		if err != nil {
			return nil, err
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout = cmp.Or(o.DialTimeout, timeout), cmp.Or(o.ReadTimeout, timeout), cmp.Or(o.WriteTimeout, timeout)
		o.DialerRetries = cmp.Or(o.DialerRetries, 1)
		return goredis.NewClusterClient(o), nil
	default:
		o, err := goredis.ParseURL(url)
		if err != nil {
			return nil, err
		}
		o.DialTimeout, o.ReadTimeout, o.WriteTimeout = cmp.Or(o.DialTimeout, timeout), cmp.Or(o.ReadTimeout, timeout), cmp.Or(o.WriteTimeout, timeout)
		o.DialerRetries = cmp.Or(o.DialerRetries, 1)
		return goredis.NewClient(o), nil
	}
}
