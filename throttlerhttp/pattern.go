// Rewriting patterns of other routers as patterns of http.ServeMux, for the errors of New.

package throttlerhttp

import (
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// splitPattern returns the method of a pattern, "" if it is for all, and what follows it: the host and the path.
func splitPattern(pattern string) (method, rest string) {
	i := strings.IndexAny(pattern, " \t")
	if i < 0 {
		return "", pattern
	}
	return pattern[:i], strings.TrimLeft(pattern[i:], " \t")
}

// lowerPath returns the pattern with its path in lower case.
func lowerPath(pattern string) string {
	i := max(0, strings.IndexByte(pattern, '/'))
	return pattern[:i] + lower(pattern[i:])
}

// usualPattern returns a pattern in the form of http.ServeMux, and a hint for the error. The pattern may be written for
// another router, or be one that a ServeMux accepts but never matches. Any other pattern is returned unchanged.
func usualPattern(pattern string) (right, hint string) {
	right, hint = usualOnce(pattern)
	for range 4 { // one mistake may hide another
		right, _ = usualOnce(right)
	}
	return right, hint
}

// usualOnce corrects the mistakes that it finds in one pass, first in the method, then in the host and the path.
func usualOnce(pattern string) (right, hint string) {
	trimmed := strings.TrimSpace(pattern)
	method, rest := splitPattern(trimmed)
	separator := " "
	if strings.HasPrefix(trimmed, method+"\t"+rest) {
		separator = "\t"
	}
	switch {
	case strings.HasPrefix(method, "/") && isMethod(strings.ToUpper(rest)):
		method, rest = rest, method // "/login POST"
	case strings.HasPrefix(method, "/"):
		method, rest = "", method+"%20"+rest // "/a b"
	case method != "" && strings.Trim(method, "=~!*^@") == "":
		method = "" // "~ /login"
	}
	rest = usualSpaces(rest)
	if method == "" {
		method, rest = methodBefore(rest)
	}
	method, hint = usualMethod(method)
	right = usualRest(method, rest)
	if method != "" {
		right = method + separator + right
	}
	if right != pattern && strings.ContainsAny(rest, "*:$|") {
		hint += "; a literal * is written %2A, a literal : is written %3A, a literal $ is written %24"
	}
	if trimmed == "" {
		return "/", hint
	}
	return right, hint
}

// usualSpaces returns what follows the method, without further methods before it and without an HTTP version after it.
func usualSpaces(rest string) string {
	words := strings.Fields(rest)
	all := len(words)
	for len(words) > 1 && isMethod(strings.ToUpper(strings.Trim(words[0], ",|"))) {
		words = words[1:]
	}
	if len(words) > 1 && strings.HasPrefix(words[1], "HTTP/") {
		words = words[:1]
	}
	if len(words) == all { // nothing was removed: a space belongs to the path
		return rest
	}
	return strings.Join(words, "%20")
}

// usualMethod returns the method in upper case, or "" for a word by which other routers mean all methods.
func usualMethod(method string) (right, hint string) {
	method = strings.TrimRight(strings.ToUpper(method), ":")
	if i := strings.IndexAny(method, "|,"); i >= 0 {
		return method[:i], "; each method has a Route, and those of one Name share what is spent"
	}
	switch method {
	case "ANY", "ALL", "*", "USE", "HTTP":
		return "", "; without a method it is for all"
	}
	return method, ""
}

// methodBefore splits off the method in "POST/login", "POST:/login" and "POST".
func methodBefore(s string) (method, rest string) {
	method, rest = s, "/"
	if i := strings.IndexByte(s, '/'); i >= 0 {
		method, rest = s[:i], s[i:]
	}
	if method = strings.TrimRight(method, ":"); isMethod(strings.ToUpper(method)) {
		return method, rest
	}
	return "", s
}

func isMethod(s string) bool {
	return slices.Contains([]string{
		http.MethodGet, http.MethodHead, http.MethodPost, http.MethodPut, http.MethodPatch, http.MethodDelete,
		http.MethodConnect, http.MethodOptions, http.MethodTrace,
	}, s)
}

// usualRest returns the host, if there is one, and the path.
func usualRest(method, rest string) string {
	rest = strings.TrimRight(strings.TrimLeft(rest, "^"), "$") // the anchors of a regular expression
	if _, after, ok := strings.Cut(rest, "://"); ok {
		if rest = after; !strings.Contains(rest, "/") {
			rest += "/"
		}
	}
	host, p := "", "/"+rest
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		host, p = rest[:i], rest[i:]
	}
	if method != http.MethodConnect { // a ServeMux matches the host and path of CONNECT as they are
		host, p = usualHost(host, p)
	}
	p = usualSegments(usualBraces(p))
	if method == http.MethodConnect {
		return host + p
	}
	slash := p != "/" && strings.HasSuffix(p, "/")
	if p = path.Clean(p); slash && p != "/" {
		p += "/"
	}
	return host + p
}

// usualHost returns the host in lower case and without the port, which a ServeMux ignores. A host without a dot, other than
// localhost, is taken for the first segment of the path.
func usualHost(host, p string) (string, string) {
	if host == "" || strings.ContainsAny(host, "[]") || strings.Count(host, ":") > 1 {
		return host, p // IPv6
	}
	if strings.HasPrefix(host, "*.") {
		return "", p // a ServeMux has no wildcards in hosts
	}
	host, _, _ = strings.Cut(host, ":")
	usual := strings.TrimRight(strings.ToLower(host), ".")
	if usual == "localhost" || strings.Contains(usual, ".") && !strings.ContainsAny(usual, "*{<") || usual == "" {
		return usual, p
	}
	return "", "/" + host + p
}

// usualBraces writes {id:[0-9]+}, {id?}, {*rest} and {user-id} as {id}, {id}, {rest...} and {user_id}.
func usualBraces(p string) string {
	var out strings.Builder
	for {
		from := strings.IndexByte(p, '{')
		to := closingBrace(p, from)
		if from < 0 || to < 0 {
			return out.String() + p
		}
		out.WriteString(p[:from] + wildcard(p[from+1:to]))
		p = p[to+1:]
	}
}

// closingBrace returns the index of the brace that closes the one at from, or -1.
func closingBrace(p string, from int) int {
	depth := 0
	for i := max(from, 0); i < len(p); i++ {
		switch p[i] {
		case '{':
			depth++
		case '}':
			if depth--; depth == 0 {
				return i
			}
		}
	}
	return -1
}

// wildcard returns the segment for a wildcard that other routers call name.
func wildcard(name string) string {
	if name == "$" {
		return "{$}"
	}
	rest := ""
	if strings.HasPrefix(name, "*") || strings.HasPrefix(name, "...") || strings.HasSuffix(name, "...") {
		rest = "..."
	}
	name = strings.Trim(name, "*.?")
	if i := strings.IndexAny(name, ":(?*+=\\"); i >= 0 {
		name = name[:i]
	}
	name = strings.Map(func(r rune) rune {
		if r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r) {
			return r
		}
		return '_'
	}, strings.TrimSpace(name))
	if name == "" || unicode.IsDigit([]rune(name)[0]) {
		name = "any" + name
	}
	return "{" + name + rest + "}"
}

// usualSegments rewrites the segments of a path, and drops a query or fragment.
func usualSegments(p string) string {
	for i := range len(p) {
		if p[i] == '?' && !strings.HasSuffix(p[:i], "(") || p[i] == '#' && !strings.HasPrefix(p[i+1:], "{") {
			p = p[:i]
			break
		}
	}
	segments := strings.Split(p, "/")
	for i, s := range segments {
		segments[i] = usualSegment(s, i == len(segments)-1)
	}
	return strings.Join(segments, "/")
}

func usualSegment(s string, last bool) string {
	inner := ""
	if len(s) > 2 {
		inner = s[1 : len(s)-1]
	}
	switch {
	case s == "" || s[0] == '{': // empty, or in the form of a ServeMux already
		return s
	case s[0] == '#' && strings.HasPrefix(inner, "{"): // #{id}
		return s[1:]
	case strings.HasPrefix(s, "(?P<"): // (?P<id>[0-9]+)
		name, _, _ := strings.Cut(s[len("(?P<"):], ">")
		return wildcard(name)
	case s[0] == '$': // $id
		return wildcard(s[1:])
	case strings.Contains(s, "|"): // (a|b)
		return wildcard("")
	case s[0] == '<' && strings.HasSuffix(s, ">") && inner != "": // <id>, <int:id>, <path:rest>
		kind, name, typed := strings.Cut(inner, ":")
		if !typed {
			name = kind
		}
		if kind == "path" && last && typed {
			name += "..."
		}
		return wildcard(name)
	case s[0] == '[' && strings.HasSuffix(s, "]") && inner != "": // [id], [[...rest]]
		return wildcard(strings.Trim(inner, "[]"))
	case s[0] == ':': // :id, :rest*
		if last && strings.HasSuffix(s, "*") {
			return wildcard(s[1:] + "...")
		}
		return wildcard(s[1:])
	case strings.Contains(s, `\`): // \d+
		return wildcard("")
	case strings.Contains(s, "*"):
		return usualStar(s, last)
	}
	return unescaped(strings.ReplaceAll(s, ":", "%3A"))
}

// usualStar rewrites a segment with a star. At the end of a path a star means all paths that begin so.
func usualStar(s string, last bool) string {
	before, name, _ := strings.Cut(s, "*")
	switch {
	case !last || strings.HasPrefix(name, "."):
		return wildcard(name)
	case before == "" && strings.Trim(name, "*") != "":
		return wildcard("*" + name)
	case strings.Trim(before, "(.") == "":
		return ""
	}
	return strings.TrimRight(before, "(.") + "/"
}

// unescaped returns a segment without needless escapes. It keeps those of characters that cannot be written otherwise or
// have another meaning.
func unescaped(s string) string {
	var out strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] == '%' && i+2 < len(s) {
			c, err := strconv.ParseUint(s[i+1:i+3], 16, 8)
			if err == nil && c > ' ' && c < 0x7f && !strings.ContainsRune("%{}*:$?#\"<>\\^`|[]", rune(c)) {
				out.WriteByte(byte(c))
				i += 2
				continue
			}
		}
		out.WriteByte(s[i])
	}
	return out.String()
}
