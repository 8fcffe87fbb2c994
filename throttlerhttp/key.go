// The client that a request counts for, and its identifiers in the Throttler.

package throttlerhttp

import (
	"context"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"net/http"
	"net/netip"
	"slices"
	"strconv"
	"strings"

	"github.com/go-throttler/throttler/internal/law"
)

// Key names the client that a request counts for, such as "user:42". It returns "" if it knows none; First then tries its
// next key. If the Key of the middleware itself returns "", this is a fault of the program: the request is answered 500
// and not counted.
//
// A nil Key knows no client. The keys of this package are safe for concurrent use, and keep nothing between requests. A
// name may have any bytes and any length (see [RouteIdentifier]).
type Key func(*http.Request) string

// of returns the name, or "" if the Key is nil.
func (k Key) of(r *http.Request) string {
	if k == nil {
		return ""
	}
	return k(r)
}

// User returns a Key that is "user:" followed by the id in the context of the request, such as "user:42". Middleware that
// authenticates must have put the id there. The name is "" if id is nil or returns "", as for visitors who are not logged
// in.
func User(id func(context.Context) string) Key {
	return func(r *http.Request) string {
		if id == nil {
			return ""
		}
		if u := id(r.Context()); u != "" {
			return "user:" + u
		}
		return ""
	}
}

// APIKey returns a Key that is "key:" followed by a hash of the header's value: the first 16 bytes of its SHA-256 in hex. It
// is hashed because an API key is a secret, and identifiers appear in errors, logs and storages. API keys have to be long
// and random, since a short one can be guessed from its hash. Spaces around the value do not count. The name is "" if the
// header is missing or empty.
//
// If there are several lines the first one counts, as for Header.Get. The authentication should read that line too: if it
// reads another one, clients can make up the first.
//
// Authorization and Proxy-Authorization begin with a scheme, whose case does not matter (RFC 9110, section 11.1), and any
// number of spaces after it: "Bearer abc" and "bearer  abc" are one key. Basic credentials are decoded before they are
// compared. If a scheme's value changes with each request, as that of Digest does, each request has a new key.
//
// APIKey does not check that the key was ever issued. A client that makes up a key for each request gets a fresh limit for
// each one, also if the key is joined with Address. Use APIKey behind an authentication that rejects unknown keys.
func APIKey(header string) Key {
	header = http.CanonicalHeaderKey(header)
	authorization := header == "Authorization" || header == "Proxy-Authorization"
	return func(r *http.Request) string {
		value := r.Header.Get(header)
		if value = strings.Trim(value, " \t"); value == "" {
			return ""
		}
		var room [128]byte // a longer value costs a second allocation
		of := room[:0]
		if authorization {
			of = appendCredentials(of, value)
		} else {
			of = append(of, value...)
		}
		sum := sha256.Sum256(of)
		return string(hex.AppendEncode(append(room[:0], "key:"...), sum[:16]))
	}
}

// appendCredentials appends the value of a field such as Authorization in one form for all values that mean the same. A
// value without a scheme stays as it is.
func appendCredentials(b []byte, value string) []byte {
	end := strings.IndexAny(value, " \t")
	if end < 0 {
		return append(b, value...)
	}
	from := len(b)
	for i := range end {
		c := value[i]
		if 'A' <= c && c <= 'Z' {
			c += 'a' - 'A'
		}
		b = append(b, c)
	}
	basic := string(b[from:]) == "basic"
	b, value = append(b, ' '), strings.TrimLeft(value[end:], " \t")
	if basic {
		if decoded, err := base64.StdEncoding.AppendDecode(b, []byte(value)); err == nil {
			decoded[len(b)-1] = ':' // a Basic value that cannot be decoded keeps its space here, so the two never meet
			return decoded
		}
	}
	return append(b, value...)
}

// AddressOptions says which proxies Address trusts, and which addresses are one client. The zero value trusts no proxy.
// Address copies it.
type AddressOptions struct {
	// Trusted are the addresses of your own proxies, whose word about the client's address is believed. There are
	// none by default, and then no header is read. List the proxies and nothing wider: whoever reaches this server
	// from a trusted address may claim to be anybody. An invalid prefix has no addresses. A prefix of link-local
	// addresses covers those of all interfaces, since prefixes have no zone.
	Trusted []netip.Prefix

	// Header is the header that the proxies set, by default X-Forwarded-For. It has addresses separated by commas;
	// the last one is the peer of the nearest proxy. A header with one address, such as X-Real-IP or
	// CF-Connecting-IP, is a list of one. Each trusted proxy has to append the address of its peer or to replace the
	// header. If one passes on the header as it came, clients can choose their address. The syntax of the header
	// Forwarded is not read: with it all requests that come through a proxy count for the proxy.
	Header string

	// IPv6Bits, from 1 to 128, is the length of the prefix that the IPv6 addresses of one client share. Below 1 it
	// means the default, 64; above 128 it means 128. A provider gives each client at least a /64, and the client may
	// change the other bits with each request.
	IPv6Bits int
}

// Address returns a Key that is the address of the client: "ip:192.0.2.1", or for IPv6 the prefix,
// "ip:2001:db8:1:2::/64". With nil options, or without Trusted, it is Request.RemoteAddr, and no header can change it.
//
// With Trusted the search for the client begins at RemoteAddr. As long as an address is trusted, the search goes on to the
// next entry of the header, from the last entry to the first, over all lines. The first address that is not trusted is the
// client's, because the client may have written everything before it. If all are trusted, the first entry of the header is
// the client's.
//
// Addresses may have a port; IPv6 addresses are then in brackets. Any other entry, such as "unknown" or an empty one, ends
// the search, and the trusted address after it counts. The proxy that wrote such an entry hides its client, and this client
// may have written everything before it.
//
// IPv4 in IPv6, ::ffff:192.0.2.1, is IPv4. The zone of a link-local address, the %eth0 of fe80::1%eth0, is left out. It
// means something on one machine only, and a client could write a new one into the header with each request.
//
// RemoteAddr has a port, unless it was set by middleware that reads headers, such as RealIP of chi or ProxyHeaders of
// gorilla. These believe any client that writes the header, and then so does this key.
//
// If RemoteAddr is not an address the name is "" and no header is read, even with Trusted. On a unix socket RemoteAddr is
// "@", "" or a path. Use another key there, or First of this one and a Key that answers for all.
func Address(o *AddressOptions) Key {
	if o == nil {
		o = &AddressOptions{}
	}
	a := addresses{header: "X-Forwarded-For", bits: 64}
	if o.Header != "" {
		a.header = http.CanonicalHeaderKey(o.Header)
	}
	if o.IPv6Bits >= 1 {
		a.bits = min(o.IPv6Bits, 128)
	}
	for _, p := range o.Trusted {
		if p.Addr().Is4In6() && p.Bits() >= 96 {
			p = netip.PrefixFrom(p.Addr().Unmap(), p.Bits()-96) // parseAddress unmaps the addresses too
		}
		a.trusted = append(a.trusted, p)
	}
	return a.key
}

// addresses is AddressOptions with the defaults filled in.
type addresses struct {
	trusted []netip.Prefix
	header  string // canonical
	bits    int
}

func (a *addresses) key(r *http.Request) string {
	addr := parseAddress(r.RemoteAddr)
	if !addr.IsValid() {
		return ""
	}
	if a.trusts(addr) {
		addr = a.walk(addr, r.Header[a.header])
	}
	var room [len("ip:") + 8*len("ffff:") - 1 + len("/128")]byte
	name := append(room[:0], "ip:"...)
	if addr.Is4() {
		return string(addr.AppendTo(name))
	}
	network, _ := addr.Prefix(a.bits) // cannot fail: bits are 1 to 128
	return string(network.AppendTo(name))
}

// walk returns the client's address, beginning at a trusted address and going through the header from the last entry to the
// first.
func (a *addresses) walk(addr netip.Addr, lines []string) netip.Addr {
	for _, line := range slices.Backward(lines) {
		for more := true; more; {
			comma := strings.LastIndexByte(line, ',')
			next := parseAddress(strings.Trim(line[comma+1:], " \t"))
			if !next.IsValid() {
				return addr
			}
			if addr = next; !a.trusts(addr) {
				return addr
			}
			if more = comma >= 0; more {
				line = line[:comma]
			}
		}
	}
	return addr
}

func (a *addresses) trusts(addr netip.Addr) bool {
	for _, p := range a.trusted {
		if p.Contains(addr) {
			return true
		}
	}
	return false
}

// parseAddress reads 192.0.2.1, 192.0.2.1:80, 2001:db8::1, [2001:db8::1] or [2001:db8::1]:80. IPv4 in IPv6 becomes IPv4.
// A zone is cut off before parsing, since parsing it would allocate. Anything else becomes an address that is not valid.
func parseAddress(s string) netip.Addr {
	host, port := s, ""
	bracket := strings.HasPrefix(s, "[")
	if bracket {
		end := strings.LastIndexByte(s, ']')
		if end < 0 {
			return netip.Addr{}
		}
		host, port = s[1:end], s[end+1:]
	} else if colon := strings.IndexByte(s, ':'); colon >= 0 && colon == strings.LastIndexByte(s, ':') {
		host, port = s[:colon], s[colon:]
	}
	if port != "" {
		if _, err := strconv.ParseUint(port[1:], 10, 16); err != nil || port[0] != ':' {
			return netip.Addr{}
		}
	}
	host, zone, zoned := strings.Cut(host, "%")
	addr, err := netip.ParseAddr(host)
	if err != nil || addr.Is4() && (bracket || zoned) || zoned && (zone == "" || !bracket && strings.HasSuffix(zone, "]")) {
		return netip.Addr{}
	}
	return addr.Unmap()
}

// First returns a Key that is the name from the first of the keys that knows one, or "" if none does. First(User(id),
// Address(nil)) limits users by their id and everybody else by address.
func First(keys ...Key) Key {
	keys = slices.Clone(keys)
	return func(r *http.Request) string {
		for _, k := range keys {
			if name := k.of(r); name != "" {
				return name
			}
		}
		return ""
	}
}

// Join returns a Key that is the names from all keys, separated by spaces: "user:42 ip:192.0.2.1" is a user at one address.
// It is "" if one of the names is "", or there are no keys.
//
// Two different lists of names never make the same name, whatever the names contain and however long they are, because in
// each name a space becomes %20 and a percent sign %25. A name that was not joined is not escaped, and may look like a
// joined one if it has spaces. If both are used in one place, as in First, put Join around the single name as well.
func Join(keys ...Key) Key {
	keys = slices.Clone(keys)
	return func(r *http.Request) string {
		var room [128]byte
		joined := room[:0]
		for i, k := range keys {
			name := k.of(r)
			if name == "" {
				return ""
			}
			if i > 0 {
				joined = append(joined, ' ')
			}
			joined = appendEscaped(joined, name)
		}
		return string(joined)
	}
}

func appendEscaped(b []byte, name string) []byte {
	for i := range len(name) {
		switch c := name[i]; c {
		case ' ':
			b = append(b, "%20"...)
		case '%':
			b = append(b, "%25"...)
		default:
			b = append(b, c)
		}
	}
	return b
}

// RouteIdentifier returns the identifier that the Throttler uses for a key on a route with buckets of its own. It is for
// Peek and Reset: RouteIdentifier("user:42", "POST /login"). The route is the Name of a Route, or its Pattern if it has no
// Name. For the route "" it is the identifier for all other buckets, those of Options and of the Throttler.
//
// The identifier is the key, for a route followed by a NUL and the route. Two different pairs of a key and a route never
// have the same identifier, so a client cannot choose a key that is another client's route. To ensure this, a key with a
// NUL or of more than 900 bytes is replaced by its hash, and so is a route with a NUL or too long for the 1024 bytes of an
// identifier.
func RouteIdentifier(key, route string) string {
	const longestKey = 900
	hashed := ""
	if len(key) > longestKey || strings.IndexByte(key, 0) >= 0 {
		key, hashed = hexSum(key), "\x00" // a second NUL after the first one, which no other identifier has
	}
	if route == "" && hashed == "" {
		return key
	}
	if len(key)+2+len(route) > law.MaxIdentifier || strings.IndexByte(route, 0) >= 0 || strings.HasPrefix(route, "\x01") {
		route = "\x01" + hexSum(route)
	}
	return key + "\x00" + hashed + route
}

func hexSum(s string) string {
	sum := sha256.Sum256([]byte(s))
	return hex.EncodeToString(sum[:])
}
