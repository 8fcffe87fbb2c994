// Writing the patterns of other routers as those of http.ServeMux, for the faults of New.

package throttlerhttp

import (
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"unicode"
)

// splitPattern returns the method of a pattern, "" for all, and what stands behind it: the host and the path.
func splitPattern(pattern string) (method, rest string) {
	i := strings.IndexAny(pattern, " \t")
	if i < 0 {
		return "", pattern
	}
	return pattern[:i], strings.TrimLeft(pattern[i:], " \t")
}

// lowerPath is the pattern with a path in lower case.
func lowerPath(pattern string) string {
	i := max(0, strings.IndexByte(pattern, '/'))
	return pattern[:i] + lower(pattern[i:])
}

// usualPattern returns how http.ServeMux writes the pattern of another router, or one that it takes and never matches,
// and a hint. It returns other patterns as they are.
func usualPattern(pattern string) (right, hint string) {
	right, hint = usualOnce(pattern)
	for range 4 { // where one mistake hid another
		right, _ = usualOnce(right)
	}
	return right, hint
}

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

// usualSpaces is what stands behind the method without further methods before it and a version of HTTP behind it.
func usualSpaces(rest string) string {
	words := strings.Fields(rest)
	all := len(words)
	for len(words) > 1 && isMethod(strings.ToUpper(strings.Trim(words[0], ",|"))) {
		words = words[1:]
	}
	if len(words) > 1 && strings.HasPrefix(words[1], "HTTP/") {
		words = words[:1]
	}
	if len(words) == all { // of a path with a space
		return rest
	}
	return strings.Join(words, "%20")
}

// usualMethod is the method in upper case, and "" for what other routers call all of them.
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

// methodBefore finds the method in "POST/login", "POST:/login" and "POST".
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

// usualRest is the host, if there is one, and the path.
func usualRest(method, rest string) string {
	rest = strings.TrimRight(strings.TrimLeft(rest, "^"), "$")
	if _, after, ok := strings.Cut(rest, "://"); ok {
		if rest = after; !strings.Contains(rest, "/") {
			rest += "/"
		}
	}
	host, p := "", "/"+rest
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		host, p = rest[:i], rest[i:]
	}
	if method != http.MethodConnect { // whose requests a ServeMux takes as they come
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

// usualHost is a host in lower case, without the port, which a ServeMux does not look at. What has no dot, and is
// not localhost, is the first segment of a path.
func usualHost(host, p string) (string, string) {
	if host == "" || strings.ContainsAny(host, "[]") || strings.Count(host, ":") > 1 {
		return host, p // IPv6
	}
	if strings.HasPrefix(host, "*.") {
		return "", p // it has no wildcards
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

// closingBrace is where the brace at from is closed, or below zero.
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

// wildcard is the segment for what other routers put in its name.
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

// usualSegments writes what stands between the slashes, and leaves out a query.
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
	case s == "" || s[0] == '{':
		return s
	case s[0] == '#' && strings.HasPrefix(inner, "{"):
		return s[1:]
	case strings.HasPrefix(s, "(?P<"):
		name, _, _ := strings.Cut(s[len("(?P<"):], ">")
		return wildcard(name)
	case s[0] == '$':
		return wildcard(s[1:])
	case strings.Contains(s, "|"):
		return wildcard("")
	case s[0] == '<' && strings.HasSuffix(s, ">") && inner != "":
		kind, name, typed := strings.Cut(inner, ":")
		if !typed {
			name = kind
		}
		if kind == "path" && last && typed {
			name += "..."
		}
		return wildcard(name)
	case s[0] == '[' && strings.HasSuffix(s, "]") && inner != "":
		return wildcard(strings.Trim(inner, "[]"))
	case s[0] == ':':
		if last && strings.HasSuffix(s, "*") {
			return wildcard(s[1:] + "...")
		}
		return wildcard(s[1:])
	case strings.Contains(s, `\`):
		return wildcard("")
	case strings.Contains(s, "*"):
		return usualStar(s, last)
	}
	return unescaped(strings.ReplaceAll(s, ":", "%3A"))
}

// usualStar writes a segment with a star: at the end of a path it is for all that begins so.
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

// unescaped is a segment without the escapes that only hide a character. Those that stay are of characters that
// cannot be written otherwise, or have another meaning.
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
