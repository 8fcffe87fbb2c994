package redis_test

import (
	"context"
	"fmt"
	"net/url"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/internal/servers"
	"github.com/go-throttler/throttler/internal/storecheck"
	redisstore "github.com/go-throttler/throttler/storage/redis"
)

// secretPlaces are URLs with a star where somebody may have put a password, encoded or not.
var secretPlaces = []string{
	"redis://:*@127.0.0.1", "redis://user:*@127.0.0.1:6379/0", "redis://*@127.0.0.1", "rediss://user:*@127.0.0.1?protocol=3", "unix://user:*@/run/redis.sock?db=1",
	"redis://user:*@127.0.0.1:6379?addr=127.0.0.1:6379&addr=127.0.0.1:6379", "redis://user:*@127.0.0.1:26379?master_name=main&username=app&password=x",
	"redis://127.0.0.1:26379?master_name=main&password=*", "redis://127.0.0.1:26379?password=*&master_name=main&db=1", "redis://127.0.0.1:26379?master_name=main&passwrod=*",
	"redis://127.0.0.1?password=*", "redis://127.0.0.1:6379?addr=127.0.0.1:6379&password=*", "redis://127.0.0.1?addr=*@127.0.0.1:6379", "redis://127.0.0.1?addr=user:*@127.0.0.1:6379",
	"redis:*@127.0.0.1", "user:*@127.0.0.1", "http://user:*@127.0.0.1", "redis:///user:*@127.0.0.1",
}

func FuzzOpenDoesNotTellThePassword(f *testing.F) {
	for _, s := range [][3]string{
		{"", "", ""}, {"p/", "", "#x"}, {"1/", "", ""}, {"1#", "", ""}, {"1?", "=", ""}, {"x@", "/", ""}, {"x@", "#", "?"}, {"", "%", "zz"}, {"", "%zz", ""}, {"p&", "=", ""}, {"p&db=", "", ""},
		{"a b", "\t", "\n"}, {"", ";", ""}, {"://", "://", ""}, {"[", "]", ":"}, {"\x00", "\x7f", "é"}, {"%00", "%", "%40"}, {"1?db=", "@", ""}, {"p;", "=", ""}, {"&", "&", "&"}, {":", ":", ":1"},
	} {
		f.Add(s[0], s[1], s[2])
	}
	f.Fuzz(func(t *testing.T, before, between, after string) {
		const first, second = "hunter", "swordfish" // the pieces that no error may contain
		raw := before + first + between + second + after
		for _, secret := range []string{raw, url.QueryEscape(raw)} {
			for _, place := range secretPlaces {
				given := strings.Replace(place, "*", secret, 1)
				s, err := redisstore.Open(given, nil)
				if err == nil {
					require.NoError(t, s.Close(context.Background()), "%q", given)
					continue
				}
				var fault *redisstore.OptionError
				require.ErrorAs(t, err, &fault, "%q", given)
				assert.NotContains(t, strings.ToLower(err.Error()), first, "%q", given)
				assert.NotContains(t, strings.ToLower(err.Error()), second, "%q", given)
			}
		}
	})
}

func TestTheErrorOfAWrongURLSaysWhatIsWrong(t *testing.T) {
	t.Parallel()
	for url, said := range map[string]string{
		"":                                                        "must begin with redis://, rediss:// or unix://",
		"redis:secret@127.0.0.1":                                  "must begin with redis://, rediss:// or unix://",
		"http://:secret@127.0.0.1":                                "must begin with redis://, rediss:// or unix://",
		"redis://:p/ss#x@127.0.0.1":                               "it has a #",
		"redis://:p/ss@127.0.0.1":                                 "it has an @ after the host",
		"redis://:p?ss@127.0.0.1":                                 "the port must be a number",
		"redis://:12?secret=x@127.0.0.1":                          "it has an @ after the ?",
		"redis://:%zz@127.0.0.1":                                  "the user or the password is not encoded",
		"redis://:sec ret@127.0.0.1":                              "the user or the password is not encoded",
		"redis://:secret@127.0.0.1:port":                          "the port must be a number",
		"redis://:secret@127.0.0.1/zero":                          "the path must be the number of a database",
		"redis://cache/a?addr=127.0.0.1:1":                        "the path must be the number of a database",
		"unix://user:secret@?db=1":                                "the path of a socket",
		"unix:///run/redis.sock?addr=a:1":                         "neither addr nor master_name",
		"redis://cache?passwrod=secret":                           "the parameter passwrod is unknown",
		"redis://cache?secret":                                    "the parameter secret is unknown",
		"redis://cache?read_timeout=secret":                       "the value of the parameter read_timeout must be a duration",
		"redis://cache?pool_size=secret":                          "the value of the parameter pool_size must be a number",
		"redis://cache?pool_size=-1":                              "pool_size is -1, must be from 0 to 65536",
		"redis://cache?pool_fifo=secret":                          "the value of the parameter pool_fifo must be true or false",
		"redis://cache?skip_verify=true":                          "the parameter skip_verify is unknown",
		"redis://cache?client_name=%zz":                           "the value of the parameter client_name is not encoded",
		"redis://cache?%zz=1":                                     "the name of a parameter is unknown",
		"redis://127.0.0.1?addr=b":                                "the value of the parameter addr must be host:port",
		"redis://127.0.0.1?addr=secret@b:1":                       "it has an @ after the ?",
		"redis://127.0.0.1?addr=secret%40b:1":                     "the value of the parameter addr must be host:port",
		"redis://127.0.0.1?master_name=%zz":                       "the value of the parameter master_name is not encoded",
		"redis://127.0.0.1?master_name=m&password=%":              "the value of the parameter password is not encoded",
		"redis://127.0.0.1?master_name=m&password=;":              "the value of the parameter password is not encoded",
		"redis://127.0.0.1?master_name=m&password=&x":             "a parameter after the password is unknown",
		"redis://127.0.0.1?idle_timeout=1s&conn_max_idle_time=1s": "together",
	} {
		_, err := redisstore.Open(url, nil)
		assert.ErrorContains(t, err, said, "%q", url)
	}
}

func TestUsualURLsAreOpened(t *testing.T) {
	t.Parallel()
	for _, url := range []string{
		"redis://localhost", "REDIS://localhost:6379/", "redis://:@localhost/0", "redis://user:p%40ss%2Fw%23x%3F@localhost/5?db=1", "redis://user:a:b!$&'()*+,;=~@localhost",
		"redis://[::1]:6379/0", "rediss://localhost?skip_verify=true&&protocol=2", "redis://localhost?read_timeout=1&write_timeout=-1&pool_fifo=1&pool_size=", "redis:///1",
		"unix:///run/a@b/redis.sock?db=1", "unix://user:pass@/run/redis.sock", "redis://127.0.0.1?addr=[::1]:1&addr=127.0.0.1:2&client_name=x%20y", "redis://127.0.0.1?pool_fifo",
		"redis://user:pass@127.0.0.1?master_name=m&username=u&password=p@ss+%26%3B&addr=127.0.0.1:1", "redis://127.0.0.1?idle_timeout=1m", "redis://127.0.0.1?conn_max_lifetime_jitter=1s&conn_max_lifetime=1m",
	} {
		s, err := redisstore.Open(url, nil)
		if assert.NoError(t, err, "%q", url) {
			assert.NoError(t, s.Close(context.Background()))
		}
	}
}

// go-redis takes 0 for no timeout, and then every dial fails at once.
func TestAURLWithoutATimeoutWorks(t *testing.T) {
	t.Parallel()
	url := servers.Redis(t).URL()
	for _, parameter := range []string{"dial_timeout", "read_timeout", "write_timeout", "pool_timeout"} {
		for _, value := range []string{"0", "-1", "0s"} {
			s := open(t, fmt.Sprintf("%s?%s=%s", url, parameter, value), redisstore.Options{})
			_, err := storecheck.Decide(context.Background(), s, storecheck.FivePerHour(t, parameter+value))
			assert.NoError(t, err, "%s=%s", parameter, value)
		}
	}
}
