package httpguard

import (
	"net/netip"
	"net/url"
	"strconv"
	"strings"

	"golang.org/x/net/idna"
)

// An upstream is a host and port in one of the many spellings that reach it.
type upstream struct{ host, port string }

// upstreamOf returns the upstream of an outgoing request's URL as net/http connects to it. A name is in lower case and
// in punycode, without the final dot. An address is in its shortest form, without the brackets of IPv6, and as IPv4 if
// it is IPv4 within IPv6. Its zone stays, because each zone is another link. The port is always there if the scheme has
// one by default.
func upstreamOf(u *url.URL) upstream {
	if u == nil || u.Host == "" {
		return upstream{}
	}
	return upstream{canonicalHost(u.Hostname()), canonicalPort(u.Port(), u.Scheme)}
}

func canonicalHost(host string) string {
	if addr, ok := address(host); ok {
		return addr
	}
	for i := range len(host) {
		if host[i] >= 0x80 {
			if name, err := idna.Lookup.ToASCII(host); err == nil {
				host = name
			}
			break
		}
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	if addr, ok := address(host); ok { // only now it is one: with a dot at its end, or in digits that are not ASCII
		return addr
	}
	return host
}

// address returns an IP address in its canonical form.
func address(host string) (string, bool) {
	if host == "" || !strings.Contains(host, ":") && (host[len(host)-1] < '0' || host[len(host)-1] > '9') {
		return "", false // a name, found without the error of ParseAddr
	}
	addr, err := netip.ParseAddr(host)
	if err != nil {
		return "", false
	}
	return addr.Unmap().String(), true
}

func canonicalPort(port, scheme string) string {
	if n, err := strconv.ParseUint(port, 10, 16); err == nil {
		return strconv.FormatUint(n, 10)
	}
	if port != "" {
		return port
	}
	switch strings.ToLower(scheme) {
	case "http":
		return "80"
	case "https":
		return "443"
	default:
		return ""
	}
}
