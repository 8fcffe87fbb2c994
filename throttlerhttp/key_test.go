package throttlerhttp_test

import (
	"context"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/netip"
	"net/url"
	"slices"
	"strings"
	"testing"

	"github.com/stretchr/testify/assert"
	"github.com/stretchr/testify/require"

	"github.com/go-throttler/throttler/throttlerhttp"
)

// arriving returns a request from the remote address with these lines of a header.
func arriving(remote, header string, lines ...string) *http.Request {
	r := httptest.NewRequest(http.MethodGet, "/", nil)
	r.RemoteAddr = remote
	for _, line := range lines {
		r.Header.Add(header, line)
	}
	return r
}

// saying returns a Key that always has this name.
func saying(name string) throttlerhttp.Key { return func(*http.Request) string { return name } }

func sayingAll(names []string) (keys []throttlerhttp.Key) {
	for _, name := range names {
		keys = append(keys, saying(name))
	}
	return keys
}

func prefixes(s ...string) (p []netip.Prefix) {
	for _, s := range s {
		p = append(p, netip.MustParsePrefix(s))
	}
	return p
}

type userKey struct{}

// userOf returns the user in the context, where an authentication would have put the name.
func userOf(ctx context.Context) string {
	id, _ := ctx.Value(userKey{}).(string)
	return id
}

func loggedIn(r *http.Request, id string) *http.Request {
	return r.WithContext(context.WithValue(r.Context(), userKey{}, id))
}

func TestUserIsTheIDOfTheContext(t *testing.T) {
	t.Parallel()
	r := arriving("192.0.2.1:1234", "")
	assert.Equal(t, "user:42", throttlerhttp.User(userOf)(loggedIn(r, "42")))
	assert.Equal(t, "user:ip:192.0.2.1", throttlerhttp.User(userOf)(loggedIn(r, "ip:192.0.2.1")), "never an address")
	assert.Empty(t, throttlerhttp.User(userOf)(r))
	assert.Empty(t, throttlerhttp.User(nil)(loggedIn(r, "42")))
}

func TestAPIKeyIsAHashAndNeverTheKey(t *testing.T) {
	t.Parallel()
	key := throttlerhttp.APIKey("x-api-key")
	const header = "X-API-Key"
	// printf secret | sha256sum | head -c 32
	assert.Equal(t, "key:2bb80d537b1da3e38bd30361aa855686", key(arriving("", header, "secret")))
	assert.Equal(t, key(arriving("", header, "secret")), key(arriving("", header, "secret", "another")), "the first line counts")
	assert.NotEqual(t, key(arriving("", header, "secret")), key(arriving("", header, "Secret")))
	assert.Empty(t, key(arriving("", "")))
	assert.Empty(t, key(arriving("", header, "")))
	assert.Empty(t, key(arriving("", header, "", "secret")), "as for Header.Get")
	assert.Empty(t, key(&http.Request{}))
	assert.Empty(t, throttlerhttp.APIKey("")(arriving("", header, "secret")))
}

func TestAddressIsThatOfTheConnection(t *testing.T) {
	t.Parallel()
	for remote, want := range map[string]string{
		"192.0.2.1:1234":                  "ip:192.0.2.1",
		"192.0.2.1:0":                     "ip:192.0.2.1",
		"[2001:db8:1:2:3:4:5:6]:1234":     "ip:2001:db8:1:2::/64",
		"[2001:db8::1]:1234":              "ip:2001:db8::/64",
		"[::1]:1234":                      "ip:::/64",
		"[::ffff:192.0.2.1]:1234":         "ip:192.0.2.1",
		"[::ffff:c000:201]:1234":          "ip:192.0.2.1",
		"[fe80::1%eth0]:1234":             "ip:fe80::/64",
		"[fe80::1%25eth0]:1234":           "ip:fe80::/64",
		"":                                "",
		"@":                               "",
		"/run/web.sock":                   "",
		":1234":                           "",
		"192.0.2.1":                       "ip:192.0.2.1",
		"2001:db8:1:2:3:4:5:6":            "ip:2001:db8:1:2::/64",
		"fe80::1%eth0":                    "ip:fe80::/64",
		"::ffff:192.0.2.1":                "ip:192.0.2.1",
		"[fe80::1%eth0]":                  "ip:fe80::/64",
		"192.0.2.1:":                      "",
		"192.0.2.1:http":                  "",
		"192.0.2.1:-1":                    "",
		"192.0.2.1:65536":                 "",
		" 192.0.2.1:1234":                 "",
		"192.0.2.1%eth0:1234":             "",
		"192.0.2:1234":                    "",
		"192.0.2.01:1234":                 "",
		"[192.0.2.1]:1234":                "",
		"[192.0.2.1]":                     "",
		"2001:db8::1":                     "ip:2001:db8::/64",
		"2001:db8::1:1234":                "ip:2001:db8::/64", // read as one address, not as an address with a port
		"2001:db8:1:2:3:4:5:6:1234":       "",
		"[2001:db8::1]":                   "ip:2001:db8::/64",
		"[2001:db8::1]1234":               "",
		"[2001:db8::1:1234":               "",
		"[fe80::1%]:1234":                 "",
		"[]:1234":                         "",
		"[":                               "",
		"]:1":                             "",
		"localhost:1234":                  "",
		"192.0.2.1:1234, 198.51.100.1:80": "",
	} {
		assert.Equal(t, want, throttlerhttp.Address(nil)(arriving(remote, "")), "%q", remote)
	}
	assert.Empty(t, throttlerhttp.Address(nil)(&http.Request{}))
	assert.Equal(t, "ip:192.0.2.1", throttlerhttp.Address(nil)(&http.Request{RemoteAddr: "192.0.2.1:1"}), "no header at all")
}

func TestAddressesOfIPv6ThatShareAPrefixAreOneClient(t *testing.T) {
	t.Parallel()
	for bits, want := range map[int]string{
		-1:  "ip:2001:db8:1:2::/64",
		0:   "ip:2001:db8:1:2::/64",
		1:   "ip:::/1",
		48:  "ip:2001:db8:1::/48",
		56:  "ip:2001:db8:1::/56",
		64:  "ip:2001:db8:1:2::/64",
		127: "ip:2001:db8:1:2:3:4:5:6/127",
		128: "ip:2001:db8:1:2:3:4:5:7/128",
		129: "ip:2001:db8:1:2:3:4:5:7/128",
	} {
		key := throttlerhttp.Address(&throttlerhttp.AddressOptions{IPv6Bits: bits})
		assert.Equal(t, want, key(arriving("[2001:db8:1:2:3:4:5:7]:1234", "")), bits)
		assert.Equal(t, "ip:192.0.2.1", key(arriving("192.0.2.1:1234", "")), bits)
		assert.Equal(t, "ip:192.0.2.1", key(arriving("[::ffff:192.0.2.1]:1234", "")), bits)
	}
}

func TestNoHeaderChangesTheAddressWhenNobodyIsTrusted(t *testing.T) {
	t.Parallel()
	for _, header := range []string{
		"X-Forwarded-For", "X-Real-Ip", "X-Client-Ip", "Cf-Connecting-Ip", "True-Client-Ip", "Forwarded", "Via", "X-Forwarded",
	} {
		for _, o := range []*throttlerhttp.AddressOptions{nil, {}, {Header: header}, {Trusted: []netip.Prefix{{}}}} {
			r := arriving("192.0.2.1:1234", header, "198.51.100.1", "for=198.51.100.1")
			assert.Equal(t, "ip:192.0.2.1", throttlerhttp.Address(o)(r), "%s, %+v", header, o)
		}
	}
}

func TestAddressBelievesTrustedProxiesAndNobodyElse(t *testing.T) {
	t.Parallel()
	trusted := prefixes("10.0.0.0/8", "2001:db8:f::/48", "::ffff:172.16.0.0/108", "fe80::/10")
	for name, c := range map[string]struct {
		remote string
		lines  []string
		want   string
	}{
		"no proxy":                             {"192.0.2.1:1", nil, "192.0.2.1"},
		"a client that pretends to be one":     {"192.0.2.1:1", []string{"198.51.100.1"}, "192.0.2.1"},
		"a client that pretends to be a proxy": {"192.0.2.1:1", []string{"198.51.100.1, 10.0.0.1"}, "192.0.2.1"},
		"a neighbour of the proxies":           {"11.0.0.1:1", []string{"198.51.100.1"}, "11.0.0.1"},

		"one proxy":                             {"10.0.0.1:1", []string{"192.0.2.1"}, "192.0.2.1"},
		"what the client wrote before it":       {"10.0.0.1:1", []string{"198.51.100.1, 192.0.2.1"}, "192.0.2.1"},
		"a proxy that the client made up":       {"10.0.0.1:1", []string{"198.51.100.1, 10.0.0.9, 192.0.2.1"}, "192.0.2.1"},
		"two proxies":                           {"10.0.0.1:1", []string{"198.51.100.1, 192.0.2.1, 10.0.0.2"}, "192.0.2.1"},
		"two proxies, a line each":              {"10.0.0.1:1", []string{"198.51.100.1, 192.0.2.1", "10.0.0.2"}, "192.0.2.1"},
		"a line by the client":                  {"10.0.0.1:1", []string{"198.51.100.1", "192.0.2.1"}, "192.0.2.1"},
		"a line by the client, and two proxies": {"10.0.0.1:1", []string{"198.51.100.1", "192.0.2.1", "10.0.0.2,10.0.0.3"}, "192.0.2.1"},
		"garbage by the client":                 {"10.0.0.1:1", []string{"x, ,\x00,198.51.100.1;, 192.0.2.1"}, "192.0.2.1"},
		"a proxy of IPv6":                       {"[2001:db8:f::1]:1", []string{"198.51.100.1, 2001:db8::1"}, "2001:db8::/64"},
		"proxies of both":                       {"[2001:db8:f::1]:1", []string{"198.51.100.1, 2001:db8::1, 10.0.0.1"}, "2001:db8::/64"},
		"a proxy of IPv4 in IPv6":               {"[::ffff:10.0.0.1]:1", []string{"192.0.2.1"}, "192.0.2.1"},
		"a proxy of IPv4 in IPv6 in the list":   {"10.0.0.1:1", []string{"192.0.2.1, ::ffff:10.0.0.2"}, "192.0.2.1"},
		"a prefix of IPv4 in IPv6":              {"172.31.0.1:1", []string{"192.0.2.1"}, "192.0.2.1"},
		"beside the prefix of IPv4 in IPv6":     {"172.32.0.1:1", []string{"192.0.2.1"}, "172.32.0.1"},
		"a proxy with a zone":                   {"[fe80::1%eth0]:1", []string{"192.0.2.1"}, "192.0.2.1"},

		"spaces and tabs":          {"10.0.0.1:1", []string{" 192.0.2.1 \t, \t10.0.0.2 "}, "192.0.2.1"},
		"ports":                    {"10.0.0.1:1", []string{"192.0.2.1:4321,10.0.0.2:80"}, "192.0.2.1"},
		"IPv6 with a port":         {"10.0.0.1:1", []string{"[2001:db8::1]:4321"}, "2001:db8::/64"},
		"IPv6 in brackets":         {"10.0.0.1:1", []string{"[2001:db8::1]"}, "2001:db8::/64"},
		"IPv4 in IPv6":             {"10.0.0.1:1", []string{"::ffff:192.0.2.1"}, "192.0.2.1"},
		"IPv4 in IPv6 with a port": {"10.0.0.1:1", []string{"[::ffff:192.0.2.1]:80"}, "192.0.2.1"},
		"a zone":                   {"10.0.0.1:1", []string{"2001:db8::1%anything, fe80::1%eth0"}, "2001:db8::/64"},

		"all trusted":                 {"10.0.0.1:1", []string{"10.0.0.4, 10.0.0.3", "10.0.0.2"}, "10.0.0.4"},
		"no header":                   {"10.0.0.1:1", nil, "10.0.0.1"},
		"an empty header":             {"10.0.0.1:1", []string{""}, "10.0.0.1"},
		"nothing but spaces":          {"10.0.0.1:1", []string{" \t"}, "10.0.0.1"},
		"nothing but commas":          {"10.0.0.1:1", []string{",,,"}, "10.0.0.1"},
		"an empty entry":              {"10.0.0.1:1", []string{"198.51.100.1, , 10.0.0.2"}, "10.0.0.2"},
		"an empty entry at the end":   {"10.0.0.1:1", []string{"198.51.100.1,"}, "10.0.0.1"},
		"an empty entry at the start": {"10.0.0.1:1", []string{",10.0.0.2"}, "10.0.0.2"},
		"an empty line":               {"10.0.0.1:1", []string{"198.51.100.1", ""}, "10.0.0.1"},
		"a proxy that hides":          {"10.0.0.1:1", []string{"198.51.100.1, unknown"}, "10.0.0.1"},
		"another that hides":          {"10.0.0.1:1", []string{"198.51.100.1, unknown, 10.0.0.2"}, "10.0.0.2"},
		"a name":                      {"10.0.0.1:1", []string{"198.51.100.1, localhost"}, "10.0.0.1"},
		"no such port":                {"10.0.0.1:1", []string{"192.0.2.1:65536"}, "10.0.0.1"},
		"an empty port":               {"10.0.0.1:1", []string{"192.0.2.1:"}, "10.0.0.1"},
		"half a bracket":              {"10.0.0.1:1", []string{"[2001:db8::1"}, "10.0.0.1"},
		"the other half":              {"10.0.0.1:1", []string{"2001:db8::1]"}, "10.0.0.1"},
		"brackets around IPv4":        {"10.0.0.1:1", []string{"[192.0.2.1]"}, "10.0.0.1"},
		"quotes":                      {"10.0.0.1:1", []string{`"192.0.2.1"`}, "10.0.0.1"},
		"octal":                       {"10.0.0.1:1", []string{"192.0.2.010"}, "10.0.0.1"},
		"a number":                    {"10.0.0.1:1", []string{"3221225985"}, "10.0.0.1"},
		"a prefix":                    {"10.0.0.1:1", []string{"192.0.2.1/32"}, "10.0.0.1"},
		"a zone of IPv4":              {"10.0.0.1:1", []string{"192.0.2.1%eth0"}, "10.0.0.1"},
		"semicolons":                  {"10.0.0.1:1", []string{"192.0.2.1; 198.51.100.1"}, "10.0.0.1"},
		"a space between":             {"10.0.0.1:1", []string{"198.51.100.1 192.0.2.1"}, "10.0.0.1"},
		"a space of Unicode":          {"10.0.0.1:1", []string{"192.0.2.1\u00a0"}, "10.0.0.1"},
		"the header Forwarded":        {"10.0.0.1:1", []string{"for=192.0.2.1;proto=https"}, "10.0.0.1"},

		"a unix socket": {"@", []string{"192.0.2.1"}, ""},
		"nothing":       {"", []string{"192.0.2.1"}, ""},
		"no port":       {"10.0.0.1", []string{"192.0.2.1"}, "192.0.2.1"},
	} {
		want := c.want
		if want != "" {
			want = "ip:" + want
		}
		for _, header := range []string{"", "x-Real-ip"} {
			key := throttlerhttp.Address(&throttlerhttp.AddressOptions{Trusted: trusted, Header: header})
			if header == "" {
				header = "X-Forwarded-For"
			}
			assert.Equal(t, want, key(arriving(c.remote, header, c.lines...)), "%s, %s", name, header)
		}
	}
}

func TestAddressReadsOneHeaderOnly(t *testing.T) {
	t.Parallel()
	r := arriving("10.0.0.1:1", "X-Forwarded-For", "198.51.100.1")
	r.Header.Set("X-Real-IP", "192.0.2.1")
	o := throttlerhttp.AddressOptions{Trusted: prefixes("10.0.0.0/8")}
	assert.Equal(t, "ip:198.51.100.1", throttlerhttp.Address(&o)(r))
	o.Header = "X-Real-IP"
	assert.Equal(t, "ip:192.0.2.1", throttlerhttp.Address(&o)(r))
	o.Header = "CF-Connecting-IP"
	assert.Equal(t, "ip:10.0.0.1", throttlerhttp.Address(&o)(r))
}

func TestKeysCopyWhatTheyAreMadeOf(t *testing.T) {
	t.Parallel()
	o := throttlerhttp.AddressOptions{Trusted: prefixes("10.0.0.0/8")}
	keys := []throttlerhttp.Key{saying("a"), saying("b")}
	address, first, join := throttlerhttp.Address(&o), throttlerhttp.First(keys...), throttlerhttp.Join(keys...)
	o.Trusted[0], o.Header, keys[0] = netip.Prefix{}, "X-Real-IP", nil
	r := arriving("10.0.0.1:1", "X-Forwarded-For", "192.0.2.1")
	assert.Equal(t, "ip:192.0.2.1", address(r))
	assert.Equal(t, "a", first(r))
	assert.Equal(t, "a b", join(r))
}

func TestFirstIsTheFirstKeyThatKnows(t *testing.T) {
	t.Parallel()
	key := throttlerhttp.First(throttlerhttp.User(userOf), nil, throttlerhttp.APIKey("X-API-Key"), throttlerhttp.Address(nil))
	r := arriving("192.0.2.1:1234", "")
	assert.Equal(t, "ip:192.0.2.1", key(r))
	r.Header.Set("X-API-Key", "secret")
	assert.Equal(t, "key:2bb80d537b1da3e38bd30361aa855686", key(r))
	assert.Equal(t, "user:42", key(loggedIn(r, "42")))
	assert.Empty(t, key(arriving("@", "")), "nobody knows")
	assert.Empty(t, throttlerhttp.First()(r))
	assert.Empty(t, throttlerhttp.First(nil)(r))
	unasked := throttlerhttp.Key(func(*http.Request) string { panic("asked") })
	assert.Equal(t, "a", throttlerhttp.First(saying("a"), unasked)(r))
}

func TestJoinIsAllKeysTogetherOrNothing(t *testing.T) {
	t.Parallel()
	key := throttlerhttp.Join(throttlerhttp.User(userOf), throttlerhttp.Address(nil))
	r := arriving("192.0.2.1:1234", "")
	assert.Equal(t, "user:42 ip:192.0.2.1", key(loggedIn(r, "42")))
	assert.Equal(t, "user:a%20b%25 ip:192.0.2.1", key(loggedIn(r, "a b%")))
	assert.Equal(t, "user:"+strings.Repeat("%20", 1000)+" ip:192.0.2.1", key(loggedIn(r, strings.Repeat(" ", 1000))))
	assert.Empty(t, key(r), "nobody is logged in")
	assert.Empty(t, key(loggedIn(arriving("@", ""), "42")))
	assert.Empty(t, throttlerhttp.Join()(r))
	assert.Empty(t, throttlerhttp.Join(nil)(r))
	assert.Empty(t, throttlerhttp.Join(saying("a"), nil)(r))
}

func TestJoinNeverMakesOneKeyOfTwoTuples(t *testing.T) {
	t.Parallel()
	made := map[string]string{}
	for _, tuple := range [][]string{
		{"a"}, {"b"}, {"a", "b"}, {"b", "a"}, {"ab"}, {"a b"}, {"a", "b", "c"}, {"a b", "c"}, {"a", "b c"}, {"a b c"},
		{"a ", "b"}, {"a", " b"}, {"a  b"}, {"a%20b"}, {"a%", "20b"}, {"a%20", "b"}, {"a%2520b"}, {"%"}, {"%25"}, {" "}, {"%20"},
		{"  "}, {" ", " "}, {"\x00"}, {"a\x00b"}, {"\xff", "a"}, {"\ufffd", "a"}, {"a+b"}, {"a\nb"}, {"a\tb"}, {`a\ b`}, {"a,b"},
	} {
		keys := sayingAll(tuple)
		name := throttlerhttp.Join(keys...)(nil)
		require.NotContains(t, made, name, "%q", tuple)
		made[name] = fmt.Sprintf("%q", tuple)
	}
	ab := throttlerhttp.Join(sayingAll([]string{"a", "b"})...)
	assert.NotEqual(t, throttlerhttp.Join(ab, saying("c"))(nil), throttlerhttp.Join(saying("a"), throttlerhttp.Join(saying("b"), saying("c")))(nil))
}

// Not parallel, since it measures.
func TestAKeyAllocatesNothingButItsName(t *testing.T) {
	address := throttlerhttp.Address(nil)
	behind := throttlerhttp.Address(&throttlerhttp.AddressOptions{Trusted: prefixes("10.0.0.0/8")})
	apiKey, user := throttlerhttp.APIKey("X-API-Key"), throttlerhttp.User(userOf)
	const longest = "[ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff]:65535"
	for name, c := range map[string]struct {
		key  throttlerhttp.Key
		r    *http.Request
		most float64
	}{
		"IPv4":                {address, arriving("255.255.255.255:65535", "X-Forwarded-For", "192.0.2.1"), 1},
		"IPv6":                {address, arriving(longest, ""), 1},
		"IPv6, all of it":     {throttlerhttp.Address(&throttlerhttp.AddressOptions{IPv6Bits: 128}), arriving(longest, ""), 1},
		"IPv6 with a zone":    {address, arriving("[fe80::1%eth0]:1234", ""), 1},
		"IPv4 in IPv6":        {address, arriving("[::ffff:192.0.2.1]:1234", ""), 1},
		"behind proxies":      {behind, arriving("10.0.0.1:1", "X-Forwarded-For", "198.51.100.1, [2001:db8::1%x]:80, 10.0.0.3", "10.0.0.2:80"), 1},
		"an API key":          {apiKey, arriving("", "X-API-Key", strings.Repeat("k", 128)), 1},
		"an API key of 1 KiB": {apiKey, arriving("", "X-API-Key", strings.Repeat("k", 1024)), 2},
		"a user":              {user, loggedIn(arriving("", ""), "42"), 1},
		"the first":           {throttlerhttp.First(user, apiKey, address), arriving("192.0.2.1:1234", ""), 1},
		"two joined":          {throttlerhttp.Join(user, address), loggedIn(arriving("192.0.2.1:1234", ""), "4 2"), 3},
	} {
		assert.LessOrEqual(t, testing.AllocsPerRun(1000, func() {
			if c.key(c.r) == "" {
				panic("nobody")
			}
		}), c.most, name)
	}
}

// believed is a second implementation of Address, which collects all entries in a row, nearest first.
func believed(remote string, lines []string, trusted []netip.Prefix) netip.Addr {
	row := append(strings.Split(strings.Join(lines, ","), ","), remote)
	slices.Reverse(row)
	var at netip.Addr
	for i, entry := range row {
		if i > 0 {
			if !slices.ContainsFunc(trusted, func(p netip.Prefix) bool { return p.Contains(at) }) {
				break
			}
			entry = strings.Trim(entry, " \t")
		}
		next := entryOf(entry)
		if !next.IsValid() {
			break
		}
		at = next.WithZone("").Unmap()
	}
	return at
}

// entryOf returns the address of an entry, which may have a port.
func entryOf(entry string) netip.Addr {
	if port, err := netip.ParseAddrPort(entry); err == nil {
		return port.Addr()
	}
	bare, ok := strings.CutSuffix(entry, "]")
	if ok {
		if bare, ok = strings.CutPrefix(bare, "["); !ok {
			return netip.Addr{}
		}
	}
	addr, err := netip.ParseAddr(bare)
	if err != nil || ok && addr.Is4() {
		return netip.Addr{}
	}
	return addr
}

// FuzzAddress checks that without Trusted only RemoteAddr matters. With it the answer must be that of a second
// implementation, and the address must be that of RemoteAddr or of an entry.
func FuzzAddress(f *testing.F) {
	f.Add("192.0.2.1:1234", "198.51.100.1", "", 0)
	f.Add("10.0.0.1:1", "198.51.100.1, [2001:db8::1]:80, 10.0.0.3:80", "10.0.0.2, ::ffff:10.0.0.4", 128)
	f.Add("[2001:db8:f::1]:1", "2001:db8::1%eth0, [2001:db8:f::2]", " , ", 48)
	f.Add("[fe80::1%eth0]:1", "[::1%a]b]:80", "192.0.2.1%a:80, unknown", 1)
	f.Add("0::1%eth0]", "::1%a]:80", "", 1)
	f.Add("@", "192.0.2.1:65536", "[192.0.2.1]:1,[", -1)
	f.Fuzz(func(t *testing.T, remote, first, second string, bits int) {
		o := throttlerhttp.AddressOptions{IPv6Bits: bits}
		r := arriving(remote, "X-Forwarded-For", first, second)
		require.Equal(t, throttlerhttp.Address(&o)(arriving(remote, "")), throttlerhttp.Address(&o)(r))

		o.Trusted = prefixes("10.0.0.0/8", "2001:db8:f::/48", "fe80::/10")
		got := throttlerhttp.Address(&o)(r)
		addr := believed(remote, []string{first, second}, o.Trusted)
		if !addr.IsValid() {
			require.Empty(t, got)
			return
		}
		if addr.Is4() {
			require.Equal(t, "ip:"+addr.String(), got)
			return
		}
		if bits < 1 {
			bits = 64
		}
		network, err := addr.Prefix(min(bits, 128))
		require.NoError(t, err)
		require.Equal(t, "ip:"+network.String(), got)
	})
}

// FuzzJoin checks that the names can be read back from each joined key, so that different names make different keys.
func FuzzJoin(f *testing.F) {
	f.Add("user:42", "ip:192.0.2.1", "user:42 ip:192.0.2.1", "a", uint8(2))
	f.Add("a ", "b", "a", " b", uint8(2))
	f.Add("a%20b", "a", "b", "%25", uint8(1))
	f.Add("\xff", "\x00", "\n", "", uint8(3))
	f.Fuzz(func(t *testing.T, a, b, c, d string, n uint8) {
		names := []string{a, b, c, d}
		var made [2]string
		tuples := [2][]string{names[:n%5], names[n%5:]}
		for i, tuple := range tuples {
			made[i] = throttlerhttp.Join(sayingAll(tuple)...)(nil)
			if len(tuple) == 0 || slices.Contains(tuple, "") {
				require.Empty(t, made[i])
				return
			}
			var read []string
			for part := range strings.SplitSeq(made[i], " ") {
				name, err := url.PathUnescape(part)
				require.NoError(t, err)
				read = append(read, name)
			}
			require.Equal(t, tuple, read)
		}
		require.Equal(t, slices.Equal(tuples[0], tuples[1]), made[0] == made[1])
	})
}

func BenchmarkAddress(b *testing.B) {
	o := throttlerhttp.AddressOptions{Trusted: prefixes("10.0.0.0/8")}
	for _, c := range []struct {
		name string
		key  throttlerhttp.Key
		r    *http.Request
	}{
		{"IPv4", throttlerhttp.Address(nil), arriving("192.0.2.1:1234", "")},
		{"IPv6", throttlerhttp.Address(nil), arriving("[2001:db8:1:2:3:4:5:6]:1234", "")},
		{"TwoProxies", throttlerhttp.Address(&o), arriving("10.0.0.1:1234", "X-Forwarded-For", "198.51.100.1, 192.0.2.1, 10.0.0.2")},
	} {
		b.Run(c.name, func(b *testing.B) {
			b.ReportAllocs()
			for b.Loop() {
				c.key(c.r)
			}
		})
	}
}

func BenchmarkAPIKey(b *testing.B) {
	key, r := throttlerhttp.APIKey("X-API-Key"), arriving("", "X-API-Key", strings.Repeat("k", 40))
	b.ReportAllocs()
	for b.Loop() {
		key(r)
	}
}
